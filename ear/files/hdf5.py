"""HDF5 shards: data sets written around HDF5, and rows found in several files."""

from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np


def fixed_place() -> h5py.h5p.PropDCID:
    """Creation properties of a contiguous data set that has its place in the file before any value is written.

    The values are then written at that offset by plain file writes: HDF5 crashes the process if the disk is full.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return properties


class Rows:
    """The rows of several shards, numbered through: shard k holds `counts[k]` of them."""

    def __init__(self, counts: Sequence[int]):
        self._ends = np.cumsum(counts)
        self._starts = self._ends - np.asarray(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, indices: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """int64 [n] row numbers => for each shard that has some: (shard, places in `indices`, rows within the shard).

        Raises IndexError for a number outside 0 .. len - 1.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"rows {indices.min()}..{indices.max()} are outside 0..{len(self) - 1}")
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            yield int(shard), places, indices[places] - self._starts[shard]
