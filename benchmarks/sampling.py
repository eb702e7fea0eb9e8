"""Sampling speed, the share of the head, and the gain over recomputing everything.

    python -m benchmarks.sampling [--device cuda] [--preset NAME ...] [--batch N] [--save]

Untrained models and tokenizers of the presets' sizes draw images as the sample stage does, with the presets' own steps,
guidance and precision. The baseline runs the transformer on all tokens of all rows and the head on all tokens in every
step, as published code does, and discards most results; its decoder computes in float32. Both take turns; the median
turn counts. Without --preset: digits or, on a CUDA device, the three published ImageNet sizes.
"""

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
    """Guided sampling that runs the head on all tokens in every step => tokens [B, L, D]."""
    images, length, device = len(labels), model.tokens, labels.device
    orders = random_orders(images, length, source, device)
    tokens = torch.zeros(images, length, model.token_embedding.in_features, device=device)
    mask = torch.ones(images, length, dtype=torch.bool, device=device)
    null, masked = torch.arange(2 * images, device=device) >= images, length
    for left in masked_after(length, settings.steps):
        hidden = model.hidden(tokens.repeat(2, 1, 1), mask.repeat(2, 1), labels.repeat(2), null)
        conditional, unconditional = hidden.flatten(0, 1).chunk(2)
        scale = scale_at("linear", settings.guidance, tokens=length, masked=left)
        drawn = model.score.sample(
            conditional,
            source=source,
            temperature=settings.temperature,
            unconditional=unconditional,
            guidance=scale,
        )
        revealed = torch.zeros_like(mask).scatter_(1, orders[:, left:masked], True)
        tokens = torch.where(revealed[..., None], drawn.unflatten(0, (images, length)).float(), tokens)
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


def measured(preset: str, batch: int, device: torch.device, rounds: int) -> dict:
    """Images per second of one preset, the head's share, and the ratio to the baseline."""
    cuda = device.type == "cuda"
    fast = [] if cuda else ["sample.precision=float32", "sample.decoder_precision=float32"]
    parameters = compose([f"preset={preset}", *INPUTS, *fast])
    options, model = parameters.sample, untrained(parameters)
    assert isinstance(model, MaskedModel)
    settings = SamplingSettings.of(options)
    sampler = ImageSampler(model, untrained_tokenizer(parameters), Statistics(0.0, 1.0, (0.0,), (1.0,)), device)
    labels = [number % len(model.shape.classes) for number in range(batch)]
    on_device = torch.tensor(labels, device=device)

    def baseline() -> None:
        with precise(settings.precision, device):
            tokens = naive(model, on_device, settings, image_streams(0, range(batch)))
        plain = dataclasses.replace(settings, decoder_precision="float32")
        sampler.pixels(unpatchify(tokens, model.patch, model.shape.latent), range(batch), plain)

    def head() -> None:
        with precise(settings.precision, device):
            head_only(model, on_device, settings, image_streams(0, range(batch)))
        if cuda:
            torch.cuda.synchronize()

    def ours() -> None:
        sampler.images(labels, settings, first=0)

    ways: dict[str, Callable[[], object]] = {"sampling": ours, "baseline": baseline, "head": head}
    with FlopCounterMode(display=False) as counter:
        ours()
    if cuda and parameters.runtime.compile:
        model.compile_parts()
    seconds = measure.turns(ways, rounds=rounds)
    took = statistics.median(seconds["sampling"])
    rate = counter.get_total_flops() / took
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": settings.precision,
        "batch": batch,
        "steps": options.steps,
        "guidance": options.guidance,
        "images_per_second": batch / took,
        "baseline_images_per_second": batch / statistics.median(seconds["baseline"]),
        **measure.speedup(seconds["sampling"], seconds["baseline"]),
        "share_of_head": statistics.median(seconds["head"]) / took,
        "operations_per_second": rate,
        "share_of_peak": rate / measure.matmul_peak(device, settings.precision),
    }


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
    parser.add_argument("--rounds", type=int, default=5, help="turns of which the median counts (default: 5)")
    arguments = parser.parse_args()
    device = measure.device_of(arguments.device)
    presets = arguments.preset or (PUBLISHED if device.type == "cuda" else ["digits"])
    figures = {name: measured(name, arguments.batch, device, arguments.rounds) for name in presets}
    measure.report("sampling", figures, save=arguments.save, results=arguments.results)


if __name__ == "__main__":
    main()
