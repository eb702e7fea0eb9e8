"""Speed of a training step, and the gain over a plain loop.

    python -m benchmarks.training [--device cuda] [--preset NAME ...] [--rounds N] [--save]

Untrained models of the presets' sizes on random latents. A step is the posterior draw, noise, dropout, forward,
backward, clipping, optimiser, EMAs and log on one global batch. The plain loop works as published code: the head on all
tokens, the EMA parameter by parameter, the loss read at every step. It uses this project's random numbers, which are
slower than torch's, but saves the posterior draw by training on the means.
Both use AdamW and take turns, so other work on the machine affects both; the median turn counts. Without --preset:
digits or, on a CUDA device, the three published ImageNet sizes with their own precision and compilation. share_of_peak
is the rate of the step's matrix products over that of one large product, measured here; mfu over the data sheet's.
fewer_operations is the ratio of the plain loop's operations to ours, and so the gain if both ran at the same rate.
"""

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.models import INPUTS, PUBLISHED, Batch, Training, random_batch, untrained
from ear.config import Parameters
from ear.config.compose import compose
from ear.model.masked import MaskedModel
from ear.model.masking import mask_first, masked_count, random_orders
from ear.model.tokens import patchify
from ear.model.training import parameter_groups
from ear.runtime.device import data_sheet_peak, precise
from ear.runtime.randomness import Stream, stream, uniform
from ear.scores.sample_based import SampleBasedScore, pairwise_loss
from ear.training.ema import Average

_STEPS = {"cpu": 3, "cuda": 10}  # of one turn
_COUNTED = 20  # steps over which operations are averaged, since the number of masked tokens varies


def plain_loss(model: MaskedModel, latents: Tensor, labels: Tensor, source: Stream) -> Tensor:
    """The loss of `AutoregressiveModel.loss` with the head on all tokens."""
    tokens, rule = patchify(latents, model.patch), model.score
    assert isinstance(rule, SampleBasedScore)
    orders = random_orders(len(tokens), model.tokens, source, tokens.device)
    mask = mask_first(orders, masked_count(model.tokens, model.mask_ratio_min, source))
    null = uniform((len(tokens),), source, tokens.device) < model.label_dropout
    hidden = model.hidden(tokens, mask, labels, null).flatten(0, 1).repeat(rule.samples, 1)
    samples = rule.generate(hidden, rule.draw_noise((len(hidden),), source, hidden.device))
    samples = samples.unflatten(0, (rule.samples, -1))
    per_token = pairwise_loss(samples, tokens.flatten(0, 1)[None], rule.distance, pairs=rule.pairs).value
    return (per_token * mask.flatten()).sum() / mask.sum()


def plain_loop(model: MaskedModel, parameters: Parameters, batch: Batch, autocast: Callable) -> Callable:
    """A training step as published code does it, on a global batch of equal micro-batches."""
    options, positions = parameters.train, itertools.count()
    moments, labels = batch
    latents = moments.float().chunk(2, dim=1)[0]
    groups = parameter_groups(model, weight_decay=options.weight_decay, head_rate=options.head_rate)
    declared = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups]
    adamw = torch.optim.AdamW(declared, lr=1e-6, betas=(options.beta1, options.beta2))
    averages = [Average(model, options.ema_decay).module for _ in range(2)]
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
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        adamw.step()
        with torch.no_grad():
            for average in averages:
                for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    ours.mul_(0.999).add_(theirs, alpha=0.001)
        return total

    return step


def parameters_of(preset: str, device: torch.device) -> Parameters:
    """The preset's parameters, with the optimiser of published code; on a CPU in float32."""
    fast = ["train.precision=float32"] if device.type == "cpu" else []
    return compose([f"preset={preset}", *INPUTS, "train.optimizer=adamw", *fast])


def baseline(preset: str, device: torch.device) -> Callable[[], object]:
    """A step of the plain loop."""
    parameters = parameters_of(preset, device)
    options, model = parameters.train, untrained(parameters).to(device)
    assert isinstance(model, MaskedModel)
    batch = random_batch(model, options.micro_batch_size, device)
    return plain_loop(model, parameters, batch, functools.partial(precise, options.precision, device))


def baseline_elsewhere(preset: str, threads: int) -> Callable[[], object]:
    """The plain loop on a CPU, for a process of its own: stages keep freed memory, and published code does not."""
    torch.set_num_threads(threads)
    return baseline(preset, torch.device("cpu"))


def measured(preset: str, device: torch.device, rounds: int) -> dict:
    """The results of one preset."""
    cuda, parameters = device.type == "cuda", parameters_of(preset, device)
    options = parameters.train
    ours = untrained(parameters).to(device)
    if cuda and parameters.runtime.compile:
        ours.compile_parts()
    training = Training(ours, parameters, device)
    with contextlib.ExitStack() as stack:
        plain: Callable[[], object]
        if cuda:
            plain = functools.partial(finished, baseline(preset, device), device)
        else:
            threads = torch.get_num_threads()
            plain = stack.enter_context(measure.elsewhere(baseline_elsewhere, preset, threads))
        step: Callable[[], object] = functools.partial(finished, training.step, device)
        ways = {"training": step, "plain loop": plain}
        seconds = measure.turns(ways, rounds=rounds, calls=_STEPS[device.type])
    del plain, ways, step  # free the plain loop's memory before measuring the training's
    step_seconds, images = statistics.median(seconds["training"]), options.global_batch_size
    figures = {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "precision": options.precision,
        "images_per_step": images,
        "micro_batch_size": options.micro_batch_size,
        "images_per_second": images / step_seconds,
        "baseline_images_per_second": images / statistics.median(seconds["plain loop"]),
        **measure.speedup(seconds["training"], seconds["plain loop"]),
    }
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        training.step()
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    needed = operations(training.step)
    rate = needed / step_seconds
    figures |= {
        "fewer_operations": operations(baseline(preset, device), steps=1) / needed,
        "operations_per_second": rate,
        "share_of_peak": rate / measure.matmul_peak(device, options.precision),
    }
    if cuda:
        sheet = data_sheet_peak(device)
        figures["mfu"] = rate / sheet if sheet else None
    return figures


def finished(step: Callable[[], object], device: torch.device) -> None:
    """A step, and the wait until the GPU has done it."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def operations(step: Callable[[], object], steps: int = _COUNTED) -> int:
    """Operations of the matrix products of a step, counted while it runs: those that a step needs, in the mean."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            step()
    return counter.get_total_flops() // steps


def lines(figures: dict) -> list[measure.Line]:
    """The table's lines."""
    sizes = {
        name: f"{name}, {each['parameters'] / 1e6:.3g}M parameters, {each['precision']}"
        for name, each in figures.items()
    }
    return [measure.Line.of_images("training", sizes[name], each) for name, each in figures.items()]


def main() -> None:
    """Measure all presets."""
    parser = measure.arguments(__doc__)
    measure.add_device(parser)
    parser.add_argument("--preset", nargs="+", metavar="NAME", help="default: digits, or the published sizes on CUDA")
    parser.add_argument("--rounds", type=int, default=9, help="turns; the median is reported (default: 9)")
    arguments = parser.parse_args()
    device = measure.device_of(arguments.device)
    presets = arguments.preset or (PUBLISHED if device.type == "cuda" else ["digits"])
    figures = {name: measured(name, device, arguments.rounds) for name in presets}
    measure.report("training", figures, arguments)


if __name__ == "__main__":
    main()
