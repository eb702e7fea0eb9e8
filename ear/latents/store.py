"""Read cached latents, one row per image, from a few large HDF5 files.

A row holds the moments of two posteriors, of the image and of its mirror image; latents are drawn from them later
(ear.tokenizer.posterior). A file {train,val}-IIIII-of-NNNNN.h5 has two datasets: `moments`, float16 [n, 2, 2C, h, w]
(axis 1: the image, its mirror image; axis 2: means, then log-variances), and `labels`, int32 [n]. It has two
attributes: `format`, and `tokenizer`, which is the SHA-256 of the tokenizer's file. stats.json, in the same folder,
holds classes, shape and statistics of the latents, and of every file the number of rows, the size and the SHA-256.
`ear.latents.caching` writes all of them.

`moments` are contiguous and not compressed: they are memory-mapped at their offset in the file, without HDF5,
which would copy every row twice and lets one thread read at a time.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from ear.errors import MissingFileError, UserError
from ear.files.hdf5 import Rows
from ear.files.json_files import read_json
from ear.files.reading import reading, require_format
from ear.latents.statistics import Statistics

FORMAT = "ear-latents-1"
STATS = "stats.json"


@dataclass(frozen=True)
class _Stored:
    """Location of the moments of one file."""

    path: Path
    offset: int  # of the moments in the file, in bytes
    rows: int


class _Map:
    """The moments of one file in memory, [2 n, 2C h w] as bits: row 2k is image k, row 2k + 1 its mirror image."""

    def __init__(self, stored: _Stored, values: int):
        with stored.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._row, self._offset = 2 * values, stored.offset
        self.rows = np.frombuffer(self._map, np.uint16, 2 * stored.rows * values, stored.offset).reshape(-1, values)

    def close(self) -> None:
        """Unmap the file; nothing can be read afterwards."""
        del self.rows
        self._map.close()

    def advise(self, rows: np.ndarray) -> None:
        """Let the system read these rows ahead; otherwise a cold row takes a read of its own for each page."""
        for start in (self._offset + rows * self._row).tolist():
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + self._row - page)


class LatentStore:
    """The latents of one split, in stored order.

    split: "train" or "val". Attributes: `shape`, (C, h, w) of a latent; `labels`, int64 [N]; `classes`, class names,
    indexed by label; `statistics`, of the training split for either split; `tokenizer`, the SHA-256 of the tokenizer's
    file. Several threads may read at once; all files stay open.

    Raises MissingFileError if stats.json or a file is missing, UserError if stats.json has another format or a file
    is not what it says.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        stats = read_json(folder / STATS)
        require_format(folder / STATS, stats.get("format"), FORMAT, "run the cache stage again")
        self.shape: tuple[int, int, int] = tuple(stats["shape"])
        self.classes: tuple[str, ...] = tuple(stats["classes"])
        self.statistics = Statistics.from_dict(stats["statistics"])
        self.tokenizer: str = stats["tokenizer"]
        opened = [_open(folder / entry["file"], entry, stats) for entry in stats["shards"][split]]
        self.labels = np.concatenate([labels for _, labels in opened])
        channels, height, width = self.shape
        self._maps = [_Map(stored, 2 * channels * height * width) for stored, _ in opened]
        self._rows = Rows([stored.rows for stored, _ in opened])

    def __len__(self) -> int:
        return len(self.labels)

    def close(self) -> None:
        """Close all files; no row can be read afterwards."""
        for file in self._maps:
            file.close()

    def rows(
        self, indices: Sequence[int] | Tensor, mirrored: np.ndarray | None = None, *, pinned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Moments and labels of the given rows, in the given order: (float16 [n, 2C, h, w], int64 [n]).

        indices: row numbers 0 .. N - 1. mirrored: bool [n], which are to be mirror images' moments; default: none.
        pinned: return page-locked memory, which a GPU reads while the host computes.
        Raises IndexError for any other row number, negative ones included.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        sides = np.zeros(len(wanted), bool) if mirrored is None else mirrored
        channels, height, width = self.shape
        out = torch.empty((len(wanted), 2 * channels, height, width), dtype=torch.float16, pin_memory=pinned)
        bits = out.view(torch.uint16).numpy().reshape(len(wanted), 2 * channels * height * width)
        for file, places, rows in self._rows.locate(wanted):
            source = self._maps[file].rows
            if len(places) == len(wanted):
                np.take(source, 2 * rows + sides, axis=0, out=bits, mode="clip")  # other modes copy twice
            else:
                bits[places] = source[2 * rows + sides[places]]
        labels = torch.from_numpy(self.labels[wanted])
        return out, labels.pin_memory() if pinned else labels

    def advise(self, indices: Sequence[int] | Tensor, mirrored: np.ndarray) -> None:
        """Let the system read these rows from disk before `rows` needs them."""
        for file, places, rows in self._rows.locate(indices):
            self._maps[file].advise(2 * rows + mirrored[places])


def _open(path: Path, entry: dict, stats: dict) -> tuple[_Stored, np.ndarray]:
    """Check a file's size, attributes and shapes against stats.json => (location of its moments, labels as int64).

    entry: its item in stats["shards"][split]. Digests take too long to check at every start; the stage that reads the
    file checks them (ear.lineage).
    """
    channels, height, width = stats["shape"]
    expected = (entry["rows"], 2, 2 * channels, height, width)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the cache stage again.")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, but must have {entry['bytes']}; run the cache stage again."
        )
    with reading(path, "file of latents", "run the cache stage again"), h5py.File(path, "r", locking=False) as file:
        _check_attributes(path, file.attrs, stats)
        moments, labels = file["moments"], file["labels"][:].astype(np.int64)
        if moments.shape != expected or moments.dtype != np.float16 or len(labels) != entry["rows"]:
            raise UserError(
                f"{path} holds moments {moments.dtype} {moments.shape} and {len(labels)} labels, not float16 "
                f"{expected} and {entry['rows']} labels; run the cache stage again."
            )
        return _Stored(path, moments.id.get_offset(), len(moments)), labels


def _check_attributes(path: Path, attributes, stats: dict) -> None:
    """Raise UserError unless the file has this format and was made with the tokenizer that stats.json names."""
    for name, expected in (("format", FORMAT), ("tokenizer", stats["tokenizer"])):
        found = attributes.get(name)
        if found != expected:
            raise UserError(f"{path} has {name} {found!r}, but stats.json has {expected!r}; run the cache stage again.")
