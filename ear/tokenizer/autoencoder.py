"""Tokenizers: images <=> the moments of continuous latents.

A tokenizer is an nn.Module with one interface, whatever its kind: a KL autoencoder, trained by the pipeline or imported
(`ear.autoencoder_import`), or the identity, whose latents are the pixels themselves.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ear.errors import UserError
from ear.files.tensors import read_tensors, write_tensors
from ear.files.weights import load_weights

FORMAT = "ear-tokenizer-1"
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of published KL autoencoders
_MOST_GROUPS = 32  # of group normalisation in published KL autoencoders ...
_LEAST_GROUP = 4  # ... where the narrowest level has 4 channels per group


class Tokenizer(nn.Module, abc.ABC):
    """What every tokenizer has.

    image_size: the side in pixels that it was made for; it works for every side that `downsample` divides.
    downsample: pixels per latent cell along a side. latent_channels: C.
    """

    kind: str

    def __init__(self, *, image_size: int, downsample: int, latent_channels: int):
        super().__init__()
        self.image_size, self.downsample, self.latent_channels = image_size, downsample, latent_channels

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] => moments [B, 2C, H / downsample, W / downsample] (see `ear.posterior`)."""

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] => images [B, 3, H, W], about in [-1, 1] and not clipped."""

    @abc.abstractmethod
    def config(self) -> dict:
        """The keywords, beside `image_size`, that build a tokenizer of this structure."""


class Identity(Tokenizer):
    """Pixels as latents, space to depth: channel (c, y, x) of a cell is colour c of its pixel in row y, column x."""

    kind = "identity"

    def __init__(self, *, image_size: int, downsample: int):
        super().__init__(image_size=image_size, downsample=downsample, latent_channels=3 * downsample**2)

    def encode(self, images: Tensor) -> Tensor:
        """The pixels are the means; the log-variance is the least possible one."""
        mean = nn.functional.pixel_unshuffle(images, self.downsample)
        return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE_RANGE[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """The exact inverse of the means."""
        return nn.functional.pixel_shuffle(latents, self.downsample)

    def config(self) -> dict:
        """See `Tokenizer`."""
        return {"downsample": self.downsample}


class KL(Tokenizer):
    """The convolutional autoencoder of latent diffusion (Rombach et al. 2022), as diffusers implements it.

    `structure` holds keywords of diffusers' AutoencoderKL; see `kl_structure`. Its scaling and shift factors have no
    place here: latents are normalised by the statistics that the cache stage measures.
    """

    kind = "kl"

    def __init__(self, *, image_size: int, structure: Mapping):
        levels = len(structure["block_out_channels"])
        super().__init__(
            image_size=image_size, downsample=2 ** (levels - 1), latent_channels=structure["latent_channels"]
        )
        # Importing diffusers takes seconds, which programs without a KL autoencoder need not spend.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.structure = dict(structure)
        self.network = AutoencoderKL(**self.structure)

    def encode(self, images: Tensor) -> Tensor:
        """Moments, with the log-variance clamped to LOG_VARIANCE_RANGE."""
        mean, log_variance = self.network.encode(images).latent_dist.parameters.chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Tokenizer`."""
        return self.network.decode(latents).sample

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weights."""
        return self.network.decoder.conv_out.weight

    def config(self) -> dict:
        """See `Tokenizer`."""
        return {"structure": self.structure}


_KINDS = {kind.kind: kind for kind in (Identity, KL)}


def kl_structure(
    *,
    channels: int,  # of the latents
    block_channels: Sequence[int],  # per level, from the image's side on; each level but the last halves both sides
    layers: int,  # residual blocks per level; the decoder has one more
) -> dict:
    """Keywords of diffusers' AutoencoderKL: attention in the encoder's last level and in both middles.

    Channels 128, 128, 256, 256, 512 with two layers and 16 latent channels are the published KL-16 autoencoder.
    """
    plain = len(block_channels) - 1
    return {
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * len(block_channels),
        "block_out_channels": list(block_channels),
        "layers_per_block": layers,
        "latent_channels": channels,
        "norm_num_groups": _groups(block_channels),
    }


def _groups(block_channels: Sequence[int]) -> int:
    """Groups of group normalisation: as many as divide all widths, with 4 channels or more each, 32 at most."""
    common = math.gcd(*block_channels)
    return max(g for g in range(1, _MOST_GROUPS + 1) if common % g == 0 and (g == 1 or common // g >= _LEAST_GROUP))


def new_kl(*, seed: int, image_size: int, structure: Mapping) -> KL:
    """An untrained KL autoencoder whose weights depend on `seed` alone."""
    # Torch's modules draw their first weights from the global state, which is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KL(image_size=image_size, structure=structure)


def save_tokenizer(path: str | Path, tokenizer: Tokenizer, source: Mapping | None = None) -> None:
    """Write weights and structure as one safetensors file; its SHA-256 is the tokenizer's fingerprint.

    `source` says where imported weights come from; see `ear.autoencoder_import`.
    """
    description = {
        "format": FORMAT,
        "kind": tokenizer.kind,
        "image_size": tokenizer.image_size,
        "config": tokenizer.config(),
        "source": source,
    }
    write_tensors(path, tokenizer.state_dict(), description)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer in eval mode.

    Raises FileNotFoundError, or ValueError for a file that is no tokenizer or whose tensors do not fit its structure.
    """
    tensors, description = read_tensors(path)
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {description.get('format')!r}, not {FORMAT!r}; run the tokenizer stage again."
        )
    tokenizer = _KINDS[description["kind"]](image_size=description["image_size"], **description["config"])
    load_weights(tokenizer, tensors, origin=str(path))
    return tokenizer.eval().requires_grad_(False)
