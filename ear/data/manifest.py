"""The list of all raw images. The fetch stage writes it; later stages read it instead of walking a tree or an archive.

manifest.csv has one line per image: split, class number, class name, path, size in bytes and, if the bytes are not at
the path itself, the file that holds them and the offset in it (members of archives). source.json has what all images
share.
"""

import contextlib
import csv
import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from ear.data.images import Encoding
from ear.display.progress import Progress
from ear.errors import MissingFileError, UserError
from ear.files.atomic import naming, whole_file
from ear.files.json_files import read_json, write_json
from ear.files.reading import reading, require_format
from ear.files.tables import csv_writer

FORMAT = "ear-raw-3"
_MOST_BYTES = 1 << 30  # of an encoded image; the limit on pixels allows no larger one
_COLUMNS = ["split", "label", "class", "path", "bytes", "file", "offset"]
_SURROGATES: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


class ListedImage(NamedTuple):
    """One image of a source, before classes are numbered."""

    split: str  # train or val
    class_name: str
    path: str  # with slashes; the same in every layout of a data set, so that prepared images are the same
    file: str  # that holds the bytes, relative to the source's root
    offset: int | None = None  # of the bytes in an archive; None if the file is the image
    bytes: int | None = None  # size of the image; None if not known yet


class Row(NamedTuple):
    """One image of a manifest: `ListedImage` with its class number, and always with a size."""

    split: str
    label: int
    path: str
    bytes: int
    file: str
    offset: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All images of a source: `classes[label]` is a class name, `root / row.file` the file that holds the bytes."""

    root: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]  # human-readable class names; equal to `classes` if the source has none
    encoding: Encoding  # of the bytes of each image
    archives: Mapping[str, int]  # file => size in bytes
    rows: list[Row]

    def split(self, name: str) -> list[Row]:
        """The rows of one split, "train" or "val"."""
        return [row for row in self.rows if row.split == name]


class Contents(contextlib.ExitStack):
    """Reads the bytes of listed images; archives stay open until the end of the `with` block."""

    def __init__(self, root: str | Path):
        super().__init__()
        self._root = Path(root)
        self._archives: dict[str, FileIO] = {}

    def read(self, image: ListedImage | Row) -> bytes:
        """All bytes of a file or archive member; fewer than listed if the archive was truncated since.

        Raises OSError; UserError for an image of more than 1 GiB, before reading it.
        """
        path = self._root / image.file
        with naming(path):
            if image.offset is None:
                with _open_plain(path) as file:
                    count = os.fstat(file.fileno()).st_size
                    _check_size(count)
                    return file.read(count)
            assert image.bytes is not None
            _check_size(image.bytes)
            if image.file not in self._archives:
                self._archives[image.file] = self.enter_context(path.open("rb", buffering=0))
            return os.pread(self._archives[image.file].fileno(), image.bytes, image.offset)


def _open_plain(path: Path) -> FileIO:
    """Open a file for reading; raises UserError for a pipe, a device or a folder, which could block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("is not a plain file")
    return FileIO(descriptor)


def _check_size(count: int) -> None:
    if count > _MOST_BYTES:
        raise UserError(f"has {count} bytes, but must have at most {_MOST_BYTES}")


def write_manifest(
    folder: str | Path,
    found: Sequence[ListedImage],
    *,
    tree: str | Path,  # folder of the files now
    root: str | Path,  # their folder when the manifest is read; relative to the repository's root
    names: Mapping[str, str],  # class => human-readable name, if known
    encoding: Encoding,
    classes: Sequence[str] = (),  # to be written instead of the sorted class names, in their order
) -> Manifest:
    """Write manifest.csv and source.json into `folder`.

    Labels number the sorted class names, whatever they are written as. File sizes are recorded to notice images that
    changed since: reading sizes is cheap, digests would mean reading every image. Raises OSError if a file cannot be
    stat'ed.
    """
    folder, classes, rows = Path(folder), tuple(classes) or _classes(found), _rows(found, tree)
    packed = sorted({image.file for image in found if image.offset is not None})
    archives = {file: os.path.getsize(f"{tree}/{file}") for file in packed}
    write_rows(folder / "manifest.csv", rows, classes)
    facts = {"root": str(root), "encoding": dataclasses.asdict(encoding), "archives": archives}
    named = {name: names[name] for name in classes if name in names}
    write_json(folder / "source.json", {"format": FORMAT, **facts, "names": named})
    return Manifest(Path(root), classes, tuple(names.get(name, name) for name in classes), encoding, archives, rows)


