"""Images in arrays: the idx files of the MNIST family, plain or gzipped, or one npz file, such as MedMNIST's.

`find` reads labels and headers only. `unpack` copies the pixels once, uncompressed, so that later stages find each
image at an offset, as in ImageNet's archives.
"""

import gzip
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, cast

import numpy as np

from ear.data.manifest import ListedImage
from ear.data.sources.listing import Source, hold_out, in_order
from ear.display.progress import Progress
from ear.errors import UserError
from ear.files.atomic import naming, whole_file
from ear.files.disk import require_space

_BLOCK = 1 << 20  # bytes copied at a time
_IDX_PARTS = ("train", "t10k")
_NPZ_PARTS = ("train", "val", "test")
_IDX_UINT8 = 8  # code of the type in an idx header
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Array:
    """The images of one part of a data set."""

    part: str  # train, t10k, val or test; all but train are held out
    title: str  # of the file, for messages
    shape: tuple[int, ...]  # [N, H, W], or [N, H, W, C] with 1 or 3 channels
    labels: np.ndarray  # int64 [N]
    open: Callable[[], AbstractContextManager[IO[bytes]]]  # a stream of N x H x W x C bytes

    @property
    def file(self) -> str:
        """Name of the file that `unpack` writes."""
        return f"{self.part}.pixels"


