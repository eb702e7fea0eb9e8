"""Feature extractors: a classifier trained on the images, or Inception, both through torch-fidelity.

Images go from HDF5 to the extractor in batches, never through image files. N images, D features, K classes, side S in
pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from ear.errors import MissingFileError, UserError
from ear.evaluation.classifier import CLASSIFIER, FEATURES, LAYERS
from ear.files.digests import named_digest, sha256
from ear.files.downloads import downloaded
from ear.files.reading import reading
from ear.files.tensors import read_tensors, write_tensors
from ear.files.weights import read_pickled, tensors_by_name

INCEPTION = "inception-v3-compat"
_LAYERS = {CLASSIFIER: LAYERS, INCEPTION: ("2048", "logits_unbiased")}
_PUBLISHED_FILE = Path(URL_INCEPTION_V3).name
_ELSEWHERE = (
    f"get {_PUBLISHED_FILE} elsewhere and name it in reference.weights, or set reference.extractor to classifier"
)


def save_inception(path: str | Path, *, weights: str) -> None:
    """Record which Inception weights are used: the file `weights`, or the published one if `weights` is ''.

    Raises MissingFileError or UserError if the file is absent, cannot be downloaded, or does not hold weights.
    """
    file = inception_weights(weights)
    write_tensors(path, {}, {"name": INCEPTION, "weights": weights, "sha256": sha256(file)})


def inception_weights(weights: str) -> Path:
    """The checked weights file: `weights`, or for '' the published file, downloaded once into torch's hub folder."""
    if weights and not Path(weights).is_file():
        raise MissingFileError(
            f"reference.weights is {weights!r}, which does not exist; give the path of {_PUBLISHED_FILE}, or '' to "
            "download it."
        )
    path = Path(weights) if weights else downloaded(URL_INCEPTION_V3, otherwise=_ELSEWHERE)
    content = read_pickled(path)  # torch-fidelity itself would run code in a pickle
    tensors_by_name(content, origin=str(path))
    return path


@dataclass(frozen=True)
class Extractor:
    """A torch-fidelity network that returns features and logits, and what identifies it."""

    module: FeatureExtractorBase
    name: str
    sha256: str  # of the weights file
    layers: tuple[str, str]  # torch-fidelity's names of features and logits
    device: torch.device

    @property
    def dimension(self) -> int:
        """D, the number of features."""
        return FEATURES if self.name == CLASSIFIER else int(self.layers[0])

    @property
    def published(self) -> bool:
        """Whether these are the weights behind published FIDs."""
        return self.name == INCEPTION and self.sha256.startswith(named_digest(_PUBLISHED_FILE))

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [n, S, S, 3] => float32 features [n, D] and logits [n, K] on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).to(self.device)
        # TF32 would round every factor to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features, logits = self.module(batch)
        return features.float().cpu(), logits.float().cpu()


def open_extractor(path: str | Path, device: torch.device) -> Extractor:
    """Open the extractor that `save_classifier` or `save_inception` recorded.

    Raises MissingFileError; UserError if the weights have changed since, or belong to another network.
    """
    _, description = read_tensors(path)
    name = description.get("name")
    if name not in _LAYERS:
        raise UserError(f"{path} describes no feature extractor; run the reference stage again.")
    with reading(path, "description of an extractor", "run the reference stage again"):
        weights = inception_weights(description["weights"]) if name == INCEPTION else Path(path)
        expected = description["sha256"] if name == INCEPTION else None
    digest = sha256(weights)
    if expected not in (None, digest):
        raise UserError(
            f"{weights} has changed since the reference stage used it (SHA-256 {digest[:12]}, was {expected[:12]}); "
            "run that stage again."
        )
    try:
        module = create_feature_extractor(
            name, list(_LAYERS[name]), cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
        )
    except RuntimeError as error:  # from torch's strict loading; lists all names in many lines
        raise UserError(f"{weights} holds other tensors than {name} has; give {_PUBLISHED_FILE}.") from error
    return Extractor(module.to(device), name, digest, _LAYERS[name], device)
