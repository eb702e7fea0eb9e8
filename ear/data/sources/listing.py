"""What all layouts of raw images share: which files are images, their order, and which are held out.

All choices are functions of names only, never of the order of the file system or of a random state.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ear.data.manifest import ListedImage
from ear.errors import UserError

if TYPE_CHECKING:
    from ear.data.sources.arrays import Array

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Source:
    """The images found at a path."""

    layout: str  # its name, for people
    kind: str  # folder, idx or npz: data.source (imagenet is a folder, too)
    root: Path  # folder of the image files or idx files, or the npz file
    images: list[ListedImage]  # training images first, then by class and path
    names: Mapping[str, str] = field(default_factory=dict)  # wnid => human-readable name, if the source has them
    has_val: bool = True  # whether it has validation images; otherwise training images are held out
    arrays: tuple["Array", ...] = ()  # that hold the pixels, if there are no image files; to unpack before use

    @property
    def classes(self) -> list[str]:
        """Sorted class names: label k is classes[k]."""
        return sorted({image.class_name for image in self.images})


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image; names that start with a dot do not count."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def in_order(images: Iterable[ListedImage]) -> list[ListedImage]:
    """Sort: training images first, then by class and path. Raises UserError if two images have the same path."""
    ordered = sorted(images, key=lambda image: (image.split, image.class_name, image.path))
    for before, after in itertools.pairwise(ordered):
        if before.path == after.path:
            raise UserError(f"there are two images {after.path} ({after.file}); rename or remove one.")
    return ordered


def hold_out(images: Iterable[ListedImage], fraction: float) -> list[ListedImage]:
    """Move a share of the training images of every class to the val split: see `held_out`.

    Raises UserError if nothing can be held out.
    """
    by_class: dict[str, list[ListedImage]] = {}
    for image in images:
        by_class.setdefault(image.class_name, []).append(image)
    chosen = {path for part in by_class.values() for path in held_out([image.path for image in part], fraction)}
    if not chosen:
        raise UserError("every class has a single image, so none can be held out; add images, or held-out ones.")
    listed = (image for part in by_class.values() for image in part)
    return in_order(image._replace(split="val" if image.path in chosen else "train") for image in listed)


def held_out(paths: list[str], fraction: float) -> set[str]:
    """The images of one class to hold out: those with the smallest digests; at least one, but never all."""
    count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    return set(sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())[:count])