def idx_files(root: Path) -> dict[str, Path]:
    """`train-images` and the like => the file of that name in a folder, for those of the four that exist."""
    found = {}
    for part in _IDX_PARTS:
        for kind, dimensions in (("images", 3), ("labels", 1)):
            names = (f"{part}-{kind}{mark}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for mark in "-.")
            if path := next((root / name for name in names if (root / name).is_file()), None):
                found[f"{part}-{kind}"] = path
    return found


def find_idx(root: Path, *, val_fraction: float) -> Source:
    """List the images of train-images-idx3-ubyte, train-labels-idx1-ubyte and, held out, of t10k-*; plain or .gz.

    Without t10k files, `val_fraction` of each class is held out. Raises UserError naming the file that is missing,
    damaged, or of another form.
    """
    files = idx_files(root)
    parts = [part for part in _IDX_PARTS if part == "train" or f"{part}-images" in files or f"{part}-labels" in files]
    for name in (f"{part}-{kind}" for part in parts for kind in ("images", "labels")):
        if name not in files:
            raise UserError(f"{root} lacks {name}-idx{3 if 'images' in name else 1}-ubyte, plain or .gz; put it there.")
    arrays = [_idx_array(part, files[f"{part}-images"], files[f"{part}-labels"]) for part in parts]
    return _source("idx files", "idx", root, arrays, val_fraction)


def _idx_array(part: str, images: Path, labels: Path) -> Array:
    with _idx(images, 3) as (_, shape):
        pass
    with _idx(labels, 1) as (stream, (count,)):
        values = _labels(stream, np.dtype(np.uint8), count, shape[0], str(labels))

    @contextmanager
    def pixels() -> Iterator[IO[bytes]]:
        with _idx(images, 3) as (stream, _):
            yield stream

    return Array(part, str(images), shape, values, pixels)


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _idx(path: Path, dimensions: int) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open an idx file of uint8 => (stream at the first value, shape)."""
    with _intact(str(path)), _opened(path) as stream:
        header = stream.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _IDX_UINT8, dimensions)):
            raise UserError(f"{path} is not an idx file of bytes in {dimensions} dimension(s); download it again.")
        yield stream, struct.unpack(f">{dimensions}I", header[4:])


def find_npz(path: Path, *, val_fraction: float) -> Source:
    """List the images of an npz file.

    Its keys are `images` (uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels) and `labels` (integers, [N] or [N, 1]);
    `val_images` and `val_labels`, `test_images` and `test_labels` are held out. MedMNIST's names `train_images` and
    `train_labels` work too. If the file has no held-out images, `val_fraction` of each class is held out. Raises
    UserError naming file and key.
    """
    with _intact(str(path)), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        arrays = []
        for part in _NPZ_PARTS:
            images, labels = _npz_keys(part, names, path)
            if images in names:
                arrays.append(_npz_array(part, path, archive, images, labels))
    return _source("arrays", "npz", path, arrays, val_fraction)


def _npz_keys(part: str, names: set[str], path: Path) -> tuple[str, str]:
    """Keys of the images and of the labels of one part; raises UserError if one or both of a needed pair are absent."""
    forms = [(f"{part}_images", f"{part}_labels")]
    if part == "train":
        forms.insert(0, ("images", "labels"))
    used = [form for form in forms if names & set(form)]
    if len(used) > 1:
        raise UserError(f"{path} has both {used[0][0]!r} and {used[1][0]!r}; keep one of them.")
    images, labels = used[0] if used else forms[0]
    if (used or part == "train") and not {images, labels} <= names:
        absent = images if images not in names else labels
        raise UserError(f"{path} has no array {absent!r}, only {', '.join(sorted(names)) or 'nothing'}; add it.")
    return images, labels


def _npz_array(part: str, path: Path, archive: zipfile.ZipFile, images: str, labels: str) -> Array:
    title = f"{path}: {images}"
    with archive.open(f"{images}.npy") as stream:
        shape, kind = _npy_header(stream, title)
    if kind != np.uint8:
        raise UserError(f"{title} is {kind}, but must be uint8 (0..255); convert it.")
    with archive.open(f"{labels}.npy") as stream:
        counts, kind = _npy_header(stream, f"{path}: {labels}")
        if kind.kind not in "iu" or counts[1:] not in ((), (1,)) or not counts:
            raise UserError(
                f"{path}: {labels} is {kind} {list(counts)}, but must be integers [N] or [N, 1]: one class per image."
            )
        values = _labels(stream, kind, counts[0], shape[0] if shape else 0, f"{path}: {labels}")

    @contextmanager
    def pixels() -> Iterator[IO[bytes]]:
        with _intact(title), zipfile.ZipFile(path) as opened, opened.open(f"{images}.npy") as stream:
            _npy_header(stream, title)
            yield stream

    return Array(part, title, shape, values, pixels)


def _npy_header(stream: IO[bytes], title: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an npy file => (shape, type of its values)."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in read:
        raise UserError(f"{title} is of npy version {version}; save it with numpy.savez.")
    shape, columns_first, kind = read[version](stream)
    if any(side < 0 for side in shape):
        raise UserError(f"{title} has the shape {list(shape)}, with a size below 0; save it again.")
    if kind.hasobject or (columns_first and len(shape) > 1):
        raise UserError(f"{title} holds objects or is in Fortran's order; save numpy.ascontiguousarray of it.")
    return shape, kind


def _labels(stream: IO[bytes], kind: np.dtype, count: int, images: int, title: str) -> np.ndarray:
    """Read int64 [N] labels; `count` is N in their own header, `images` is N in the header of the images."""
    if count != images:
        raise UserError(f"{title} has {count} labels for {images} images; give every image one.")
    content = stream.read(count * kind.itemsize + 1)  # one more byte, so that checksums at the end are compared
    if len(content) != count * kind.itemsize:
        what = "ends early" if len(content) < count * kind.itemsize else "continues after its last label"
        raise UserError(f"{title} {what}, judging by its header, [{count}]; save or download it again.")
    values = np.frombuffer(content, kind)
    if count and not 0 <= int(values.min()) <= int(values.max()) < _MOST_CLASSES:
        wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise UserError(f"{title} has label {wrong}, but labels must be 0 .. {_MOST_CLASSES - 1}; renumber them.")
    return values.astype(np.int64)


def _source(layout: str, kind: str, root: Path, arrays: list[Array], val_fraction: float) -> Source:
    """Check that the arrays fit each other, and list their images; parts other than `train` are held out."""
    for array in arrays:
        form = array.shape[1:]
        if len(form) not in (2, 3) or 0 in array.shape or form[2:] not in ((), (1,), (3,)):
            raise UserError(f"{array.title} is {list(array.shape)}, but must be [N, H, W] or [N, H, W, C], C 1 or 3.")
        if form != arrays[0].shape[1:]:
            raise UserError(
                f"{array.title} has images of {list(form)}, {arrays[0].title} of another shape; make them equal."
            )
    digits = len(str(max(int(array.labels.max()) for array in arrays)))
    images = [image for array in arrays for image in _listed(array, digits)]
    has_val = len(arrays) > 1
    if has_val:
        known = set(arrays[0].labels.tolist())
        for array in arrays[1:]:
            if unknown := sorted(set(array.labels.tolist()) - known):
                raise UserError(
                    f"{array.title} has class {unknown[0]}, which {arrays[0].title} lacks; remove its images."
                )
    listed = in_order(images) if has_val else hold_out(images, val_fraction)
    return Source(layout, kind, root, listed, has_val=has_val, arrays=tuple(arrays))


def _listed(array: Array, digits: int) -> Iterator[ListedImage]:
    """The images; classes are named by their labels with leading zeros, so that sorting keeps their order."""
    size = math.prod(array.shape[1:])
    split = "train" if array.part == "train" else "val"
    places = len(str(len(array.labels) - 1))
    for k, label in enumerate(array.labels.tolist()):
        name = f"{label:0{digits}}"
        yield ListedImage(split, name, f"{array.part}/{name}/{k:0{places}}", array.file, k * size, size)


def unpack(arrays: Sequence[Array], folder: Path) -> str:
    """Copy the pixels of each array to folder/PART.pixels => their SHA-256, all parts together.

    Raises UserError if the disk is too small, or the number of pixels is not the header's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(array.shape) for array in arrays)
    require_space(folder, needed, what="the pixels of the arrays", fix="free some space")
    digest = hashlib.sha256()
    with Progress("unpack", sum(len(array.labels) for array in arrays)) as progress:
        for array in arrays:
            _copy(array, folder / array.file, digest)
            progress.advance(len(array.labels))
    return digest.hexdigest()


def _read(array: Array, stream: IO[bytes], left: int) -> bytes:
    with naming(Path(array.title)):  # otherwise a read error would name the file being written
        return stream.read(min(_BLOCK, left))


def _copy(array: Array, target: Path, digest: Any) -> None:
    """Copy the pixels of one array to a file, and update the SHA-256 with them."""
    left = math.prod(array.shape)
    with array.open() as stream, whole_file(target) as partial, partial.open("wb") as file:
        while block := _read(array, stream, left + 1):  # one more byte, so that checksums at the end are compared
            left -= len(block)
            if left < 0:
                break
            file.write(block)
            digest.update(block)
        if left:
            what = f"ends {left} bytes early" if left > 0 else "continues after its last image"
            header = f"judging by its header, {list(array.shape)}"
            raise UserError(f"{array.title} {what}, {header}; save or download it again.")


@contextmanager
def _intact(title: str) -> Iterator[None]:
    """Raise UserError for the errors with which gzip, zipfile and numpy report damaged files."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{title} is damaged ({error}); save or download it again.") from error
        raise
    except (EOFError, zlib.error, zipfile.BadZipFile, ValueError, RuntimeError, TypeError, TokenError) as error:
        raise UserError(f"{title} is damaged ({error}); save or download it again.") from error
