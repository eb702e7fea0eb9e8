"""The list of all raw images, written once by fetch: no later stage walks a tree or an archive again.

manifest.csv has one line per image: its split, its class and the class's number, its path, its size, and where its
bytes lie if that is not the path itself: a file, and for a member of an archive the offset in it. source.json says
where the paths start, and what holds for all images.
"""

import contextlib
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ear.display.progress import Progress
from ear.errors import MissingFileError, UserError
from ear.files.atomic import whole_file
from ear.files.json_files import read_json, write_json

FORMAT = "ear-raw-2"
_MOST_BYTES = 1 << 30  # of an encoded image: more than the limit on its pixels leaves room for
_COLUMNS = ["split", "label", "class", "path", "bytes", "file", "offset"]
_SURROGATES = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


class Found(NamedTuple):
    """One image of a source."""

    split: str  # train or val
    class_name: str
    path: str  # with slashes; the same in every layout of a data set, so that its prepared images are the same too
    file: str  # where its bytes lie, relative to the source's root
    offset: int | None = None  # of its bytes in an archive; None where the file is the image
    bytes: int | None = None  # None where nobody has asked yet


class Row(NamedTuple):
    """One image of a manifest: as `Found`, with the class's number and always with the size in bytes."""

    split: str
    label: int
    path: str
    bytes: int
    file: str
    offset: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All images of a source; `classes[label]` is a class's name, `root / row.file` where an image's bytes are."""

    root: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]  # of the classes, for people; the same as `classes` where the source has no others
    upright: bool  # whether to rotate as a camera's EXIF entry says
    archives: Mapping[str, int]  # size in bytes of every archive
    rows: list[Row]

    def split(self, name: str) -> list[Row]:
        """The rows of one split, "train" or "val"."""
        return [row for row in self.rows if row.split == name]


class Contents(contextlib.ExitStack):
    """Reads the bytes of listed images; archives stay open until the end of the `with` block."""

    def __init__(self, root: str | Path):
        super().__init__()
        self._root, self._archives = Path(root), {}

    def read(self, image: Found | Row) -> bytes:
        """All bytes of a file, or those of a member: fewer than listed where the archive has become shorter.

        Raises OSError; ValueError for an image of more than 1 GiB, before it is read.
        """
        if image.offset is None:
            with (self._root / image.file).open("rb") as file:
                _check_size(os.fstat(file.fileno()).st_size)
                return file.read()
        _check_size(image.bytes)
        if image.file not in self._archives:
            self._archives[image.file] = self.enter_context((self._root / image.file).open("rb", buffering=0))
        return os.pread(self._archives[image.file].fileno(), image.bytes, image.offset)


def _check_size(count: int) -> None:
    if count > _MOST_BYTES:
        raise UserError(f"has {count} bytes, and {_MOST_BYTES} are allowed")


def write_manifest(
    folder: str | Path,
    found: Sequence[Found],
    *,
    tree: str | Path,  # where the files lie now
    root: str | Path,  # where they lie when the manifest is read; relative ones start at the repository's root
    names: Mapping[str, str],  # human names of classes, where known
    upright: bool,
) -> Manifest:
    """Write manifest.csv and source.json into `folder`.

    A file's size is there to notice that a user's images changed since they were listed: reading sizes is cheap, where
    digests would mean reading every image. Labels count the sorted class names. Raises OSError for a file that cannot
    be stat'ed.
    """
    folder, classes = Path(folder), tuple(sorted({image.class_name for image in found}))
    labels = {name: label for label, name in enumerate(classes)}
    sizes = iter(_sizes([f"{tree}/{image.file}" for image in found if image.bytes is None]))
    rows = [
        Row(i.split, labels[i.class_name], i.path, next(sizes) if i.bytes is None else i.bytes, i.file, i.offset)
        for i in found
    ]
    packed = sorted({image.file for image in found if image.offset is not None})
    archives = {file: os.path.getsize(f"{tree}/{file}") for file in packed}
    write_rows(folder / "manifest.csv", rows, classes)
    facts = {"root": str(root), "upright": upright, "archives": archives}
    named = {name: names[name] for name in classes if name in names}
    write_json(folder / "source.json", {"format": FORMAT, **facts, "names": named})
    return Manifest(Path(root), classes, tuple(names.get(name, name) for name in classes), upright, archives, rows)


def write_rows(path: Path, rows: Sequence[Row], classes: Sequence[str] = ()) -> None:
    """Write rows as CSV, whole or not at all; class names stay empty if not given."""
    with whole_file(path) as partial, partial.open("w", newline="", **_SURROGATES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(_line(row, classes) for row in rows)


def _line(row: Row, classes: Sequence[str]) -> tuple:
    file = "" if row.file == row.path else row.file  # saves space: the same text a million times
    return row.split, row.label, classes[row.label] if classes else "", row.path, row.bytes, file, row.offset


def read_rows(path: Path) -> list[Row]:
    """Rows of a file written by `write_rows`; raises UserError for other columns."""
    return [row for row, _ in _read_lines(path)]


def _read_lines(path: Path) -> Iterator[tuple[Row, str]]:
    """Yield each row with its class name."""
    with path.open(newline="", **_SURROGATES) as file:
        lines = csv.reader(file)
        if next(lines, None) != _COLUMNS:
            raise UserError(f"{path} does not start with the columns {','.join(_COLUMNS)}; run fetch again.")
        for split, label, name, image, size, place, offset in lines:
            yield Row(split, int(label), image, int(size), place or image, int(offset) if offset else None), name


def _sizes(paths: list[str], together: int = 1000) -> list[int]:
    """Sizes of files in bytes; in threads, because a network file system answers each question slowly."""
    sizes: list[int] = []
    groups = [paths[k : k + together] for k in range(0, len(paths), together)]
    with ThreadPoolExecutor(8) as pool, Progress("listing", len(paths)) as progress:
        for group in pool.map(lambda group: [os.path.getsize(path) for path in group], groups):
            sizes += group
            progress.advance(len(group))
    return sizes


def read_manifest(folder: str | Path) -> Manifest:
    """Read what `write_manifest` wrote; raises FileNotFoundError or ValueError naming the file."""
    source = read_json(Path(folder, "source.json"))
    path = Path(folder, "manifest.csv")
    if source.get("format") != FORMAT:
        raise UserError(f"{folder} has format {source.get('format')!r}, not {FORMAT!r}; run fetch again.")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro fetch`).")
    by_label, rows = {}, []
    for row, name in _read_lines(path):
        rows.append(row)
        by_label[row.label] = name
    classes = tuple(by_label[label] for label in sorted(by_label))
    names = tuple(source["names"].get(name, name) for name in classes)
    return Manifest(Path(source["root"]), classes, names, source["upright"], source["archives"], rows)
