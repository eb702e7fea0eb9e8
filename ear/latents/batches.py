"""Micro-batches of cached latents in training order, read ahead by worker processes."""

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ear.latents.store import LatentStore
from ear.runtime import randomness
from ear.runtime.randomness import DataOrder


class _MicroBatches(Dataset[tuple[Tensor, Tensor, int]]):
    """Image position => the micro-batch that starts at it."""

    def __init__(self, store: LatentStore, order: DataOrder, size: int, mirror: bool, seed: int):
        self.store, self.order, self.size, self.mirror, self.seed = store, order, size, mirror, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        indices = self.order.indices(position, self.size)
        mirrored = [self.mirror and is_mirrored(self.seed, position + k) for k in range(self.size)]
        moments, labels = self.store.rows(indices, mirrored)
        return torch.from_numpy(moments), torch.from_numpy(labels), position


def is_mirrored(seed: int, position: int) -> bool:
    """Whether the image at `position` of the training is mirrored: a fair coin, a function of (seed, position)."""
    return bool(randomness.derive(seed, "mirror", position) & 1)


def latent_batches(
    store: LatentStore,
    *,
    order: DataOrder,
    positions: Iterator[int],  # where micro-batches start, counted in images from the start of training
    micro_batch_size: int,
    mirror: bool,  # mirror each image with probability 1/2
    seed: int,  # of mirroring
    workers: int,  # processes that read ahead; 0: read in this process. The batches are the same
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each position, yield (moments float16 [B, 2C, H, W], labels int64 [B], position).

    Close the iterator to end its workers.
    """
    dataset = _MicroBatches(store, order, micro_batch_size, mirror, seed)
    if workers == 0:
        yield from map(dataset.__getitem__, positions)
        return
    loader = DataLoader(
        dataset, sampler=positions, batch_size=None, num_workers=workers, worker_init_fn=_outlast_signals
    )
    yield from loader


@contextlib.contextmanager
def dead_readers_named() -> Iterator[None]:
    """Raise ChildProcessError with a remedy if a worker of `latent_batches` is killed.

    PyTorch raises from a signal handler, in whatever code runs at that moment.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            "a process that loads latents died, perhaps out of memory; the last checkpoint is intact: run again, with "
            "a lower runtime.workers if it happens again."
        ) from error


def _outlast_signals(_) -> None:
    """Ignore signals to all processes in a worker: the training still needs it while it saves its state."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
