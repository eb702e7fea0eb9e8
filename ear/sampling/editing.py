"""Editing with a masked model: keep part of an image and draw the rest, with any score.

The model predicts any tokens from any others, so editing needs no extra training. The mask decides the kind of edit: a
hole is inpainting, a margin is outpainting; with another label, either changes the class.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from ear.data.images import to_signed
from ear.errors import UserError
from ear.latents.statistics import normalised
from ear.runtime.device import precise
from ear.runtime.randomness import image_streams, normal
from ear.sampling.generation import MODEL, TOKENIZER, ImageSampler, check_batch_size
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingOptions, SamplingSettings


def inpaint(
    images: np.ndarray,  # uint8 [N, H, W, 3]
    mask: np.ndarray,  # bool [N, H, W], true where pixels are redrawn
    labels: Sequence[int | str],  # class numbers or names, one per image
    *,
    data: str | Path = "data",  # the pipeline's data folder
    model: str | Path | None = None,  # a model file or a checkpoint; default: data/finetuned/model.safetensors
    seed: int = 0,
    paste: bool = True,  # keep known pixels exactly; if false, all pixels come from the decoder
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    **options: Unpack[SamplingOptions],  # as those of `ear.generate`; steps are for the tokens that are redrawn
) -> np.ndarray:
    """Redraw every token that the mask touches, given the other tokens and the label => uint8 images [N, H, W, 3].

    Image k depends only on (seed, k), its pixels, its mask and its label. Raises UserError if the arrays do not fit
    each other or the model, a mask is empty, `steps` is less than 1, the model is causal, there are no labels, one is
    unknown, or the device is absent.
    """
    settings = SamplingSettings(seed=seed, **options)
    sampler = ImageSampler.open(model or Path(data) / MODEL, Path(data) / TOKENIZER, device)
    return inpaint_with(sampler, images, mask, labels, settings, paste=paste, batch_size=batch_size)


def inpaint_with(
    sampler: ImageSampler,
    images: np.ndarray,
    mask: np.ndarray,
    labels: Sequence[int | str],
    settings: SamplingSettings,
    *,
    paste: bool = True,
    batch_size: int = 64,
) -> np.ndarray:
    """As `inpaint`, by a model that is loaded already."""
    classes, images, mask = np.asarray(sampler.labels(labels)), np.asarray(images), np.asarray(mask)
    _check(sampler, images, mask, len(classes))
    drawn = masked_tokens(mask, sampler.tokenizer.downsample * sampler.model.patch)
    result = np.empty_like(images)
    for group in _equal_counts(drawn, batch_size):
        result[group] = _redrawn(sampler, images[group], drawn[group], classes[group], group.tolist(), settings)
    return np.where(mask[..., None], result, images) if paste else result


def masked_tokens(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Mask of pixels, bool [N, H, W] => mask of tokens, bool [N, L], row by row: true if any pixel is masked."""
    n, height, width = mask.shape
    cells = mask.reshape(n, height // pixels, pixels, width // pixels, pixels)
    return cells.any(axis=(2, 4)).reshape(n, -1)


def _equal_counts(drawn: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield batches of image numbers with equally many masked tokens, as sampling needs them."""
    check_batch_size(batch_size)
    counts = drawn.sum(axis=1)
    for count in np.unique(counts):
        numbers = np.flatnonzero(counts == count)
        yield from np.split(numbers, range(batch_size, len(numbers), batch_size))


@torch.inference_mode()
def _redrawn(
    sampler: ImageSampler,
    images: np.ndarray,
    drawn: np.ndarray,  # bool [N, L]
    classes: np.ndarray,
    numbers: Sequence[int],  # numbers of the images; image k is drawn from the stream (seed, k)
    settings: SamplingSettings,
) -> np.ndarray:
    source, device = image_streams(settings.seed, numbers), sampler.device
    with precise("float32", device):  # as in the cache stage
        moments = sampler.tokenizer.encode(to_signed(images).to(device))
    noise = normal((len(images), *sampler.model.shape.latent), source, device)
    known = normalised(moments, noise, sampler.statistics)
    mask = torch.as_tensor(drawn, device=device)
    with precise(settings.precision, device):
        latents = sample(sampler.model, classes.tolist(), settings, source=source, known=known, mask=mask)
    return sampler.pixels(latents, numbers, settings)


def _check(sampler: ImageSampler, images: np.ndarray, mask: np.ndarray, count: int) -> None:
    side = [cells * sampler.tokenizer.downsample for cells in sampler.model.shape.latent[1:]]
    expected = (count, *side, 3)
    if images.shape != expected or images.dtype != np.uint8:
        raise UserError(
            f"images are {images.dtype} {images.shape}, but must be uint8 {expected} for {count} labels; convert them."
        )
    if mask.shape != expected[:3] or mask.dtype != bool:
        raise UserError(
            f"mask is {mask.dtype} {mask.shape}, but must be bool {expected[:3]} for {count} labels; convert it."
        )
    empty = np.flatnonzero(~mask.any(axis=(1, 2)))
    if len(empty):
        raise UserError(f"mask {empty[0]} is false everywhere; set it to true where pixels are to be drawn anew.")
