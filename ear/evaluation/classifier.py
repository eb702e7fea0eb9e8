"""A classifier trained on the real images, whose features replace Inception's on a small data set.

N images, K classes, side S in pixels.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from ear import config
from ear.data.images import to_signed
from ear.data.prepared import PreparedImages
from ear.errors import UserError
from ear.files.reading import reading
from ear.files.tensors import read_tensors, write_tensors
from ear.runtime import randomness
from ear.runtime.ahead import read_ahead
from ear.runtime.device import for_device
from ear.runtime.randomness import Stream, integers
from ear.training.ema import Average
from ear.training.optimizer import Group, adamw, schedule
from ear.training.trainer import Saving, Trainer

CLASSIFIER = "ear-classifier"
FEATURES = 64
LAYERS = ("features", "logits")
_WEIGHT_DECAY, _EMA_DECAY = 0.05, 0.99
_CHECKPOINTS = 10  # per training


class Classifier(nn.Module):
    """A small convolutional network for square images of side >= 4; its features are the mean of its last maps."""

    def __init__(self, classes: int, image_size: int):
        super().__init__()
        self.classes, self.image_size = classes, image_size
        levels = max((image_size // 4).bit_length() - 1, 1)  # the last maps are 4 to 8 a side (2 to 4 below 8 pixels)
        widths = [FEATURES // 2, *[FEATURES] * levels]
        layers = [_convolution(3, widths[0])]
        for before, after in pairwise(widths):
            layers += [_convolution(before, before, stride=2), _convolution(before, after)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def initialise(self, generator: torch.Generator) -> "Classifier":
        """Draw all weights from `generator` (He et al. 2015); returns itself."""
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

    def loss(self, images: Tensor, labels: Tensor, source: Stream) -> Tensor:
        """Mean cross-entropy of signed images [N, 3, S, S], randomly shifted, and their labels int64 [N]."""
        _, logits = self(shifted(images, source))
        return functional.cross_entropy(logits, labels)


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.GroupNorm(8, after),  # unlike batch norm, an image's features do not depend on its batch
        nn.ReLU(inplace=True),
    )


def shifted(images: Tensor, source: Stream) -> Tensor:
    """Shift each image [N, C, S, S] at random by up to S / 16 (at least 1) pixels per axis, repeating its edge."""
    count, side = len(images), images.shape[-1]
    reach = max(side // 16, 1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    offsets = integers(2 * reach + 1, (2, count), source, images.device)
    rows, columns = offsets[..., None] + torch.arange(side, device=images.device)
    image = torch.arange(count, device=images.device)
    # Indexing around a slice moves the channels to the end.
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ClassifierExtractor(FeatureExtractorBase):
    """The classifier as torch-fidelity's extractor "ear-classifier"; `save_classifier` writes its weights file."""

    def __init__(self, name: str, features_list: Sequence[str], feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        if not feature_extractor_weights_path:
            raise UserError(
                f"{CLASSIFIER} needs feature_extractor_weights_path; give data/reference/extractor.safetensors."
            )
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The names of the layers."""
        return LAYERS

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
        """An input of the right shape."""
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, 3, S, S] => the layers in the order of `features_list`; raises UserError for another S."""
        side = self.classifier.image_size
        if images.shape[1:] != (3, side, side):
            raise UserError(
                f"the images are {images.shape[2]} x {images.shape[3]} pixels, but {CLASSIFIER} was trained on "
                f"{side} x {side}; run the reference stage on images of this size."
            )
        features, logits = self.classifier(to_signed(images.movedim(1, -1)))
        layers = {"features": features, "logits": logits}
        return tuple(layers[name] for name in self.features_list)


if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:  # registering twice fails, for example after a reload
    register_feature_extractor(CLASSIFIER, ClassifierExtractor)


def save_classifier(path: str | Path, classifier: Classifier, *, classes: Sequence[str]) -> None:
    """Write the classifier's weights and the names of its classes."""
    description = {"name": CLASSIFIER, "classes": list(classes), "image_size": classifier.image_size}
    write_tensors(path, classifier.state_dict(), description)


def load_classifier(path: str | Path) -> Classifier:
    """Load what `save_classifier` wrote, in eval mode; raises MissingFileError or UserError."""
    tensors, description = read_tensors(path)
    if description.get("name") != CLASSIFIER:
        raise UserError(f"{path} holds no classifier of this project; run the reference stage again.")
    with reading(path, "classifier", "run the reference stage again"):
        classifier = Classifier(len(description["classes"]), description["image_size"])
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} belongs to a classifier of another structure; run the reference stage again."
        ) from error
    return classifier.eval()


def train_classifier(
    images: PreparedImages,
    options: config.Reference,
    *,
    folder: Path,  # for checkpoints, from which a killed training resumes
    device: torch.device,
) -> Classifier:
    """Train on randomly shifted images; returns the EMA weights."""
    seed, batch_size = randomness.derive(options.seed, "classifier"), options.batch_size
    order = randomness.DataOrder(len(images), seed)
    classifier = Classifier(len(images.classes), images.image_size)
    classifier.initialise(randomness.generator(seed, "weights")).to(device)

    def batch_at(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = order.indices(position, batch_size).numpy()
        return for_device(images.images(rows), device), for_device(images.labels[rows], device)

    def loss(batch, position: int):
        pixels, labels = (part.to(device, non_blocking=True) for part in batch)
        source = randomness.stream(seed, "shift", position)
        return classifier.loss(to_signed(pixels), labels, source), {}

    group = Group(list(classifier.parameters()), weight_decay=_WEIGHT_DECAY)
    trainer = Trainer(
        classifier,
        optimizer=adamw([group], learning_rate=options.learning_rate, beta1=0.9, beta2=0.99),
        loss=loss,
        rate=schedule("cosine", total_images=options.images, warmup_images=0),
        averages={"average": Average(classifier, _EMA_DECAY)},
        clip_norm=1.0,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
    )
    interval = max(options.images // _CHECKPOINTS, batch_size)
    trainer.fit(
        lambda positions: read_ahead(batch_at, positions),
        total_images=options.images,
        saving=Saving(folder=folder, interval=interval),
        title="classifier",
    )
    return trainer.average.module
