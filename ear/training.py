"""One training loop for every network of the pipeline: the loss, the data and the model are handed in.

Progress is counted in images. A run that is killed and started again continues from its newest checkpoint and ends in
the same bytes: data order, masks and noise are functions of (seed, images seen).
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ear import checkpoint
from ear.ema import Average, decay_at
from ear.optimizer import set_rate
from ear.progress import Progress
from ear.records import whole_file

_LOG_STEPS = 25  # steps between readings of the loss; each reading waits for the device


@dataclass
class History:
    """Rows of the training and validation logs, in the order of images seen."""

    training: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Rows with the same keys, in one order => a tab-separated file that `dvc plots` draws; six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(rows[0] if rows else ["images"])
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())


class Trainer:
    """A module with its average, its optimiser, its progress and its log.

    loss(micro_batch, position) gives the mean loss of a micro-batch that starts at image `position`, and further means
    to log; `rate` maps images seen to a factor of the base rates; `validate()` gives figures of the present weights.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[object, int], tuple[Tensor, dict[str, Tensor]]],
        rate: Callable[[int], float],
        ema_decay: float,
        clip_norm: float,
        global_batch_size: int,  # images per optimiser step
        micro_batch_size: int,  # images per forward pass
        average: Average | None = None,
        earlier_images: int = 0,  # seen in earlier phases; the average's warm-up counts them
    ):
        assert global_batch_size % micro_batch_size == 0
        self.module, self.optimizer, self.loss, self.rate = module, optimizer, loss, rate
        self.ema_decay, self.clip_norm = ema_decay, clip_norm
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.average = average or Average(module)
        self.earlier_images = earlier_images
        self.images = 0
        self.history = History()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        device = next(module.parameters()).device
        # The fused optimiser skips its update where this flag is 1: the device decides, without waiting for the host.
        self._broken = torch.zeros((), device=device)
        self._broken_at = torch.full((), -1, dtype=torch.int64, device=device)

    def fit(
        self,
        batches: Callable[[int], Iterable],  # position => the micro-batches from there on
        *,
        total_images: int,
        folder: Path,  # for checkpoints
        checkpoint_images: int,
        validate: Callable[[], dict[str, float]] | None = None,
        validate_images: int = 0,
        title: str = "training",
    ) -> None:
        """Train until `total_images` (rounded up to whole steps) have been seen, from the newest checkpoint on.

        Raises ValueError, before any harm to the weights, where a loss or a gradient is not finite.
        """
        self.resume(folder)
        stream = iter(batches(self.images))
        with Progress(title, total_images, start=self.images) as progress:
            while self.images < total_images:
                before = self.images
                self.step([next(stream) for _ in range(self.global_batch_size // self.micro_batch_size)])
                last = self.images >= total_images
                if last or self._steps == _LOG_STEPS:
                    self.log()
                if validate and (last or _crossed(before, self.images, validate_images)):
                    self.history.validation.append({"images": self.images, **validate()})
                if last or _crossed(before, self.images, checkpoint_images):
                    self.save(folder)
                progress.advance(self.images - before, note=self._note())

    def step(self, micro_batches: list) -> None:
        """One optimiser step on a global batch."""
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        set_rate(self.optimizer, self.rate(self.images))
        share = 1.0 / len(micro_batches)
        for number, batch in enumerate(micro_batches):
            loss, figures = self.loss(batch, self.images + number * self.micro_batch_size)
            (loss * share).backward()
            self._accumulate({"loss": loss.detach(), **figures}, share)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm, foreach=True)
        self._accumulate({"gradient_norm": norm}, 1.0)
        self._steps += 1
        self._guard(norm)
        self.optimizer.step()
        steps = (self.earlier_images + self.images) // self.global_batch_size
        self.average.update(self.module, decay_at(steps, self.ema_decay))
        self.images += self.global_batch_size

    def _guard(self, norm: Tensor) -> None:
        """Have the optimiser skip a non-finite update, and remember where the first one was."""
        broken = ~torch.isfinite(norm)
        first = broken & (self._broken_at < 0)
        self._broken_at = torch.where(first, torch.full_like(self._broken_at, self.images), self._broken_at)
        self._broken = torch.maximum(self._broken, broken.float())
        self.optimizer.found_inf = self._broken
        self.optimizer.grad_scale = None

    def _accumulate(self, figures: dict[str, Tensor], share: float) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * share

    def log(self) -> None:
        """Read the means since the last reading; raises ValueError where an update was not finite."""
        at = int(self._broken_at)
        if at >= 0:
            raise ValueError(
                f"the loss or its gradient became infinite or NaN in the step from image {at}, and no update was made "
                "since; lower the learning rate or look at the data, the last checkpoint is intact."
            )
        means = {name: float(total) / self._steps for name, total in self._sums.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.training.append({"images": self.images, **means, "rate": rate})
        self._sums, self._steps = {}, 0

    def _note(self) -> str:
        return f"loss {self.history.training[-1]['loss']:.4f}" if self.history.training else ""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, description) from which training goes on."""
        if self._steps:
            self.log()
        description = {
            "images": self.images,
            "training": self.history.training,
            "validation": self.history.validation,
        }
        return checkpoint.pack(self.module, self.average.module, self.optimizer), description

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        tensors, description = self.state()
        checkpoint.save(folder, self.images, tensors, description)

    def resume(self, folder: Path) -> None:
        """Continue from the newest checkpoint in `folder`, if there is one."""
        found = checkpoint.newest(folder)
        if found is None:
            return
        tensors, description = found
        checkpoint.unpack(tensors, self.module, self.average.module, self.optimizer)
        self.images = description["images"]
        self.history = History(description["training"], description["validation"])
        print(f"continuing after {self.images} images", flush=True)


def _crossed(before: int, after: int, interval: int) -> bool:
    return interval > 0 and before // interval != after // interval
