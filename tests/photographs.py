"""A class-folder tree of real pictures: crops of the photographs that scikit-image and scikit-learn bring along."""

from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

_SKIMAGE = Path(skimage.__file__).parent / "data"
_SKLEARN = Path(sklearn.__file__).parent / "datasets/images"
PHOTOGRAPHS = {
    "astronaut": _SKIMAGE / "astronaut.png",
    "cat": _SKIMAGE / "chelsea.png",
    "coffee": _SKIMAGE / "coffee.png",
    "flower": _SKLEARN / "flower.jpg",
    "motorcycle": _SKIMAGE / "motorcycle_left.png",
    "rocket": _SKIMAGE / "rocket.jpg",
    "stars": _SKIMAGE / "hubble_deep_field.jpg",
    "temple": _SKLEARN / "china.jpg",
}


def write_class_folders(root: Path, *, each: int, classes: int = len(PHOTOGRAPHS), least_side: int = 64) -> Path:
    """`each` JPEG files per class: rectangles at random places, from `least_side` to three times as large."""
    for name, photograph in list(PHOTOGRAPHS.items())[:classes]:
        random = np.random.default_rng(len(name))
        (root / name).mkdir(parents=True)
        with Image.open(photograph) as image:
            picture = image.convert("RGB")
        for number in range(each):
            sides = [int(random.integers(least_side, min(3 * least_side, side) + 1)) for side in picture.size]
            x, y = (int(random.integers(whole - side + 1)) for whole, side in zip(picture.size, sides, strict=True))
            crop = picture.crop((x, y, x + sides[0], y + sides[1]))
            crop.save(root / name / f"{number:04d}.jpg", quality=92)
    return root