def _classes(found: Sequence[ListedImage]) -> tuple[str, ...]:
    return tuple(sorted({image.class_name for image in found}))


def _rows(found: Sequence[ListedImage], tree: str | Path) -> list[Row]:
    """The images with class numbers and sizes; `tree` is the folder of the files now."""
    labels = {name: label for label, name in enumerate(_classes(found))}
    sizes = iter(_sizes([f"{tree}/{image.file}" for image in found if image.bytes is None]))
    return [
        Row(i.split, labels[i.class_name], i.path, next(sizes) if i.bytes is None else i.bytes, i.file, i.offset)
        for i in found
    ]


def changes(manifest: Manifest, found: Sequence[ListedImage], tree: str | Path) -> str:
    """How the images found now in `tree` differ from those listed, such as `2 new, 1 removed`; empty if they do not.

    An image counts as changed if its size, split, class or place in an archive differs; no image is read.
    """
    before, now = ({row.path: row for row in rows} for rows in (manifest.rows, _rows(found, tree)))
    counts = {
        "new": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(before[path] != now[path] for path in before.keys() & now.keys()),
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def write_rows(path: Path, rows: Sequence[Row], classes: Sequence[str] = ()) -> None:
    """Write rows as CSV, complete or not at all; class names stay empty if not given."""
    with whole_file(path) as partial, partial.open("w", newline="", **_SURROGATES) as file:
        writer = csv_writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(_line(row, classes) for row in rows)


def _line(row: Row, classes: Sequence[str]) -> tuple:
    file = "" if row.file == row.path else row.file  # saves space: the same text a million times
    return row.split, row.label, classes[row.label] if classes else "", row.path, row.bytes, file, row.offset


def read_rows(path: Path) -> list[Row]:
    """Rows of a file written by `write_rows`; raises UserError for other columns."""
    return [row for row, _ in _read_lines(path)]


def _read_lines(path: Path) -> Iterator[tuple[Row, str]]:
    """Yield each row with its class name; raises UserError if the file is damaged."""
    with reading(path, "list of images", "run fetch again"), path.open(newline="", **_SURROGATES) as file:
        lines = csv.reader(file)
        if next(lines, None) != _COLUMNS:
            raise UserError(f"{path} does not start with the columns {','.join(_COLUMNS)}; run fetch again.")
        for split, label, name, image, size, place, offset in lines:
            yield Row(split, int(label), image, int(size), place or image, int(offset) if offset else None), name


def _sizes(paths: list[str], together: int = 1000) -> list[int]:
    """Sizes of files in bytes; in threads, since network file systems answer slowly."""
    sizes: list[int] = []
    groups = [paths[k : k + together] for k in range(0, len(paths), together)]
    with ThreadPoolExecutor(8) as pool, Progress("listing", len(paths)) as progress:
        for group in pool.map(lambda group: [os.path.getsize(path) for path in group], groups):
            sizes += group
            progress.advance(len(group))
    return sizes


def read_manifest(folder: str | Path) -> Manifest:
    """Read what `write_manifest` wrote; raises MissingFileError or UserError naming the file."""
    source = read_json(Path(folder, "source.json"))
    path = Path(folder, "manifest.csv")
    require_format(folder, source.get("format"), FORMAT, "run the fetch stage again")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro fetch`).")
    by_label, rows = {}, []
    for row, name in _read_lines(path):
        rows.append(row)
        by_label[row.label] = name
    if not rows:
        raise UserError(f"{path} lists no image; run fetch again.")
    classes = tuple(by_label[label] for label in sorted(by_label))
    with reading(Path(folder, "source.json"), "description of images", "run fetch again"):
        names = tuple(source["names"].get(name, name) for name in classes)
        encoding = Encoding.of(source["encoding"])
        return Manifest(Path(source["root"]), classes, names, encoding, source["archives"], rows)
