"""HDF5 shards: data sets written around HDF5, and rows found in several files."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ear.files.atomic import naming

_PAGE, _LARGE = 4096, 65_536  # bytes: data sets of at least _LARGE begin at a page


def fixed_place() -> h5py.h5p.PropDCID:
    """Creation properties of a contiguous data set that has its place in the file before any value is written.

    The values are then written at that offset by plain file writes: HDF5 crashes the process if the disk is full.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return properties


def frame(name: str, shape: tuple[int, ...], dtype: Any, describe: Callable[[h5py.File], None]) -> bytes:
    """The start of an HDF5 file that ends with the contiguous data set `name`, whose values must follow.

    describe: adds attributes and small data sets. It is made in memory: HDF5 crashes the process if a disk is full.
    """
    content = io.BytesIO()
    # Whole pages, so that processes on several machines never write parts of the same one.
    with h5py.File(content, "w", alignment_threshold=_LARGE, alignment_interval=_PAGE) as file:
        describe(file)
        data = file.create_dataset(name, shape, dtype, dcpl=fixed_place())
        file.flush()
        offset = data.id.get_offset()
    if offset is None:  # no values
        return content.getvalue()
    assert len(content.getbuffer()) <= offset, "HDF5 put something behind the values"
    return content.getvalue().ljust(offset, b"\0")


def fill(path: str | Path, name: str, first: int, values: np.ndarray) -> None:
    """Store values [n, ...] as rows first .. first + n - 1 of a contiguous data set; on disk when this returns.

    Several processes may write different rows at the same time.
    """
    offset = row_offset(path, name, first, values)
    with naming(Path(path)), Path(path).open("r+b", buffering=0) as raw:
        raw.seek(offset)
        left = np.ascontiguousarray(values).data.cast("B")
        while left:  # a nearly full disk may take only a part
            left = left[raw.write(left) :]
        os.fsync(raw.fileno())


def row_offset(path: str | Path, name: str, first: int, rows: np.ndarray) -> int:
    """Byte offset in the file of row `first` of a contiguous data set that can hold `rows` [n, ...] from there on."""
    with h5py.File(path, "r", locking=False) as file:
        data = file[name]
        assert (rows.dtype, rows.shape[1:]) == (data.dtype, data.shape[1:])
        assert first + len(rows) <= len(data)
        return data.id.get_offset() + first * rows[0].nbytes


class Rows:
    """The rows of several shards, numbered consecutively; shard k holds `counts[k]` of them."""

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
