"""Draw docs/inpainting.png: python -m examples.inpaint

Each row shows one held-out image of data/prepared: the image, its known part, three completions with its own class, and
one with another class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import ear
from ear.data.pictures import grid, save_png
from ear.data.prepared import PreparedImages

_GREY = 128
_ROWS = 8


def main() -> None:
    """Read the pipeline's data folder, edit, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m examples.inpaint", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the pipeline's folder (default: data)")
    parser.add_argument("--output", type=Path, default=Path("docs/inpainting.png"), help="the picture to write")
    arguments = parser.parse_args()
    try:
        save_png(arguments.output, picture(arguments.data))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"inpaint: {error}")
    print(f"wrote {arguments.output}")


def picture(data: Path) -> np.ndarray:
    """uint8 [height, width, 3]; a row per class, at most 8."""
    held_out = PreparedImages(data / "prepared", "val")
    rows = first_of_each_class(held_out.labels)[:_ROWS]
    images, labels = held_out.images(rows), held_out.labels[rows]
    mask = lower_half(images)
    options = {"data": data, "steps": 8, "guidance": 1.5}
    columns = [images, np.where(mask[..., None], _GREY, images).astype(np.uint8)]
    columns += [ear.inpaint(images, mask, labels.tolist(), seed=seed, **options) for seed in range(3)]
    other = (labels + 1) % len(held_out.classes)
    columns.append(ear.inpaint(images, mask, other.tolist(), seed=0, **options))
    return grid(np.stack(columns, axis=1).reshape(-1, *images.shape[1:]), columns=len(columns))


def first_of_each_class(labels: np.ndarray) -> np.ndarray:
    """The row of the first image of each class."""
    return np.unique(labels, return_index=True)[1]


def lower_half(images: np.ndarray) -> np.ndarray:
    """bool [N, H, W], true in the lower half."""
    mask = np.zeros(images.shape[:3], dtype=bool)
    mask[:, images.shape[1] // 2 :] = True
    return mask


if __name__ == "__main__":
    main()
