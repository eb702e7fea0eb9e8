"""Sampling speed, the share of the head, and the gain over recomputing everything.

    python -m benchmarks.sampling [--device cuda] [--preset NAME ...] [--batch N] [--save]

Untrained models and tokenizers of the presets' sizes draw images as the sample stage does, with the presets' own steps,
guidance and precision. The baseline works as published code does: in every step, all blocks run on all tokens, with and
without the class, and the head on the tokens of this step; the decoder computes in the sampling's precision. Both take
turns, on a CPU in processes of their own, since stages keep freed memory and published code does not; the median turn
counts. fewer_operations is the ratio of the baseline's operations to ours, and so the gain if both ran at the same
rate. Without --preset: digits or, on a CUDA device, the three published ImageNet sizes.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.models import INPUTS, PUBLISHED, untrained, untrained_tokenizer
from ear.config.compose import compose
from ear.latents.statistics import Statistics
from ear.model.masked import MaskedModel
from ear.model.masking import masked_after, random_orders
from ear.model.tokens import unpatchify
from ear.runtime.device import precise
from ear.runtime.randomness import Stream, image_streams
from ear.sampling.generation import ImageSampler
from ear.sampling.guidance import scale_at
from ear.sampling.settings import SamplingSettings


@torch.inference_mode()
def naive(model: MaskedModel, labels: Tensor, settings: SamplingSettings, source: Stream) -> Tensor:
    """Guided sampling that runs all blocks on all tokens in every step => tokens [B, L, D]."""
    images, length, device = len(labels), model.tokens, labels.device
    orders = random_orders(images, length, source, device)
    tokens = torch.zeros(images, length, model.token_embedding.in_features, device=device)
    mask = torch.ones(images, length, dtype=torch.bool, device=device)
    null, masked = torch.arange(2 * images, device=device) >= images, length
    for left in masked_after(length, settings.steps):
        hidden = model.hidden(tokens.repeat(2, 1, 1), mask.repeat(2, 1), labels.repeat(2), null)
        conditional, unconditional = hidden.chunk(2)
        scale = scale_at("linear", settings.guidance, tokens=length, masked=left)
        revealed = torch.zeros_like(mask).scatter_(1, orders[:, left:masked], True)
        tokens[revealed] = model.score.sample(
            conditional[revealed],
            source=source,
            temperature=settings.temperature,
            unconditional=unconditional[revealed],
            guidance=scale,
        ).float()
        mask, masked = mask & ~revealed, left
    return tokens


@torch.inference_mode()
def head_only(model: MaskedModel, labels: Tensor, settings: SamplingSettings, source: Stream) -> None:
    """Only the head calls of one sampling, on random hidden states."""
    masked = model.tokens
    for left in masked_after(model.tokens, settings.steps):
        rows = len(labels) * (masked - left)
        hidden = torch.randn(2 * rows, model.shape.model.width, device=labels.device)
        model.score.sample(
            hidden[:rows],
            source=source,
            temperature=settings.temperature,
            unconditional=hidden[rows:],
            guidance=2.0,
        )
        masked = left


@dataclasses.dataclass(frozen=True)
class Case:
    """What is sampled: networks of a preset, one batch of labels, settings."""

    sampler: ImageSampler
    labels: list[int]
    settings: SamplingSettings

    @classmethod
    def of(cls, preset: str, batch: int, device: torch.device) -> "Case":
        """The case of a preset; on a CPU in float32."""
        fast = [] if device.type == "cuda" else ["sample.precision=float32", "sample.decoder_precision=float32"]
        parameters = compose([f"preset={preset}", *INPUTS, *fast])
        tokenizer, statistics = untrained_tokenizer(parameters), Statistics(0.0, 1.0, (0.0,), (1.0,))
        sampler = ImageSampler(untrained(parameters), tokenizer, statistics, device)
        labels = [number % len(sampler.model.shape.classes) for number in range(batch)]
        return cls(sampler, labels, SamplingSettings.of(parameters.sample))

    def baseline(self) -> None:
        """One batch as published code does it."""
        model, numbers = self.sampler.model, range(len(self.labels))
        assert isinstance(model, MaskedModel)
        labels = torch.tensor(self.labels, device=self.sampler.device)
        with precise(self.settings.precision, self.sampler.device):
            tokens = naive(model, labels, self.settings, image_streams(0, numbers))
        plain = dataclasses.replace(self.settings, decoder_precision=self.settings.precision)
        self.sampler.pixels(unpatchify(tokens, model.patch, model.shape.latent), numbers, plain)


def baseline_elsewhere(preset: str, batch: int, threads: int) -> Callable[[], None]:
    """The baseline on a CPU, for a process of its own."""
    torch.set_num_threads(threads)
    return Case.of(preset, batch, torch.device("cpu")).baseline


def measured(preset: str, batch: int, device: torch.device, rounds: int) -> dict:
    """Images per second of one preset, the head's share, and the ratio to the baseline."""
    cuda, case = device.type == "cuda", Case.of(preset, batch, device)
    model, settings, labels = case.sampler.model, case.settings, case.labels
    parameters = compose([f"preset={preset}", *INPUTS])
    on_device = torch.tensor(labels, device=device)

    def head() -> None:
        assert isinstance(model, MaskedModel)
        with precise(settings.precision, device):
            head_only(model, on_device, settings, image_streams(0, range(batch)))
        if cuda:
            torch.cuda.synchronize()

    def ours() -> None:
        case.sampler.images(labels, settings, first=0)

    needed, baseline_needs = operations(ours), operations(case.baseline)  # operations in compiled parts are not seen
    if cuda and parameters.runtime.compile:
        model.compile_parts()
    with contextlib.ExitStack() as stack:
        baseline: Callable[[], object] = case.baseline
        if not cuda:
            threads = torch.get_num_threads()
            baseline = stack.enter_context(measure.elsewhere(baseline_elsewhere, preset, batch, threads))
        ways = {"sampling": ours, "baseline": baseline, "head": head}
        seconds = measure.turns(ways, rounds=rounds)
    took = statistics.median(seconds["sampling"])
    rate = needed / took
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": settings.precision,
        "batch": batch,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "images_per_second": batch / took,
        "baseline_images_per_second": batch / statistics.median(seconds["baseline"]),
        **measure.speedup(seconds["sampling"], seconds["baseline"]),
        "share_of_head": statistics.median(seconds["head"]) / took,
        "fewer_operations": baseline_needs / needed,
        "operations_per_second": rate,
        "share_of_peak": rate / measure.matmul_peak(device, settings.precision),
    }


