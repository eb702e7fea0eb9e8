"""Grids of images, magnified if they are small, written as reproducible PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from ear.errors import UserError
from ear.files.atomic import whole_file

_BACKGROUND = 255
_READABLE = 64  # pixels; smaller images are hard to see on a screen


def readable_scale(size: int) -> int:
    """Smallest whole magnification with which `size` pixels become at least 64."""
    return max(1, -(-_READABLE // size))


def magnify(images: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [N, H, W, 3] => [N, scale H, scale W, 3], with a bicubic filter (strokes stay readable, unlike squares)."""
    if scale == 1:
        return images
    size = (images.shape[2] * scale, images.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


def grid(images: np.ndarray, columns: int, scale: int | None = None, pad: int = 2) -> np.ndarray:
    """uint8 [N, H, W, 3] => one picture, uint8 [rows (scale H + pad) + pad, columns (scale W + pad) + pad, 3].

    Images are placed row by row on white, `pad` pixels apart, magnified by `scale` (default: `readable_scale`); the
    last row may be short. Raises UserError for no images or fewer than one column.
    """
    if not len(images) or columns < 1:
        raise UserError(f"a grid of {len(images)} images in {columns} columns is empty; give at least one of both.")
    cells = magnify(images, scale or readable_scale(min(images.shape[1:3])))
    rows = -(-len(cells) // columns)
    height, width = cells.shape[1] + pad, cells.shape[2] + pad
    picture = np.full((rows * height + pad, columns * width + pad, 3), _BACKGROUND, np.uint8)
    for k, cell in enumerate(cells):
        top, left = pad + k // columns * height, pad + k % columns * width
        picture[top : top + cells.shape[1], left : left + cells.shape[2]] = cell
    return picture


def pairs(originals: np.ndarray, others: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, 3] twice => a grid of pairs of rows, originals above the others."""
    starts = range(0, len(originals), columns)
    cells = np.concatenate([part[k : k + columns] for k in starts for part in (originals, others)])
    return grid(cells, columns)


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 [H, W, 3] (or grey [H, W]) as PNG, complete or not at all; equal pixels give equal bytes."""
    with whole_file(path) as partial:
        Image.fromarray(array).save(partial, format="PNG")
