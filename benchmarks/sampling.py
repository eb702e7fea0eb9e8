"""How fast are images generated, how much of that is the head, and what does it gain over computing everything anew?

    python -m benchmarks.sampling [--preset NAME ...] [--batch N] [--save]

Untrained models of the presets' sizes, latents only (the tokenizer's decoder apart), with the presets' own steps and
guidance. The baseline runs the head on all tokens in every step, as published code does, and throws most of it away.
Without --preset: digits and, where there is a CUDA device, the three published ImageNet sizes.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks import measure
from ear import scores
from ear.config import Parameters
from ear.config.compose import compose
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model
from ear.model.masking import masked_after, random_orders
from ear.model.shape import Shape
from ear.runtime.device import set_precision
from ear.runtime.randomness import ImageStreams, Source, generator
from ear.sampling import sampler as sampling
from ear.sampling.guidance import scale_at

PUBLISHED = ("imagenet256_base", "imagenet256_large", "imagenet256_huge")
CLASSES = {"digits": 10}  # of the presets whose data have not 1000


def untrained(preset: str, parameters: Parameters) -> AutoregressiveModel:
    """The preset's model in eval mode; a head that is not 0 costs what a trained one does."""
    side = parameters.data.image_size // parameters.tokenizer.downsample
    classes = tuple(str(k) for k in range(CLASSES.get(preset, 1000)))
    shape = Shape(
        (parameters.tokenizer.channels, side, side),
        classes,
        asdict(parameters.model),
        scores.chosen(asdict(parameters.score)),
    )
    return build_model(shape).initialise(generator(0, "weights")).eval()


@torch.inference_mode()
def naive(model: AutoregressiveModel, labels: Tensor, *, steps: int, guidance: float, temperature: float, source: Source) -> Tensor:
    """Guided sampling that runs the head on all tokens in every step; tokens [B, L, D]."""
    images, length, device = len(labels), model.tokens, labels.device
    orders = random_orders(images, length, source, device)
    tokens = torch.zeros(images, length, model.token_embedding.in_features, device=device)
    mask = torch.ones(images, length, dtype=torch.bool, device=device)
    null, masked = torch.arange(2 * images, device=device) >= images, length
    for left in masked_after(length, steps):
        hidden = model.hidden(tokens.repeat(2, 1, 1), mask.repeat(2, 1), labels.repeat(2), null)
        conditional, unconditional = hidden.flatten(0, 1).chunk(2)
        scale = scale_at("linear", guidance, tokens=length, masked=left)
        drawn = model.score.sample(
            conditional, source=source, temperature=temperature, unconditional=unconditional, guidance=scale
        )
        revealed = torch.zeros_like(mask).scatter_(1, orders[:, left:masked], True)
        tokens = torch.where(revealed[..., None], drawn.unflatten(0, (images, length)).float(), tokens)
        mask, masked = mask & ~revealed, left
    return tokens


@torch.inference_mode()
def head_only(model: AutoregressiveModel, labels: Tensor, *, steps: int, temperature: float, source: Source) -> None:
    """The calls of the head that one sampling makes, on hidden states of noise."""
    masked = model.tokens
    for left in masked_after(model.tokens, steps):
        rows = len(labels) * (masked - left)
        hidden = torch.randn(2 * rows, model.shape.model["width"], device=labels.device)
        model.score.sample(
            hidden[:rows], source=source, temperature=temperature, unconditional=hidden[rows:], guidance=2.0
        )
        masked = left


def measured(preset: str, batch: int, device: torch.device, repeats: int) -> dict:
    """Images per second of one preset, the head's share, and the ratio to the baseline."""
    parameters = compose([f"preset={preset}", "data.path=/images", "tokenizer.weights=/weights.ckpt"])  # not read
    options, model = parameters.sample, untrained(preset, parameters).to(device)
    precision = options.precision if device.type == "cuda" else "float32"
    set_precision(precision, device, key="sample.precision")
    labels = (torch.arange(batch) % len(model.shape.classes)).to(device)
    common = {"steps": options.steps, "temperature": options.temperature}
    ways = {
        "sampling": lambda source: sampling.sample(model, labels, guidance=options.guidance, source=source, **common),
        "baseline": lambda source: naive(model, labels, guidance=options.guidance, source=source, **common),
        "head": lambda source: head_only(model, labels, source=source, **common),
    }

    def once(way: Callable[[Source], object]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            way(ImageStreams(0, range(batch)))
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = {name: measure.median_seconds(lambda w=way: once(w), repeats) for name, way in ways.items()}
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
