"""Images from a trained model: shared by `ear.load`, `ear.generate` and the sample stage.

labels => normalised latents (ear.sampling.sampler) => latents => images in [-1, 1] (tokenizer) => uint8.
"""

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from ear.data.images import to_uint8
from ear.errors import UserError
from ear.files.digests import sha256
from ear.latents.statistics import Statistics, denormalised
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import load_model
from ear.runtime.device import find_device, precise
from ear.runtime.randomness import image_streams
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingOptions, SamplingSettings
from ear.tokenizer.autoencoder import Tokenizer, load_tokenizer

MODEL = "finetuned/model.safetensors"
TOKENIZER = "tokenizer/tokenizer.safetensors"


def load(path: str | Path, weights: str | None = None) -> AutoregressiveModel:
    """Load a model in eval mode: EMA weights of data/model or data/finetuned, of a model file, or of a checkpoint.

    weights: only for a checkpoint, the set to load: averaged (EMA, default), averaged_long (the slower EMA) or weights
    (without averaging).
    Raises MissingFileError or UserError.
    """
    return load_model(path, weights)[0]


class ImageSampler:
    """A trained model with its tokenizer."""

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: Tokenizer,
        statistics: Statistics,
        device: torch.device | str = "cpu",
    ):
        self.device = find_device(device)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer.to(self.device).eval()
        self.statistics = statistics

    @classmethod
    def open(cls, model: str | Path, tokenizer: str | Path, device: torch.device | str = "cpu") -> "ImageSampler":
        """Load a model (its file, folder or checkpoint) and the tokenizer's file.

        Raises MissingFileError; UserError if a file is damaged, the model belongs to another tokenizer, or the device
        is absent.
        """
        loaded, description = load_model(model)
        decoder, fingerprint = load_tokenizer(tokenizer), sha256(tokenizer)
        if description["tokenizer"] != fingerprint:
            raise UserError(
                f"{model} was trained on latents of tokenizer {description['tokenizer'][:12]}, but {tokenizer} is "
                f"{fingerprint[:12]}; run the stages cache, train and finetune again."
            )
        return cls(loaded, decoder, Statistics.from_dict(description["statistics"]), device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of an image."""
        _, height, width = self.model.shape.latent
        return height * self.tokenizer.downsample, width * self.tokenizer.downsample, 3

    def labels(self, wanted: Sequence[int | str]) -> list[int]:
        """Class numbers of the given numbers or names; raises UserError for none, or naming the first unknown class."""
        wanted = _listed(wanted)
        if not wanted:
            raise UserError("labels is empty; give one class per image.")
        classes = self.model.shape.classes
        numbers = {name: number for number, name in enumerate(classes)}
        found = [numbers.get(label, -1) if isinstance(label, str) else _whole(label) for label in wanted]
        for label, number in zip(wanted, found, strict=True):
            if not 0 <= number < len(classes):
                raise UserError(
                    f"label {label!r} is none of the model's {len(classes)} classes, {classes[0]!r} to "
                    f"{classes[-1]!r}; give a name, or a number from 0 to {len(classes) - 1}."
                )
        return found

    def generate(
        self, labels: Sequence[int | str], settings: SamplingSettings, *, batch_size: int, first: int = 0
    ) -> np.ndarray:
        """Draw uint8 images [N, H, W, 3] for class numbers or names, numbered from `first` on (see `images`).

        Raises UserError if there are no labels or a label is unknown.
        """
        parts = batches(self.labels(labels), batch_size)
        return np.concatenate([self.images(part, settings, first=first + start) for start, part in parts])

    @torch.inference_mode()
    def images(self, labels: Sequence[int], settings: SamplingSettings, *, first: int) -> np.ndarray:
        """uint8 [N, H, W, 3] for one batch of class numbers.

        `first` is the number of the first image: image k is drawn from the random stream (settings.seed, k).
        """
        numbers = range(first, first + len(labels))
        source = image_streams(settings.seed, numbers)
        with precise(settings.precision, self.device):
            latents = sample(self.model, labels, settings, source=source)
        return self.pixels(latents, numbers, settings)

    @torch.inference_mode()
    def step_by_step(
        self, labels: Sequence[int], settings: SamplingSettings, *, first: int, most: int | None = None
    ) -> list[np.ndarray]:
        """Snapshots of what `images` draws: before each step and at the end, uint8 [N, H, W, 3] each.

        Tokens that are not drawn yet are shown as mean latents. most: return at most this many snapshots, evenly
        spaced and ending with the final images; None: all of them.
        """
        numbers, latents = range(first, first + len(labels)), []
        source = image_streams(settings.seed, numbers)
        with precise(settings.precision, self.device):
            drawn = sample(self.model, labels, settings, source=source, seen=lambda now: latents.append(now.clone()))
        count = len(latents) if most is None else min(len(latents), most - 1)
        shown = [latents[k * len(latents) // count] for k in range(count)]
        return [self.pixels(state, numbers, settings) for state in (*shown, drawn)]

    @torch.inference_mode()
    def pixels(self, latents: torch.Tensor, numbers: Sequence[int], settings: SamplingSettings) -> np.ndarray:
        """Normalised latents [N, C, h, w] => uint8 [N, H, W, 3].

        Raises UserError, with its number from `numbers`, for an image that is not finite.
        """
        with precise(settings.decoder_precision, self.device):
            decoded = self.tokenizer.decode(denormalised(latents, self.statistics)).float()
        finite = decoded.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            bad = numbers[int((~finite).nonzero()[0])]
            raise UserError(
                f"image {bad} is not finite; the model diverged in training, or guidance {settings.guidance} is too "
                "high."
            )
        return to_uint8(decoded).cpu().numpy()


def batches(labels: Sequence[int], batch_size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (number of the first image, labels) for each batch. Raises UserError for a batch without images."""
    check_batch_size(batch_size)
    for first in range(0, len(labels), batch_size):
        yield first, labels[first : first + batch_size]


def check_batch_size(batch_size: int) -> None:
    """Raise UserError for a batch without images."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")


def balanced_labels(count: int, classes: int) -> list[int]:
    """`count` labels, each class equally often (if it does not divide, the first classes once more)."""
    return [k % classes for k in range(count)]


def generate(
    data: str | Path,  # the pipeline's data folder
    labels: Sequence[int | str],  # class numbers or names, one per image
    *,
    model: str | Path | None = None,  # a model file or a checkpoint; default: data/finetuned/model.safetensors
    seed: int = 0,
    first: int = 0,  # number of the first image
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    **options: Unpack[SamplingOptions],
) -> np.ndarray:
    """Generate uint8 images [N, H, W, 3], from number `first` on; image k depends only on (seed, k) and its label.

    options: steps=16, guidance=1.0, temperature=1.0 and all other fields of `SamplingSettings`. Raises MissingFileError
    if a stage has not run; UserError for an empty or unknown label, an option that is not allowed, or a device that is
    absent.
    """
    settings = SamplingSettings(seed=seed, **options)
    sampler = ImageSampler.open(model or Path(data) / MODEL, Path(data) / TOKENIZER, device)
    return sampler.generate(labels, settings, batch_size=batch_size, first=first)


def _listed(labels: Sequence[int | str]) -> list[int | str]:
    """The labels as a list; raises UserError for a single label (each character of a name would count as a class)."""
    try:
        if isinstance(labels, str):
            raise TypeError
        return list(labels)
    except TypeError as error:
        raise UserError(f"labels is {labels!r}, but must hold one class per image; give [{labels!r}].") from error


def _whole(label: Any) -> int:
    """The label as an int if it has an integer type, else -1."""
    try:
        return operator.index(label)
    except TypeError:
        return -1
