"""Sampling speed, the share of the head, and the gain over recomputing everything.

    python -m benchmarks.sampling [--preset NAME ...] [--batch N] [--save]

Untrained models of the presets' sizes draw latents (without decoder) with the presets' own steps and guidance. The
baseline runs the head on all tokens in every step, as published code does, and discards most results. Without --preset:
digits and, if there is a CUDA device, the three published ImageNet sizes.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.models import INPUTS, PUBLISHED, untrained
from ear.config.compose import compose
from ear.model.masked import MaskedModel
from ear.model.masking import masked_after, random_orders
from ear.runtime.device import precise
from ear.runtime.randomness import Stream, image_streams
from ear.sampling.guidance import scale_at
from ear.sampling.sampler import sample
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


def measured(preset: str, batch: int, device: torch.device, repeats: int) -> dict:
    """Images per second of one preset, the head's share, and the ratio to the baseline."""
    parameters = compose([f"preset={preset}", *INPUTS])
    options, model = parameters.sample, untrained(parameters).to(device)
    assert isinstance(model, MaskedModel)
    settings = SamplingSettings.of(options)
    precision = options.precision if device.type == "cuda" else "float32"
    labels = (torch.arange(batch) % len(model.shape.classes)).to(device)
    ways = {
        "sampling": lambda source: sample(model, labels.tolist(), settings, source=source),
        "baseline": lambda source: naive(model, labels, settings, source),
        "head": lambda source: head_only(model, labels, settings, source),
    }

    def once(way: Callable[[Stream], object]) -> None:
        with precise(precision, device):
            way(image_streams(0, range(batch)))
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = {name: measure.median_seconds(functools.partial(once, way), repeats) for name, way in ways.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": precision,
        "batch": batch,
        "steps": options.steps,
        "guidance": options.guidance,
        "images_per_second": batch / seconds["sampling"],
        "baseline_images_per_second": batch / seconds["baseline"],
        "speedup": seconds["baseline"] / seconds["sampling"],
        "share_of_head": seconds["head"] / seconds["sampling"],
    }


def main() -> None:
    """Measure all presets."""
    cuda = torch.cuda.is_available()
    parser = measure.arguments(__doc__)
    parser.add_argument("--preset", nargs="+", default=["digits", *(PUBLISHED if cuda else ())], metavar="NAME")
    parser.add_argument("--batch", type=int, default=128, help="images at once (default: 128)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median counts (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(compose([]).compute.threads)
    device = torch.device("cuda" if cuda else "cpu")
    figures = {name: measured(name, arguments.batch, device, arguments.repeats) for name in arguments.preset}
    measure.report("sampling", figures, save=arguments.save)


if __name__ == "__main__":
    main()
