"""Read cached latents, one row per image, from HDF5 shards.

A row holds the moments of two posteriors, of the image and of its mirror image; latents are drawn from them later
(ear.tokenizer.posterior). A shard {train,val}-IIIII-of-NNNNN.h5 has two datasets: `moments`, float16 [n, 2, 2C, h, w]
(axis 1: the image, its mirror image; axis 2: means, then log-variances), and `labels`, int32 [n]. It has two
attributes: `format`, and `tokenizer`, which is the SHA-256 of the tokenizer's file. stats.json, in the same folder,
holds classes, shape and statistics of the latents, and of every shard the number of rows, the size and the SHA-256.
`ear.latents.caching` writes all of them.

`moments` are contiguous and not compressed: they are memory-mapped at their offset in the file, without HDF5,
which would copy every row and whose open files do not survive a fork.
"""

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
from ear.files.reading import reading
from ear.latents.statistics import Statistics

FORMAT = "ear-latents-1"
STATS = "stats.json"


@dataclass(frozen=True)
class _Stored:
    """Location of the moments of one shard."""

    path: Path
    offset: int  # of the moments in the file, in bytes
    shape: tuple[int, ...]  # [n, 2, 2C, h, w]

    def map(self) -> np.ndarray:
        """The moments as a read-only memory map, float16 [n, 2, 2C, h, w]."""
        # numpy.memmap would keep a file descriptor open per shard, and ImageNet's 1251 shards exceed the usual limit of
        # 1024; torch.from_file closes it.
        size = self.path.stat().st_size
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        view = np.ndarray(self.shape, "<f2", buffer=content, offset=self.offset)
        view.flags.writeable = False
        return view


class LatentStore:
    """The latents of one split, in stored order.

    split: "train" or "val". Attributes: `shape`, (C, h, w) of a latent; `labels`, int64 [N]; `classes`, class names,
    indexed by label; `statistics`, of the training split for either split; `tokenizer`, the SHA-256 of the tokenizer's
    file. A store can be pickled, without its maps, which are opened again at the first read, or inherited by a fork.

    Raises MissingFileError if stats.json or a shard is missing, UserError if stats.json has another format or a shard
    is not what it says.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        stats = read_json(folder / STATS)
        if stats.get("format") != FORMAT:
            raise UserError(
                f"{folder / STATS} has format {stats.get('format')!r}, but must have {FORMAT!r}; "
                "run the cache stage again."
            )
        self.shape: tuple[int, int, int] = tuple(stats["shape"])
        self.classes: tuple[str, ...] = tuple(stats["classes"])
        self.statistics = Statistics(**stats["statistics"])
        self.tokenizer: str = stats["tokenizer"]
        opened = [_open(folder / entry["file"], entry, stats) for entry in stats["shards"][split]]
        self.labels = np.concatenate([labels for _, labels in opened])
        self._stored = [stored for stored, _ in opened]
        self._rows = Rows([stored.shape[0] for stored in self._stored])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # pickling a map would copy the complete file

    def rows(self, indices: Sequence[int] | Tensor, mirrored: Sequence[bool] | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Moments and labels of the given rows, in the given order: (float16 [n, 2C, h, w], int64 [n]).

        indices: row numbers 0 .. N - 1. mirrored: for each of them, whether to return the mirror image's moments.
        Raises IndexError for any other row number, negative ones included.
        """
        wanted, sides = np.asarray(indices, dtype=np.int64), np.asarray(mirrored, dtype=np.int64)
        channels, height, width = self.shape
        out = np.empty((len(wanted), 2 * channels, height, width), np.float16)
        for shard, places, rows in self._rows.locate(wanted):
            out[places] = self._map(shard)[rows, sides[places]]  # [k, 2C, h, w]
        return out, self.labels[wanted]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = self._stored[shard].map()
        return self._maps[shard]


def _open(path: Path, entry: dict, stats: dict) -> tuple[_Stored, np.ndarray]:
    """Hold a shard's size, attributes and shapes against stats.json => (location of its moments, its labels as int64).

    entry: its item in stats["shards"][split]. Digests are checked by the stage that reads the shard (ear.lineage): at
    every start, they would take too long.
    """
    channels, height, width = stats["shape"]
    expected = (entry["rows"], 2, 2 * channels, height, width)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the cache stage again.")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, but must have {entry['bytes']}; run the cache stage again."
        )
    with reading(path, "shard of latents", "run the cache stage again"), h5py.File(path, "r", locking=False) as file:
        _check_attributes(path, file.attrs, stats)
        moments, labels = file["moments"], file["labels"][:].astype(np.int64)
        if moments.shape != expected or moments.dtype != np.float16 or len(labels) != entry["rows"]:
            raise UserError(
                f"{path} holds moments {moments.dtype} {moments.shape} and {len(labels)} labels, not float16 "
                f"{expected} and {entry['rows']} labels; run the cache stage again."
            )
        return _Stored(path, moments.id.get_offset(), moments.shape), labels


def _check_attributes(path: Path, attributes, stats: dict) -> None:
    """Raise UserError unless the shard has this format and was made with the tokenizer that stats.json names."""
    for name, expected in (("format", FORMAT), ("tokenizer", stats["tokenizer"])):
        found = attributes.get(name)
        if found != expected:
            raise UserError(f"{path} has {name} {found!r}, but stats.json has {expected!r}; run the cache stage again.")
