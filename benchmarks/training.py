"""Speed of a training step, and the gain over a plain loop.

    python -m benchmarks.training [--preset NAME ...] [--rounds N] [--save]

Untrained models of the presets' sizes on random latents. A step is the posterior draw, forward, backward, clipping,
optimiser and EMAs on one global batch. The plain loop works as published code: the head on all tokens, one pass of the
head per noise sample, optimiser and EMA parameter by parameter, the loss read at every step. Both take turns, so other
work on the machine affects both; the median turn counts. Without --preset: digits and, if there is a CUDA device, the
three published ImageNet sizes with their own precision and compilation; MFU is images per second times operations over
the device's peak.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.models import INPUTS, PUBLISHED, Batch, Training, untrained
from ear.commands import costs
from ear.config import Parameters
from ear.config.compose import compose
from ear.model.masked import MaskedModel
from ear.model.masking import mask_first, masked_count, random_orders
from ear.model.tokens import patchify
from ear.model.training import parameter_groups
from ear.runtime.device import prepare_device
from ear.runtime.randomness import Stream, stream, uniform
from ear.scores.sample_based import SampleBasedScore, pairwise_loss
from ear.training.ema import Average

_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 without sparsity, from the data sheets
_STEPS = {"cpu": 3, "cuda": 10}  # of one turn


def plain_loss(model: MaskedModel, latents: Tensor, labels: Tensor, source: Stream) -> Tensor:
    """The loss of `AutoregressiveModel.loss` with the head on all tokens, once per noise sample."""
    tokens, rule = patchify(latents, model.patch), model.score
    assert isinstance(rule, SampleBasedScore)
    orders = random_orders(len(tokens), model.tokens, source, tokens.device)
    mask = mask_first(orders, masked_count(model.tokens, model.mask_ratio_min, source))
    null = uniform((len(tokens),), source, tokens.device) < model.label_dropout
    hidden = model.hidden(tokens, mask, labels, null).flatten(0, 1)
    samples = [
        rule.generate(hidden, rule.draw_noise((len(hidden),), source, hidden.device)) for _ in range(rule.samples)
    ]
    per_token = pairwise_loss(torch.stack(samples), tokens.flatten(0, 1)[None], rule.distance, pairs=rule.pairs)
    return (per_token * mask.flatten()).sum() / mask.sum()


def plain_loop(model: MaskedModel, parameters: Parameters, batch: Batch, autocast: Callable) -> Callable:
    """A training step as published code does it, on a global batch of equal micro-batches."""
    options, positions = parameters.train, itertools.count()
    moments, labels = batch
    latents = moments.float().chunk(2, dim=1)[0]
    groups = parameter_groups(model, weight_decay=options.weight_decay, head_rate=options.head_rate)
    declared = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups]
    adamw = torch.optim.AdamW(declared, lr=1e-6, betas=(options.beta1, options.beta2), foreach=False)
    averages = [Average(model).module for _ in range(2)]
    parts = options.global_batch_size // options.micro_batch_size

    def step() -> float:
        model.train()
        adamw.zero_grad()
        position, total = next(positions), 0.0
        for part in range(parts):
            with autocast():
                loss = plain_loss(model, latents, labels, stream(0, "loss", position, part)) / parts
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm, foreach=False)
        adamw.step()
        with torch.no_grad():
            for average in averages:
                for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    ours.mul_(0.999).add_(theirs, alpha=0.001)
        return total

    return step


def turns(ways: Mapping[str, Callable[[], object]], *, rounds: int, steps: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds per step of each way, turn by turn; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, step in ways.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: times[1:] for name, times in seconds.items()}


def measured(preset: str, device: torch.device, rounds: int) -> dict:
    """The results of one preset."""
    cuda, fast = device.type == "cuda", {"train.precision=float32"} if device.type == "cpu" else set()
    parameters = compose([f"preset={preset}", *INPUTS, *sorted(fast)])
    options = parameters.train
    ours = untrained(parameters).to(device)
    if cuda and parameters.runtime.compile:
        ours.compile_parts()
    training = Training(ours, parameters, device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")

    plain = untrained(parameters).to(device)
    assert isinstance(plain, MaskedModel)
    ways = {
        "training": training.step,
        "plain loop": plain_loop(plain, parameters, training.batch, autocast),
    }
    seconds = turns(ways, rounds=rounds, steps=_STEPS[device.type], cuda=cuda)
    ratios = [theirs / own for own, theirs in zip(seconds["training"], seconds["plain loop"], strict=True)]
    rate = options.global_batch_size / statistics.median(seconds["training"])
    figures = {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "precision": options.precision,
        "images_per_step": options.global_batch_size,
        "micro_batch_size": options.micro_batch_size,
        "images_per_second": rate,
        "plain_images_per_second": options.global_batch_size / statistics.median(seconds["plain loop"]),
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }
    ways.clear()  # free the plain loop's memory before measuring the training's
    return figures | (on_cuda(training, rate) if cuda else {})


def on_cuda(training: Training, rate: float) -> dict:
    """Peak memory of a step, and MFU if the peak of the device is known."""
    torch.cuda.reset_peak_memory_stats()
    training.step()
    flops = costs.training_flops(training.model.shape)["forward and backward"]
    peak = next((p for name, p in _PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return {
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "operations_per_image": flops,
        "mfu": rate * flops / peak if peak else None,
    }


def main() -> None:
    """Measure all presets."""
    cuda = torch.cuda.is_available()
    parser = measure.arguments(__doc__)
    parser.add_argument("--preset", nargs="+", default=["digits", *(PUBLISHED if cuda else ())], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which the median counts (default: 5)")
    arguments = parser.parse_args()
    device = prepare_device("auto", compose([]).compute.threads)
    figures = {name: measured(name, device, arguments.rounds) for name in arguments.preset}
    measure.report("training", figures, save=arguments.save)


if __name__ == "__main__":
    main()
