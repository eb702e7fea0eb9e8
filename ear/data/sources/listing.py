"""What all layouts of raw images share: which files are images, in which order they are listed, what is held out.

All choices are functions of names alone, never of the file system's order or of a random state.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ear.data.manifest import Found
from ear.errors import UserError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Source:
    """The images that a path holds."""

    layout: str  # in words
    root: Path  # where the files of the images start
    images: list[Found]  # training images first, then by class and path
    names: Mapping[str, str] = field(default_factory=dict)  # human names of classes, where the source has them
    has_val: bool = True  # validation images of its own; otherwise they were held out of the training images

    @property
    def classes(self) -> list[str]:
        """Sorted class names: label k is classes[k]."""
        return sorted({image.class_name for image in self.images})


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image; a dot in front hides it."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def in_order(images: Iterable[Found]) -> list[Found]:
    """Training images first, then by class and path. Raises ValueError where two images have one path."""
    ordered = sorted(images, key=lambda image: (image.split, image.class_name, image.path))
    for before, after in itertools.pairwise(ordered):
        if before.path == after.path:
            raise UserError(f"there are two images {after.path} ({after.file}); rename or remove one.")
    return ordered


def hold_out(images: Iterable[Found], fraction: float) -> list[Found]:
    """Turn a share of the training images of every class into held-out ones: see `held_out`.

    Raises ValueError where nothing can be held out.
    """
    by_class: dict[str, list[Found]] = {}
    for image in images:
        by_class.setdefault(image.class_name, []).append(image)
    chosen = {path for part in by_class.values() for path in held_out([image.path for image in part], fraction)}
    if not chosen:
        raise UserError("every class has a single image, so none can be held out; add images, or a folder val.")
    every = (image for part in by_class.values() for image in part)
    return in_order(image._replace(split="val" if image.path in chosen else "train") for image in every)


def held_out(paths: list[str], fraction: float) -> set[str]:
    """The images of one class to hold out: at least one, but never the last; those with the least digests."""
    count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    return set(sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())[:count])
