"""Cached latents: posterior moments of every image and of its mirror image, read row by row from HDF5 shards.

A shard {train,val}-IIIII-of-NNNNN.h5 holds `moments`, float16 [n, 2, 2C, H, W] (plain and mirrored; see
`ear.posterior`), and `labels`, int32 [n]; its attributes are `format` and `tokenizer`, the SHA-256 of the tokenizer's
file. stats.json holds what is common to all: classes, shape, statistics, and rows, bytes and SHA-256 of every shard.
`ear.caching` writes them.
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
from ear.latents.statistics import Statistics

FORMAT = "ear-latents-1"
STATS = "stats.json"


@dataclass(frozen=True)
class _Stored:
    """Where the moments of one shard lie."""

    path: Path
    offset: int  # of the moments' bytes in the file
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The moments as a read-only view of the file's pages."""
        # numpy.memmap would keep a descriptor open per shard; ImageNet's 1251 shards exceed the usual limit of 1024.
        size = self.path.stat().st_size
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        view = np.ndarray(self.shape, "<f2", buffer=content, offset=self.offset)
        view.flags.writeable = False
        return view


class LatentStore:
    """The latents of one split, in stored order.

    shape: (C, H, W) of a latent. labels: int64 [N]. classes: names by label. statistics: of the training split,
    whatever split this is. tokenizer: SHA-256 of the tokenizer's file. An object can be pickled and forked: every
    process maps the files for itself when it first reads.

    Raises FileNotFoundError where a file is missing; ValueError where one is of another format, size or tokenizer
    than stats.json says.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        stats = read_json(folder / STATS)
        if stats.get("format") != FORMAT:
            raise UserError(f"{folder / STATS} has format {stats.get('format')!r}, not {FORMAT!r}; run cache again.")
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
        return self.__dict__ | {"_maps": {}}  # a pickled map would be a copy of its whole file

    def rows(self, indices: Sequence[int] | Tensor, mirrored: Sequence[bool] | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows 0 .. N - 1, in any order, and which of the two images => (float16 [n, 2C, H, W], int64 [n] labels).

        Raises IndexError beyond the rows.
        """
        indices, mirrored = np.asarray(indices, dtype=np.int64), np.asarray(mirrored, dtype=np.int64)
        channels, height, width = self.shape
        out = np.empty((len(indices), 2 * channels, height, width), np.float16)
        for shard, places, rows in self._rows.locate(indices):
            out[places] = self._map(shard)[rows, mirrored[places]]
        return out, self.labels[indices]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = self._stored[shard].map()
        return self._maps[shard]


def _open(path: Path, entry: dict, stats: dict) -> tuple[_Stored, np.ndarray]:
    """(where the moments lie, the labels as int64) of a shard that is what stats.json says."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the cache stage again.")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}; run the cache stage again.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_attributes(path, file.attrs, stats)
            moments, labels = file["moments"], file["labels"][:].astype(np.int64)
            channels, height, width = stats["shape"]
            expected = (entry["rows"], 2, 2 * channels, height, width)
            if moments.shape != expected or moments.dtype != np.float16 or len(labels) != entry["rows"]:
                raise UserError(
                    f"{path} holds moments {moments.dtype} {moments.shape} and {len(labels)} labels, not float16 "
                    f"{expected}; run the cache stage again."
                )
            return _Stored(path, moments.id.get_offset(), moments.shape), labels
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a readable HDF5 file of latents ({error}); run cache again.") from error


def _check_attributes(path: Path, attributes, stats: dict) -> None:
    for name, expected in (("format", FORMAT), ("tokenizer", stats["tokenizer"])):
        found = attributes.get(name)
        if found != expected:
            raise UserError(
                f"{path} has {name} {found!r}, but stats.json belongs to {expected!r}; run the cache stage again."
            )
