"""The training loop of every network in the pipeline; model, loss and data are passed in.

Progress is counted in images. A killed run resumes from its newest checkpoint when it is started again. With the same
world size, it ends with the bytes of an uninterrupted run on CPUs, and equals it up to rounding on GPUs: data order,
masks and noise are functions of (seed, images seen). A step consists of the same micro-batches at any world size. Every
rank holds the same weights, EMAs and optimiser moments, or its shard of them.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ear.config.checks import check_shares
from ear.display.live import Live
from ear.display.progress import Progress
from ear.errors import UserError
from ear.files.tensors import read_tensors
from ear.runtime import distributed
from ear.runtime.device import device_name
from ear.runtime.sharding import is_sharded, whole
from ear.training import checkpoint
from ear.training.ema import Average
from ear.training.gradients import SharedGradients
from ear.training.means import Means
from ear.training.optimizer import set_rate
from ear.training.speed import Speed
from ear.training.stopping import stop_signals

Network = TypeVar("Network", bound=nn.Module)
LOG_STEPS = 25  # steps between log rows; reading the loss makes the host wait for the device, so it is done rarely


@dataclass
class History:
    """Rows of the two logs, in the order of images seen.

    training: images, loss, gradient_norm, further figures of the loss (means since the row before), rate (learning rate
    of the first group). validation: images, and what `Validation.measure` returned.
    """

    training: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where checkpoints are written, and how often, in images; the newest two are kept."""

    folder: Path
    interval: int
    about: Mapping | None = None  # stored in them, so that they can be loaded without a trainer
    kept: Path | None = None  # a second folder, for those that stay
    keep_interval: int = 0  # 0: none


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured while a network trains, and how often."""

    measure: Callable[[], dict[str, float]]  # the same on every rank
    interval: int  # in images; 0: only at the end


class Trainer(Generic[Network]):
    """Trains a network; holds its weights, EMAs, optimiser, progress and log.

    `loss(micro_batch, position)` returns the mean loss of a micro-batch and a dict of further means to log; `position`
    is the number of its first image, counted from the start of the run. `rate(images)` returns the factor by which the
    base learning rates are multiplied after that many images.

    Attributes: `images`, seen so far in this run; `history`; `averages`, the EMAs by name.

    Raises UserError if the ranks cannot share the micro-batches of a step evenly.
    """

    def __init__(
        self,
        module: Network,
        *,
        optimizer: torch.optim.Optimizer,  # of ear.training.optimizer, with base rates
        loss: Callable[[object, int], tuple[Tensor, dict[str, Tensor]]],
        rate: Callable[[int], float],
        averages: Mapping[str, Average[Network]],  # EMAs of the module by name; the first one is to be published
        clip_norm: float,
        global_batch_size: int,  # images per optimiser step
        micro_batch_size: int,  # images per forward pass of one rank
        earlier_images: int = 0,  # seen by earlier phases; counted for the warm-up of the EMAs only
    ):
        check_shares(global_batch_size, micro_batch_size, distributed.size())
        self.module, self.optimizer, self.loss, self.rate = module, optimizer, loss, rate
        self.averages, self.clip_norm = dict(averages), clip_norm
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.earlier_images = earlier_images
        self.images = 0
        self.history = History()
        self._means = Means()
        self._gradients = SharedGradients(module.parameters())
        self._writer = checkpoint.Writer()
        self._live = Live()
        device = next(module.parameters()).device
        self._speed = Speed(device)
        # Set to 1 by the first non-finite gradient and never reset: the fused optimiser then skips all updates,
        # and the host need not wait. `_broken_at` is the image at which that step began, -1 without one.
        self._broken = torch.zeros((), device=device)
        self._broken_at = torch.full((), -1, dtype=torch.int64, device=device)

    @property
    def average(self) -> Average[Network]:
        """The first EMA, the one whose weights are published."""
        return next(iter(self.averages.values()))

    def fit(
        self,
        batches: Callable[[Iterator[int]], Iterable],  # endless positions => a micro-batch for each; may read ahead
        *,
        total_images: int,
        saving: Saving,
        validation: Validation | None = None,
        check: Callable[[], None] | None = None,  # called after each log row; raises to stop the run
        live: Live | None = None,  # shows the training while it runs
        title: str = "training",
    ) -> None:
        """Train until `total_images` (rounded up to full steps) have been seen, starting from the newest checkpoint.

        The last checkpoint is written before the closing log row and validation, so a longer training that resumes from
        it ends in the same bytes as one that never stopped.
        Raises UserError if a gradient is not finite: the weights stop changing at that step, and the error is raised at
        the next log row or checkpoint. If any rank receives SIGTERM, SIGINT or SIGHUP before the last step, writes a
        checkpoint, then raises InterruptedError.
        """
        self.resume(saving.folder)
        self._begin_live(live or Live(), title, total_images)
        with (
            stop_signals() as asked,
            contextlib.closing(self._live),
            Progress(title, total_images, start=self.images) as progress,
            contextlib.closing(self._stream(batches)) as stream,
            self._saved(),
        ):
            while self.images < total_images:
                before = self.images
                self.step(stream)
                if self._means.steps == LOG_STEPS:
                    self.log()
                    if check:
                        check()
                if validation and _crossed(before, self.images, validation.interval):
                    self._validate(validation, progress)
                last, stop = self.images >= total_images, asked()
                self._save_if_due(before, saving, now=last or bool(stop))
                progress.advance(self.images - before, note=self._note())
                if stop and not last:
                    self.finish_saving()
                    distributed.barrier()  # a launcher soon kills the others once one has ended
                    raise InterruptedError(
                        f"{title} was stopped by {stop} after {self.images} images, with a checkpoint; run it again to "
                        "resume."
                    )
            self._finish(validation, progress)

    def _begin_live(self, live: Live, title: str, total_images: int) -> None:
        logged = (rows[-1]["images"] if rows else 0 for rows in (self.history.training, self.history.validation))
        self._live = live
        live.begin(self.images, self._facts(title, total_images), (next(logged), next(logged)))
        self._speed.begin(self.images)

    def _save_if_due(self, before: int, saving: Saving, *, now: bool) -> None:
        """Begin a checkpoint if the step from `before` images has crossed an interval, or `now`."""
        self._writer.check()
        keep = _crossed(before, self.images, saving.keep_interval)
        if now or keep or _crossed(before, self.images, saving.interval):
            self.save(saving, keep=keep)

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Leave the block only when its checkpoints are on disk."""
        try:
            yield
        finally:
            self.finish_saving()

    def _finish(self, validation: Validation | None, progress: Progress) -> None:
        """Log the steps since the last row, if any; validate, unless that has just been done."""
        if self._means.steps:
            self.log()
        if validation and not (self.history.validation and self.history.validation[-1]["images"] == self.images):
            self._validate(validation, progress)

    def _validate(self, validation: Validation, progress: Progress) -> None:
        figures = validation.measure()
        row = {"images": self.images, **figures}
        self.history.validation.append(row)
        self._live.validation(row)
        progress.say(f"held out, after {self.images} images: {', '.join(f'{n} {v:.4g}' for n, v in figures.items())}")

    def _facts(self, title: str, total_images: int) -> dict:
        """What a reader of the live rows wants to know of this training."""
        return {
            "title": title,
            "total_images": total_images,
            "global_batch_size": self.global_batch_size,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "world_size": distributed.size(),
            "device": device_name(self._broken.device),
        }

    def _own(self, start: int) -> Sequence[int]:
        """Positions of this rank's micro-batches in the step that begins at image `start`."""
        return distributed.own_slice(range(start, start + self.global_batch_size, self.micro_batch_size))

    def _stream(self, batches: Callable[[Iterator[int]], Iterable]) -> Generator:
        """The micro-batches of this rank, as a generator.

        Closing it ends the workers that read ahead, which would otherwise keep the process alive.
        """
        yield from batches(self._positions())

    def _positions(self) -> Iterator[int]:
        """Endless positions of this rank's micro-batches, from the current image on, as `step` counts them."""
        for start in itertools.count(self.images, self.global_batch_size):
            yield from self._own(start)

    def step(self, micro_batches: Iterator) -> None:
        """One optimiser step on the next micro-batches of this rank's stream. All ranks must call it together."""
        self.module.train()
        self._gradients.clear()
        set_rate(self.optimizer, self.rate(self.images))
        *earlier, last = self._own(self.images)
        for position in earlier:
            self._backward(self._next(micro_batches), position)
        micro_batch = self._next(micro_batches)
        with self._gradients.summed():  # over ranks, once per step, while the last backward pass still runs
            self._backward(micro_batch, last)
        norm = whole(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm, foreach=True))
        # Before clipping. Every rank has the norm of the summed gradients already, and `Means` sums over ranks.
        self._means.add({"gradient_norm": norm}, 1.0 / distributed.size())
        self._means.steps += 1
        self._guard(norm)
        self.optimizer.step()
        steps = (self.earlier_images + self.images) // self.global_batch_size
        for average in self.averages.values():
            average.update(self.module, steps)
        self.images += self.global_batch_size

    def _next(self, micro_batches: Iterator):
        with self._speed.waiting():
            return next(micro_batches)

    def _backward(self, micro_batch, position: int) -> None:
        """Forward and backward pass; the gradient is weighted by the micro-batch's share of the global batch."""
        share = self.micro_batch_size / self.global_batch_size
        loss, figures = self.loss(micro_batch, position)
        (loss * share).backward()
        self._means.add({"loss": loss, **figures}, share)

    def _guard(self, norm: Tensor) -> None:
        """From the first non-finite gradient norm on, make the optimiser skip every update.

        The run then stops with intact weights. The norm is taken after summing over ranks, so all ranks decide alike.
        """
        broken = ~torch.isfinite(norm)
        first = broken & (self._broken_at < 0)
        self._broken_at = torch.where(first, torch.full_like(self._broken_at, self.images), self._broken_at)
        self._broken = torch.maximum(self._broken, broken.float())
        # How torch.amp.GradScaler tells a fused optimiser, on the device, to skip an update.
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _check_finite(self) -> None:
        """Raise UserError if a gradient was not finite so far; waits for the device."""
        at = int(self._broken_at)
        if at >= 0:
            raise UserError(
                f"a gradient became infinite or NaN in the step that starts at image {at}; the weights have not been "
                "updated since. Lower the learning rate or check the data; the last checkpoint is intact."
            )

    def log(self) -> None:
        """Append a row with the means since the last row; raises UserError if a gradient was not finite."""
        self._check_finite()
        # The last step's rate, computed: in a run that resumes at the end, the optimiser still holds the base rate.
        rate = self.optimizer.param_groups[0]["base"] * self.rate(self.images - self.global_batch_size)
        row = {"images": self.images, **self._means.read(), "rate": rate}
        self.history.training.append(row)
        self._live.training(row | self._speed.read(self.images))

    def _note(self) -> str:
        return f"loss {self.history.training[-1]['loss']:.4f}" if self.history.training else ""

    def _modules(self) -> dict[str, nn.Module]:
        weights: dict[str, nn.Module] = {"weights": self.module}
        return weights | {name: average.module for name, average in self.averages.items()}

    def state(self) -> dict[str, Tensor]:
        """Weights, EMAs and optimiser moments by name; `save` adds the sums that are not logged yet."""
        return checkpoint.pack(self._modules(), self.optimizer)

    def restore(self, tensors: dict[str, Tensor], *, images: int) -> None:
        """Load what `state` returned. `images`: seen by then; only at 0 may optimiser moments be absent.

        Raises UserError if it belongs to another model or lacks the moments of the optimiser.
        """
        if images and not any(name.startswith("optimizer.") for name in tensors):
            raise UserError("the training state has no optimizer.* tensors; use an earlier checkpoint, or start again.")
        checkpoint.unpack(tensors, self._modules(), self.optimizer)

    def save(self, saving: Saving, *, keep: bool = False) -> None:
        """Begin to write a checkpoint that any world size can resume from; all ranks must call it together.

        keep: write it to `saving.kept`, too. It is complete once `finish_saving` or the next `save` returns.
        """
        self._check_finite()
        sums, means = self._means.state()
        description = {
            "images": self.images,
            "training": [*self.history.training],  # a copy: training adds rows while this is written
            "validation": [*self.history.validation],
            "means": means,
            "about": dict(saving.about or {}),
        }
        kept = saving.kept if keep else None
        self._writer.save(saving.folder, self.images, {**self.state(), "sums": sums}, description, kept)

    def finish_saving(self) -> None:
        """Wait until the checkpoint of the last `save` is on disk; raises the error that has stopped it."""
        self._writer.finish()

    def resume(self, folder: Path) -> None:
        """Load the newest checkpoint in `folder`, if there is one."""
        path = distributed.from_main(lambda: checkpoint.newest(folder))
        if path is not None:
            tensors, description = read_tensors(path)
            self.restore(tensors, images=description["images"])
            self._means.restore(tensors["sums"].to(self._broken.device), description["means"])
            self.images = description["images"]
            self.history = History(description["training"], description["validation"])
            if distributed.is_main():
                print(f"resuming after {self.images} images", flush=True)
        for module in self._modules().values():  # initial weights may differ in rounding between machines
            weights = module.state_dict().values()
            if not is_sharded(weights):
                distributed.copy_from_main(weights)


def _crossed(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]; never if the interval is 0."""
    return interval > 0 and before // interval != after // interval
