"""Generated images: samples.h5, written batch by batch by any number of processes, read row by row.

The file holds `images`, uint8 [N, H, W, 3], `labels`, int32 [N], and `seed`; its attributes are `format` and
`sampling`, a JSON text with everything the images depend on.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ear.errors import MissingFileError, UserError
from ear.files.atomic import whole_file
from ear.files.hdf5 import fill, fixed_place
from ear.files.reading import reading, require_format

FORMAT = "ear-samples-1"
_HEADER = 1 << 20  # upper bound of the bytes besides images and labels


def create(
    path: str | Path,
    *,
    labels: Sequence[int],
    image_shape: tuple[int, int, int],  # H, W, 3
    sampling: dict,  # everything the images depend on; its `seed` also becomes a data set
) -> None:
    """Write a file of black images in its final size, so a full disk is noticed before anything is drawn.

    Raises OSError if it does not fit (HDF5 itself would crash the process).
    """
    shape = (len(labels), *image_shape)
    with (
        whole_file(path) as partial,
        partial.open("w+b") as raw,
        h5py.File(raw, "w", libver="latest") as file,
    ):
        _claim(raw, Path(path), int(np.prod(shape)) + 4 * len(labels) + _HEADER)
        file.attrs["format"] = FORMAT
        file.attrs["sampling"] = json.dumps(sampling, sort_keys=True)
        file["labels"] = np.asarray(labels, dtype="int32")
        file["seed"] = np.int64(sampling["seed"])
        file.create_dataset("images", shape, "uint8", dcpl=fixed_place())


def _claim(raw, path: Path, size: int) -> None:
    try:
        os.posix_fallocate(raw.fileno(), 0, size)
    except OSError as error:
        what = f"{size / 1e9:.3g} GB of images do not fit ({error.strerror}); free space or lower sample.count"
        raise OSError(error.errno, what, str(path)) from error


def write(path: str | Path, first: int, images: np.ndarray) -> None:
    """Store uint8 [n, H, W, 3] as images first .. first + n - 1 of a created file; on disk when this returns.

    Several processes may write different images at the same time.
    """
    fill(path, "images", first, images)


class GeneratedImages:
    """The images of a samples.h5, read on demand.

    Attributes: `labels`, int64 [N]; `image_size`, the side S in pixels; `sampling`, what the images depend on. Raises
    MissingFileError; UserError if the file has another format or is empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
        with self._opened() as file:
            self._describe(file)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[h5py.File]:
        remedy = "run the sample stage again"
        with reading(self.path, "file of samples", remedy), h5py.File(self.path, "r", locking=False) as file:
            yield file

    def _describe(self, file: h5py.File) -> None:
        require_format(self.path, file.attrs.get("format"), FORMAT, "run the sample stage again")
        images, self.labels = file["images"], file["labels"][:].astype(np.int64)
        side = images.shape[1] if images.ndim == 4 else 0
        if images.dtype != np.uint8 or images.shape != (len(self.labels), side, side, 3):
            raise UserError(
                f"{self.path} holds images {images.dtype} {list(images.shape)} and {len(self.labels)} labels, not "
                "uint8 [N, S, S, 3] and N labels; run the sample stage again."
            )
        if not len(images):
            raise UserError(f"{self.path} holds no images; raise sample.count and run the sample stage again.")
        self.image_size, self.sampling = side, json.loads(file.attrs["sampling"])

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3] of consecutive images."""
        with self._opened() as file:
            return file["images"][rows.start : rows.stop]

    def blocks(self, count: int) -> list["Block"]:
        """Split the images into `count` blocks of equal length; raises UserError if that does not divide them."""
        size, rest = divmod(len(self), count)
        if rest:
            raise UserError(
                f"evaluate.repeats is {count}, but must divide the {len(self)} images of {self.path}; set "
                f"sample.count to a multiple of it, such as {max(size, 1) * count}."
            )
        return [Block(self, range(start, start + size)) for start in range(0, len(self), size)]


class Block:
    """Consecutive images of a file, numbered from 0."""

    def __init__(self, source: GeneratedImages, rows: range):
        self._source, self._rows, self.labels = source, rows, source.labels[rows.start : rows.stop]

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3] of consecutive images."""
        return self._source.images(self._rows[rows.start : rows.stop])
