"""Features of images: a classifier trained on them, or Inception, both as feature extractors of torch-fidelity.

Images go from HDF5 to the extractor batch by batch; no image file lies in between. N is a number of images, D of
features, K of classes, S a side in pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from ear import distributed, records
from ear.images import to_signed
from ear.progress import Progress

CLASSIFIER, INCEPTION = "ear-classifier", "inception-v3-compat"
FEATURES = 64  # of the classifier
_LAYERS = {CLASSIFIER: ("features", "logits"), INCEPTION: ("2048", "logits_unbiased")}
_PUBLISHED_FILE = Path(URL_INCEPTION_V3).name
_ELSEWHERE = (
    f"get {_PUBLISHED_FILE} elsewhere and name it in reference.weights, or set reference.extractor to classifier"
)


class Classifier(nn.Module):
    """A small convolutional network for square images of side >= 4; its features are the mean of its last maps."""

    def __init__(self, classes: int, image_size: int):
        super().__init__()
        self.classes, self.image_size = classes, image_size
        levels = max((image_size // 4).bit_length() - 1, 1)  # down to 4 x 4 cells, or 2 x 2 for the smallest images
        widths = [FEATURES // 2, *[FEATURES] * levels]
        layers = [_convolution(3, widths[0])]
        for before, after in pairwise(widths):
            layers += [_convolution(before, before, stride=2), _convolution(before, after)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def initialise(self, generator: torch.Generator) -> "Classifier":
        """Draw the weights anew from `generator` (He et al. 2015); returns itself."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Signed float32 [N, 3, S, S] in [-1, 1] => features [N, 64], logits [N, K]."""
        features = self.body(images).mean((2, 3))
        return features, self.head(features)

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy of signed images [N, 3, S, S], randomly shifted, and their labels int64 [N]."""
        _, logits = self(shifted(images, generator))
        return functional.cross_entropy(logits, labels)


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.GroupNorm(8, after),  # unlike batch norm, an image's features do not depend on its batch
        nn.ReLU(inplace=True),
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, C, S, S] moved by up to S / 16 (at least 1) pixels along both sides, its edge repeated."""
    count, side = len(images), images.shape[-1]
    reach = max(side // 16, 1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(2 * reach + 1, (2, count), generator=generator).to(images.device)
    rows, columns = offsets[..., None] + torch.arange(side, device=images.device)
    image = torch.arange(count, device=images.device)
    # Indices around a slice put the channels last.
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ClassifierExtractor(FeatureExtractorBase):
    """The trained classifier under torch-fidelity's name "ear-classifier"; its weights file is `save_classifier`'s."""

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        if not feature_extractor_weights_path:
            raise ValueError(
                f"{CLASSIFIER} needs feature_extractor_weights_path; give data/reference/extractor.safetensors."
            )
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The names of the layers."""
        return _LAYERS[CLASSIFIER]

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The layer that a metric of torch-fidelity uses."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Whether torch-fidelity may compile it."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """An input of the right form."""
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, 3, S, S] => the layers in the order of `features_list`; raises ValueError for another S."""
        side = self.classifier.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(
                f"the images are {images.shape[2]} x {images.shape[3]} pixels, but {CLASSIFIER} was trained on "
                f"{side} x {side}; run the reference stage on images of this size."
            )
        features, logits = self.classifier(to_signed(images.movedim(1, -1)))
        layers = {"features": features, "logits": logits}
        return tuple(layers[name] for name in self.features_list)


if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:  # the registry refuses a second time, such as on a reload
    register_feature_extractor(CLASSIFIER, ClassifierExtractor)


def save_classifier(path: str | Path, classifier: Classifier, *, classes: Sequence[str]) -> None:
    """Write the classifier's weights and the names of its classes."""
    description = {"name": CLASSIFIER, "classes": list(classes), "image_size": classifier.image_size}
    records.write_tensors(path, classifier.state_dict(), description)


def load_classifier(path: str | Path) -> Classifier:
    """The classifier of `save_classifier`, in eval mode; raises FileNotFoundError or ValueError."""
    tensors, description = records.read_tensors(path)
    if description.get("name") != CLASSIFIER:
        raise ValueError(f"{path} holds no classifier of this project; run the reference stage again.")
    classifier = Classifier(len(description["classes"]), description["image_size"])
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} belongs to a classifier of another structure; run the reference stage again."
        ) from error
    return classifier.eval()


def save_inception(path: str | Path, *, weights: str) -> None:
    """Write which Inception weights the features come from: the file `weights`, or the published ones where it is ''.

    Raises FileNotFoundError or ValueError where they are absent, cannot be downloaded or are no weights.
    """
    file = inception_weights(weights)
    records.write_tensors(path, {}, {"name": INCEPTION, "weights": weights, "sha256": records.sha256(file)})