def operations(draw: Callable[[], object]) -> int:
    """Operations of the matrix products of one batch, counted while it is drawn."""
    with FlopCounterMode(display=False) as counter:
        draw()
    return counter.get_total_flops()


def lines(figures: dict) -> list[measure.Line]:
    """The table's lines."""
    sizes = {
        name: f"{name}, {each['batch']} images, {each['steps']} steps, scale {each['guidance']:g}, {each['precision']}"
        for name, each in figures.items()
    }
    return [measure.Line.of_images("sampling", sizes[name], each) for name, each in figures.items()]


def main() -> None:
    """Measure all presets."""
    parser = measure.arguments(__doc__)
    measure.add_device(parser)
    parser.add_argument("--preset", nargs="+", metavar="NAME", help="default: digits, or the published sizes on CUDA")
    parser.add_argument("--batch", type=int, default=128, help="images at once (default: 128)")
    parser.add_argument("--rounds", type=int, default=9, help="turns; the median is reported (default: 9)")
    arguments = parser.parse_args()
    device = measure.device_of(arguments.device)
    presets = arguments.preset or (PUBLISHED if device.type == "cuda" else ["digits"])
    figures = {name: measured(name, arguments.batch, device, arguments.rounds) for name in presets}
    measure.report("sampling", figures, arguments)


if __name__ == "__main__":
    main()
