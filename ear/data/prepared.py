"""Read prepared images (decoded, cropped, labelled), row by row, from HDF5 shards.

A shard {train,val}-IIIII-of-NNNNN.h5 holds `images`, uint8 [n, S, S, 3], or links to them (ear.data.linked), and
`labels`, int32 [n]; its attributes are `format` and `image_size`. `ear.data.preparation` writes them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ear.data.linked import Links
from ear.errors import MissingFileError, UserError
from ear.files.hdf5 import Rows
from ear.files.json_files import read_json
from ear.files.reading import reading, require_format

FORMAT = "ear-prepared-1"
_THREADS = 16  # shards read at once


@dataclass(frozen=True)
class _Stored:
    """Location of the images of one shard."""

    path: Path
    offset: int | None  # of the first image in the file; None if images are compressed

    def read(self, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """out[places[k]] = image rows[k], for all k."""
        if self.offset is None:
            remedy = "run `ear verify --repair`, then `dvc repro`"
            with reading(self.path, "HDF5 file", remedy), h5py.File(self.path, "r", locking=False) as file:
                images = file["images"]
                for row, place in zip(rows, places, strict=True):  # ten times faster than h5py's index lists
                    out[place] = images[row]
            return
        size = out[0].nbytes
        with self.path.open("rb", buffering=0) as file:
            for row, place in zip(rows, places, strict=True):
                file.seek(self.offset + int(row) * size)
                if file.readinto(out[place]) != size:
                    raise UserError(f"{self.path} ends before image {row}; run the prepare stage again.")


class PreparedImages:
    """The images of one split, in stored order.

    Attributes: `labels`, int64 [N]; `classes`, class names by label; `image_size`, the side S in pixels. Images are
    read on demand and no file stays open, so an object can be pickled, forked and used by several threads.

    Raises MissingFileError if the folder or a shard is missing, UserError if a shard is damaged or of another format.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        self.classes: tuple[str, ...] = tuple(read_json(folder / "classes.json")["classes"])
        repository = folder.resolve().parents[1]
        opened = [_open(path, repository) for path in _shards(folder, split)]
        self._stored = [stored for stored, _, _ in opened]
        self.labels = np.concatenate([labels for _, labels, _ in opened])
        self.image_size = opened[0][2]
        self._rows = Rows([len(labels) for _, labels, _ in opened])
        if any(size != self.image_size for _, _, size in opened):
            raise UserError(f"the {split} shards of {folder} have several image sizes; run the prepare stage again.")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images of rows 0 .. N - 1 in the given order, uint8 [n, S, S, 3]; raises IndexError for other rows."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        parts = list(self._rows.locate(indices))
        if len(parts) < 2 or not isinstance(self._stored[0], Links):
            for shard, places, rows in parts:
                self._stored[shard].read(rows, places, out)
            return out
        with ThreadPoolExecutor(_THREADS) as pool:  # links are decoded: in a random batch, each shard has one image
            for _ in pool.map(lambda part: self._stored[part[0]].read(part[2], part[1], out), parts):
                pass
        return out

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (uint8 [n, S, S, 3], int64 [n]) in order; the last batch may be short."""
        for start in range(0, len(self), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self)))
            yield self.images(rows), self.labels[rows]


def _shards(folder: Path, split: str) -> list[Path]:
    """All shards of one split, in order."""
    paths = sorted(folder.glob(f"{split}-*-of-*.h5"), key=_number)
    if not paths:
        raise MissingFileError(f"{folder} has no {split} images ({split}-00000-of-*.h5); run the prepare stage.")
    count = int(paths[0].stem.rpartition("-")[2])
    expected = [folder / f"{split}-{k:05d}-of-{count:05d}.h5" for k in range(count)]
    if paths != expected:
        odd = sorted(set(paths) ^ set(expected))[0]
        raise MissingFileError(f"the {split} shards of {folder} are not complete: see {odd}; run prepare again.")
    return paths


def _number(path: Path) -> tuple[int, str]:
    """The shard's number, which has more than five digits from shard 100,000 on, and its name."""
    number = path.name.split("-")[1]
    return int(number) if number.isdecimal() else -1, path.name


def _open(path: Path, repository: Path) -> tuple[_Stored | Links, np.ndarray, int]:
    """(location of the images, their labels as int64, their side in pixels) of a shard."""
    with (
        reading(path, "shard of images", "run the prepare stage again"),
        h5py.File(path, "r", locking=False) as file,
    ):
        require_format(path, file.attrs.get("format"), FORMAT, "run the prepare stage again")
        labels, size = file["labels"][:].astype(np.int64), int(file.attrs["image_size"])
        if "images" not in file:
            return Links.read_from(file, labels, repository), labels, size
        images = file["images"]
        if images.shape != (len(labels), size, size, 3) or images.dtype != np.uint8:
            raise UserError(
                f"{path} holds images {images.dtype} {images.shape} and {len(labels)} labels, which do not belong "
                "together; run the prepare stage again."
            )
        return _Stored(path, images.id.get_offset()), labels, size
