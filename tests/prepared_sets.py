"""Small sets of prepared images, written with plain h5py."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from ear.files.digests import sha256
from ear.files.json_files import write_json


def pixels(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """Random uint8 images [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_prepared(folder: Path, images: np.ndarray, lengths: Sequence[int], val: int) -> Path:
    """data/prepared: training shards of the given lengths, the last `val` images held out; labels are row % 3."""
    size, labels = images.shape[1], np.arange(len(images), dtype=np.int32) % 3
    assert sum(lengths) + val == len(images)
    folder.mkdir(parents=True, exist_ok=True)
    index, start = {"train": [], "val": []}, 0
    parts = [("train", k, len(lengths), n) for k, n in enumerate(lengths)] + [("val", 0, 1, val)]
    for split, number, count, length in parts:
        path = folder / f"{split}-{number:05d}-of-{count:05d}.h5"
        with h5py.File(path, "w") as file:
            file["images"], file["labels"] = images[start : start + length], labels[start : start + length]
            file.attrs.update({"format": "ear-prepared-1", "image_size": size})
        index[split].append({"file": path.name, "rows": length, "sha256": sha256(path)})
        start += length
    write_json(folder / "classes.json", {"classes": ["a", "b", "c"]})
    write_json(folder / "index.json", {"format": "ear-prepared-1", "image_size": size, "shards": index})
    return folder
