"""scikit-learn's handwritten digits, written as a tree of class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from ear.data.sources.listing import held_out
from ear.files.atomic import whole_file


def write_digits(folder: str | Path, *, val_fraction: float) -> None:
    """Write the 1797 digits as folder/{train,val}/{0..9}/NNNN.png.

    8 x 8 pixels of 8-bit grey; scikit-learn's values 0..16 become 0..255, rounded. NNNN is the index in scikit-learn's
    set. `val_fraction` of each class is held out.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    for label in range(10):
        names = {f"{label}/{k:04d}.png": k for k in np.flatnonzero(source.target == label)}
        chosen = held_out(list(names), val_fraction)
        for name, k in names.items():
            with whole_file(Path(folder, "val" if name in chosen else "train", name)) as partial:
                Image.fromarray(pixels[k]).save(partial, format="png")
