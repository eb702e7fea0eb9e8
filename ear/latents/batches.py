"""Micro-batches of cached latents in training order, read ahead by threads."""

import collections
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch import Tensor

from ear.latents.store import LatentStore
from ear.runtime.randomness import Coins, DataOrder

_AHEAD = 2  # micro-batches per thread that are read or advised ahead
_COLD = 5e8  # bytes per second: memory is faster, a disk slower


def latent_batches(
    store: LatentStore,
    *,
    order: DataOrder,
    positions: Iterator[int],  # where micro-batches start, counted in images from the start of training
    micro_batch_size: int,
    mirror: bool,  # mirror each image with probability 1/2
    seed: int,  # of mirroring
    workers: int,  # threads that read ahead; 0: read when asked. The batches are the same
    pinned: bool = False,  # in page-locked memory
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each position, yield (moments float16 [B, 2C, H, W], labels int64 [B], position)."""
    coins = Coins(seed, "mirror")

    def wanted(position: int) -> tuple[Tensor, np.ndarray]:
        """Row numbers and whether to mirror each; called in one thread only, since `order` and `coins` have state."""
        indices = order.indices(position, micro_batch_size)
        mirrored = coins.at(position, micro_batch_size) if mirror else np.zeros(micro_batch_size, bool)
        return indices, mirrored

    if workers == 0:
        for position in positions:
            yield (*store.rows(*wanted(position), pinned=pinned), position)
        return
    cold = True  # rows come from a disk; asking the system for them ahead costs as much as copying them from memory

    def read(indices: Tensor, mirrored: np.ndarray) -> tuple[Tensor, Tensor]:
        nonlocal cold
        start = time.perf_counter()
        moments, labels = store.rows(indices, mirrored, pinned=pinned)
        cold = moments.nbytes < _COLD * (time.perf_counter() - start)
        return moments, labels

    pool = ThreadPoolExecutor(workers, thread_name_prefix="latents")
    ahead: collections.deque[tuple[Future, int]] = collections.deque()
    try:
        for position in positions:
            rows = wanted(position)
            if cold:
                store.advise(*rows)
            ahead.append((pool.submit(read, *rows), position))
            if len(ahead) > _AHEAD * workers:
                yield _next(ahead)
        while ahead:
            yield _next(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(ahead: collections.deque[tuple[Future, int]]) -> tuple[Tensor, Tensor, int]:
    future, position = ahead.popleft()
    return (*future.result(), position)
