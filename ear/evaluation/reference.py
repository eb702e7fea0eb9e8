"""The real images that generated ones are compared with: statistics of all of them, features of some.

N images, D features, K classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ear.errors import MissingFileError, UserError
from ear.evaluation.statistics import Gaussian, Moments, class_accuracy
from ear.files.digests import sha256
from ear.files.reading import reading
from ear.files.tensors import read_tensors, write_tensors

_DESCRIBED = ("name", "images", "statistics_sha256", "extractor_sha256", "image_size", "classes")
# Real images behind precision, recall, kernel distance and nearest training images, as in ADM's ImageNet reference.
REFERENCE_ROWS = 10_000


@dataclass(frozen=True)
class Reference:
    """What is kept of the real images: statistics of all, features of some, and a description."""

    gaussian: Gaussian
    features: Tensor  # float32 [rows, D], for all metrics that compare single images
    held_out: Gaussian  # of the held-out real images, for comparison with their reconstructions
    description: dict

    def save(self, path: str | Path) -> None:
        """Write tensors mu, sigma, features, held_out_mu and held_out_sigma, and the description."""
        held_out = {f"held_out_{name}": tensor for name, tensor in vars(self.held_out).items()}
        write_tensors(path, {**vars(self.gaussian), "features": self.features, **held_out}, self.description)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what `save` wrote; raises MissingFileError or UserError."""
        tensors, description = read_tensors(path)
        names = ("mu", "sigma", "features", "held_out_mu", "held_out_sigma")
        if tensors.keys() != set(names):
            raise UserError(f"{path} holds {sorted(tensors)}, not {', '.join(names)}; run the reference stage again.")
        if lacking := [key for key in _DESCRIBED if key not in description]:
            raise UserError(f"{path} does not say its {', '.join(lacking)}; run the reference stage again.")
        mu, sigma, features, *held_out = (tensors[name] for name in names)
        return cls(Gaussian(mu, sigma), features, Gaussian(*held_out), description)

    def check(self, what: str, *, extractor_sha256: str, image_size: int, classes: list[str]) -> None:
        """Raise UserError if the extractor, image size or classes differ; `what` names the images in the message."""
        ours = self.description
        if extractor_sha256 != ours["extractor_sha256"]:
            raise UserError(
                f"the reference features were made by extractor {ours['extractor_sha256'][:12]}, not by the present "
                f"one, {extractor_sha256[:12]}; run the reference stage again."
            )
        if image_size != ours["image_size"]:
            raise UserError(
                f"{what} have {image_size} pixels a side, but the reference images {ours['image_size']}; "
                "run the stages again from prepare on."
            )
        if classes != ours["classes"]:
            raise UserError(
                f"{what} have {len(classes)} classes ({', '.join(classes[:3])}, ...), but the reference "
                f"images {len(ours['classes'])} ({', '.join(ours['classes'][:3])}, ...); run the stages again from "
                "prepare on."
            )


@dataclass(frozen=True)
class Summary:
    """The result of one pass over a set of images."""

    gaussian: Gaussian  # of all images
    features: Tensor  # float32 [rows, D], of evenly spaced images
    accuracy: float  # share of images whose largest logit is at their label


def evenly(images: int, rows: int) -> Tensor:
    """Indices of `rows` evenly spaced images (all of them, if there are fewer), int64."""
    rows = min(rows, images)
    return torch.arange(rows) * images // rows


def summarise(batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, images: int, rows: int) -> Summary:
    """Summarise (features [n, D], logits [n, K], labels [n]) batches of all `images`; keep at most `rows` features."""
    chosen = evenly(images, rows)
    moments, kept, hits = Moments(), [], 0.0
    for features, logits, labels in batches:
        first, last = torch.searchsorted(chosen, torch.tensor([moments.count, moments.count + len(features)]))
        kept.append(features[chosen[first:last] - moments.count])
        hits += class_accuracy(logits, labels) * len(labels)
        moments.add(features)
    assert moments.count == images, f"{moments.count} features for {images} images"
    return Summary(moments.gaussian(), torch.cat(kept), hits / images)


def read_statistics(path: str | Path, *, dimension: int) -> tuple[Gaussian, str]:
    """Read an npz file with mu [D] and sigma [D, D], as published with ADM => (mean and covariance, SHA-256).

    Raises MissingFileError; UserError if the file is no such npz or D is not `dimension`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"reference.statistics is {str(path)!r}, which does not exist; give the path of an npz, or set "
            "reference.statistics to '' to use the training images."
        )
    arrays = _open_npz(path)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise UserError(f"{path} has no array {missing[0]!r}, only {sorted(arrays)}; statistics hold mu and sigma.")
    shapes = {"mu": (dimension,), "sigma": (dimension, dimension)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(arrays[name].shape)}, but the extractor has {dimension} features, "
                f"which needs {list(shape)}; use statistics of the same extractor."
            )
        if arrays[name].dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} holds {arrays[name].dtype}, not numbers; get the file again.")
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} holds infinite or NaN values; get the file again.")
    tensors = {name: torch.from_numpy(arrays[name].astype(np.float64)) for name in shapes}
    return Gaussian(**tensors), sha256(path)


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays mu and sigma, if present; other arrays, such as thousands of images, are not loaded."""
    with reading(path, "npz file", "get the file again"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name in ("mu", "sigma")}