def inception_weights(weights: str) -> Path:
    """The checked weights file: `weights`, or for '' the published one, downloaded once into torch's hub folder."""
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(
            f"reference.weights is {weights!r}, which does not exist; give the path of {_PUBLISHED_FILE}, or '' to "
            "download it."
        )
    path = Path(weights) if weights else records.downloaded(URL_INCEPTION_V3, otherwise=_ELSEWHERE)
    content = records.read_pickled(path)  # torch-fidelity itself would run whatever code a file holds
    records.tensors_by_name(content, origin=str(path))
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
        return self.name == INCEPTION and self.sha256.startswith(records.named_digest(_PUBLISHED_FILE))

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
    _, description = records.read_tensors(path)
    name = description.get("name")
    if name == CLASSIFIER:
        weights = Path(path)
    elif name == INCEPTION:
        weights = inception_weights(description["weights"])
    else:
        raise ValueError(f"{path} describes no feature extractor; run the reference stage again.")
    digest = records.sha256(weights)
    if name == INCEPTION and digest != description["sha256"]:
        raise ValueError(
            f"{weights} has changed since the reference stage used it (SHA-256 {digest[:12]}, was "
            f"{description['sha256'][:12]}); run that stage again."
        )
    try:
        module = create_feature_extractor(
            name, list(_LAYERS[name]), cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
        )
    except RuntimeError as error:  # of torch's strict loading, with all names in many lines
        raise ValueError(f"{weights} holds other tensors than {name} has; give {_PUBLISHED_FILE}.") from error
    return Extractor(module.to(device), name, digest, _LAYERS[name], device)


class Source(Protocol):
    """Labelled images, such as `ear.prepared.PreparedImages` and `ear.samples.GeneratedImages`."""

    labels: np.ndarray  # int64 [N]

    def __len__(self) -> int: ...

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3] of consecutive images."""


class Selection:
    """Some rows of a source that gives any rows, in the order given."""

    def __init__(self, source: Source, rows: Tensor):
        self._source, self._rows = source, rows.numpy()
        self.labels = source.labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3]."""
        return self._source.images(self._rows[rows.start : rows.stop])


class Batch(NamedTuple):
    """What an extractor says of n consecutive images."""

    features: Tensor  # float32 [n, D]
    logits: Tensor  # float32 [n, K]
    labels: Tensor  # int64 [n]


def stream(
    source: Source,
    *,
    extractor: Extractor,
    batch_size: int,
    title: str,
    folder: Path,  # keeps what is known of each batch: a killed pass goes on from there
) -> Iterator[Batch]:
    """Yield features, logits and labels of all images in order.

    Of many processes each looks at every so-manieth batch, and the main one yields all; so what comes of them does not
    depend on their number (see `distributed.in_turns`). The folder must belong to this source, its order and this batch
    size; batches of another extractor are not mistaken for its own. Raises ValueError where there is no image, or a
    feature is infinite or NaN.
    """
    if not len(source):
        raise ValueError(f"{title}: there are no images; run the stage that writes them again.")
    kept = folder / extractor.sha256[:16]
    kept.mkdir(parents=True, exist_ok=True)

    def look(first: int) -> Batch:
        file = kept / f"{first:010d}.safetensors"
        if file.is_file():
            return Batch(**records.read_tensors(file)[0])
        rows = range(first, min(first + batch_size, len(source)))
        features, logits = extractor(source.images(rows))
        finite = features.isfinite().all(1) & logits.isfinite().all(1)
        if not finite.all():
            bad = first + int((~finite).nonzero()[0])
            raise ValueError(
                f"{title}: the features of image {bad} are infinite or NaN; check the extractor's weights."
            )
        batch = Batch(features, logits, torch.from_numpy(source.labels[rows.start : rows.stop]))
        records.write_tensors(file, batch._asdict(), {})
        return batch

    with Progress(title, len(source)) as progress:
        for batch in distributed.in_turns(range(0, len(source), batch_size), look):
            yield batch
            progress.advance(len(batch.labels))


def gather(batches: Iterable[Batch], images: int) -> Batch:
    """All `images` rows of the batches in one, written where they will stay: never twice in memory."""
    whole, done = None, 0
    for batch in batches:
        whole = whole or Batch(*(part.new_empty(images, *part.shape[1:]) for part in batch))
        for target, part in zip(whole, batch, strict=True):
            target[done : done + len(part)] = part
        done += len(batch.labels)
    assert done == images, f"{done} rows for {images} images"
    return whole
