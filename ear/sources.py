"""Where raw images come from: a tree of class folders, or scikit-learn's digits written as one; and its manifest.

The manifest lists every image once, so that no later stage walks the tree again. All choices (what is held out, in
which order images are listed) are functions of names alone, never of the file system's order or of a random state.
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ear import records
from ear.progress import Progress

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
FORMAT = "ear-raw-1"
_COLUMNS = ["split", "label", "class", "path", "bytes"]
_SURROGATES = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


class Found(NamedTuple):
    """One image of a tree: its split (train or val), its class, its path relative to the tree's root, with slashes."""

    split: str
    class_name: str
    path: str


class Row(NamedTuple):
    """One image of a manifest: as `Found`, with the class's number and the file's size."""

    split: str
    label: int
    path: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All images of a source; `classes[label]` is a class's name, `root / row.path` an image's file."""

    root: Path
    classes: tuple[str, ...]
    rows: list[Row]

    def split(self, name: str) -> list[Row]:
        """The rows of one split, "train" or "val"."""
        return [row for row in self.rows if row.split == name]


def write_digits(folder: str | Path, *, val_fraction: float) -> None:
    """Write scikit-learn's 1797 handwritten digits as folder/{train,val}/{0..9}/NNNN.png.

    8 x 8 pixels of 8-bit grey; the source's 0..16 become 0..255, rounded. NNNN is the digit's place in the source.
    Of each class `val_fraction` is held out, as `scan` does.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    for label in range(10):
        names = {f"{label}/{k:04d}.png": k for k in np.flatnonzero(source.target == label)}
        held_out = _held_out(list(names), val_fraction)
        for name, k in names.items():
            path = Path(folder, "val" if name in held_out else "train", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[k]).save(path)


def scan(folder: str | Path, *, val_fraction: float) -> list[Found]:
    """List the images of a tree of class folders, by split, class and path.

    The tree is folder/train/CLASS/** with folder/val/CLASS/** or without, or folder/CLASS/** alone: a folder named
    train always means the first. Images are files named as `EXTENSIONS` in any case; other files and whatever starts
    with a dot are passed over; links to folders are followed. Without val, `val_fraction` of each class is held out:
    at least one image, but never the last, chosen by the digests of the paths.

    No file is opened or stat'ed. Raises ValueError naming the folder: it does not exist, has no class folders, images
    outside of them or a class folder without images; val has a class that train lacks; nothing could be held out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; set data.path to the folder that holds your class folders.")
    train, val = (root / name for name in ("train", "val"))
    if not train.is_dir():
        for name in ("val", "valid", "validation"):
            if (root / name).is_dir():
                raise ValueError(f"{root} has {name} but no train; name the folder of training images train.")
        return _hold_out(_classes(root, ""), val_fraction)
    if not val.is_dir():
        for name in ("valid", "validation"):
            if (root / name).is_dir():
                raise ValueError(f"{root} has {name} but no val; rename it to val.")
        return _hold_out(_classes(root, "train/"), val_fraction)
    known, held_out = _classes(root, "train/"), _classes(root, "val/")
    if unknown := sorted(held_out.keys() - known.keys()):
        raise ValueError(f"{val} has class {unknown[0]!r}, which {train} lacks; the two must have the same classes.")
    return _listed("train", known) + _listed("val", held_out)


def _listed(split: str, classes: dict[str, list[str]]) -> list[Found]:
    return [Found(split, name, path) for name, paths in classes.items() for path in paths]


def _hold_out(classes: dict[str, list[str]], fraction: float) -> list[Found]:
    """Split every class in two."""
    held_out = {path for paths in classes.values() for path in _held_out(paths, fraction)}
    if not held_out:
        raise ValueError("every class has a single image, so none can be held out; add images, or a folder val.")
    parts = {
        split: {name: [path for path in paths if (path in held_out) == kept] for name, paths in classes.items()}
        for split, kept in (("train", False), ("val", True))
    }
    return _listed("train", parts["train"]) + _listed("val", parts["val"])


def _held_out(paths: list[str], fraction: float) -> set[str]:
    """The images of one class to hold out: those with the least digests."""
    count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    return set(sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())[:count])


def _classes(root: Path, prefix: str) -> dict[str, list[str]]:
    """Sorted paths by class name, in the order of the names; `prefix` is the split's folder or nothing."""
    folder = root / prefix
    names, loose = _entries(folder)
    if loose:
        raise ValueError(
            f"{folder} holds {len(loose)} images outside of class folders, such as {loose[0]}; move each into the "
            "folder of its class."
        )
    if not names:
        raise ValueError(f"{folder} has no class folders; put the images of each class into a folder of its name.")
    classes = {name: sorted(_walk(root, prefix + name)) for name in names}
    empty = [name for name, paths in classes.items() if not paths]
    if len(empty) == len(classes):
        raise ValueError(f"there are no images ({', '.join(EXTENSIONS)}) in the class folders of {folder}.")
    if empty:
        raise ValueError(
            f"class folder {folder / empty[0]} has no images ({', '.join(EXTENSIONS)}); fill it or remove it."
        )
    return classes


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the images in one folder."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _walk(root: Path, relative: str, above: frozenset = frozenset()) -> list[str]:
    """Paths, relative to `root`, of all images under one folder; `above` identifies the folders it lies in."""
    folder = root / relative
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in; remove the link.")
    names, images = _entries(folder)
    paths = [f"{relative}/{name}" for name in images]
    for name in names:
        paths += _walk(root, f"{relative}/{name}", above | {identity})
    return paths


def write_manifest(folder: str | Path, found: Sequence[Found], *, tree: str | Path, root: str | Path) -> Manifest:
    """Write manifest.csv (split, label, class, path, bytes) and source.json (where the paths start) into `folder`.

    The images lie below `tree` now and below `root` when the manifest is read; `root` is recorded as given, and a
    relative one starts at the repository's root, where stages run. A file's size is there to notice that a user's
    images changed since they were listed: reading sizes is cheap, where digests would mean reading every image. Labels
    count the sorted class names. Raises OSError for a file that cannot be stat'ed.
    """
    folder, classes = Path(folder), tuple(sorted({image.class_name for image in found}))
    labels = {name: label for label, name in enumerate(classes)}
    sizes = _sizes([f"{tree}/{image.path}" for image in found])
    rows = [Row(i.split, labels[i.class_name], i.path, size) for i, size in zip(found, sizes, strict=True)]
    with records.whole_file(folder / "manifest.csv") as partial, partial.open("w", newline="", **_SURROGATES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((row.split, row.label, classes[row.label], row.path, row.bytes) for row in rows)
    records.write_json(folder / "source.json", {"format": FORMAT, "root": str(root)})
    return Manifest(Path(root), classes, rows)


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
    source = records.read_json(Path(folder, "source.json"))
    path = Path(folder, "manifest.csv")
    if source.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {source.get('format')!r}, not {FORMAT!r}; run fetch again.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the stage that writes it (`dvc repro fetch`).")
    classes, rows = {}, []
    with path.open(newline="", **_SURROGATES) as file:
        lines = csv.reader(file)
        if next(lines, None) != _COLUMNS:
            raise ValueError(f"{path} does not start with the columns {','.join(_COLUMNS)}; run fetch again.")
        for split, label, name, image, size in lines:
            rows.append(Row(split, int(label), image, int(size)))
            classes[int(label)] = name
    return Manifest(Path(source["root"]), tuple(classes[label] for label in sorted(classes)), rows)
