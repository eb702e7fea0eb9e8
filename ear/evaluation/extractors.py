"""Features of images: a classifier trained on them, or Inception, both as feature extractors of torch-fidelity.

Images go from HDF5 to the extractor batch by batch; no image file lies in between. N is a number of images, D of
features, K of classes, S a side in pixels.
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
from ear.files.tensors import read_tensors, write_tensors
from ear.files.weights import read_pickled, tensors_by_name

INCEPTION = "inception-v3-compat"
_LAYERS = {CLASSIFIER: LAYERS, INCEPTION: ("2048", "logits_unbiased")}
_PUBLISHED_FILE = Path(URL_INCEPTION_V3).name
_ELSEWHERE = (
    f"get {_PUBLISHED_FILE} elsewhere and name it in reference.weights, or set reference.extractor to classifier"
)


def save_inception(path: str | Path, *, weights: str) -> None:
    """Write which Inception weights the features come from: the file `weights`, or the published ones where it is ''.

    Raises FileNotFoundError or ValueError where they are absent, cannot be downloaded or are no weights.
    """
    file = inception_weights(weights)
    write_tensors(path, {}, {"name": INCEPTION, "weights": weights, "sha256": sha256(file)})


def inception_weights(weights: str) -> Path:
    """The checked weights file: `weights`, or for '' the published one, downloaded once into torch's hub folder."""
    if weights and not Path(weights).is_file():
        raise MissingFileError(
            f"reference.weights is {weights!r}, which does not exist; give the path of {_PUBLISHED_FILE}, or '' to "
            "download it."
        )
    path = Path(weights) if weights else downloaded(URL_INCEPTION_V3, otherwise=_ELSEWHERE)
    content = read_pickled(path)  # torch-fidelity itself would run whatever code a file holds
    tensors_by_name(content, origin=str(path))
    return path


@dataclass(frozen=True)
class Extractor:
    """A network of torch-fidelity that gives features and logits, and what identifies it."""

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
        """Whether published figures were made with these weights."""
        return self.name == INCEPTION and self.sha256.startswith(named_digest(_PUBLISHED_FILE))

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 [n, S, S, 3] => float32 features [n, D] and logits [n, K] on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).to(self.device)
        # TensorFloat-32 would keep 10 bits of every factor.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features, logits = self.module(batch)
        return features.float().cpu(), logits.float().cpu()


def open_extractor(path: str | Path, device: torch.device) -> Extractor:
    """The extractor that `save_classifier` or `save_inception` described.

    Raises FileNotFoundError, or ValueError where the weights are not the ones described, or of another network.
    """
    _, description = read_tensors(path)
    name = description.get("name")
    if name == CLASSIFIER:
        weights = Path(path)
    elif name == INCEPTION:
        weights = inception_weights(description["weights"])
    else:
        raise UserError(f"{path} describes no feature extractor; run the reference stage again.")
    digest = sha256(weights)
    if name == INCEPTION and digest != description["sha256"]:
        raise UserError(
            f"{weights} has changed since the reference stage used it (SHA-256 {digest[:12]}, was "
            f"{description['sha256'][:12]}); run that stage again."
        )
    try:
        module = create_feature_extractor(
            name, list(_LAYERS[name]), cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
        )
    except RuntimeError as error:  # of torch's strict loading, with all names in many lines
        raise UserError(f"{weights} holds other tensors than {name} has; give {_PUBLISHED_FILE}.") from error
    return Extractor(module.to(device), name, digest, _LAYERS[name], device)
