"""Tokenizers: maps from images to the moments of continuous latents, and from latents to images.

All kinds share one interface: a KL autoencoder, trained by the pipeline or imported (ear.tokenizer.importing),
principal components of patches, or the identity, whose latents are the pixels.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ear.files.reading import reading, require_format
from ear.files.tensors import read_tensors, write_tensors
from ear.files.weights import built_with

FORMAT = "ear-tokenizer-1"
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in published KL autoencoders
_MOST_GROUPS = 32  # groups of group normalisation in published KL autoencoders, ...
_LEAST_GROUP = 4  # ... whose narrowest level has 4 channels per group


class Tokenizer(nn.Module, abc.ABC):
    """The interface of all tokenizers.

    image_size: side in pixels of the images it was made for; any side that `downsample` divides works. downsample:
    pixels per latent cell along a side. latent_channels: C. source: where imported weights come from (format, file
    name and SHA-256), else None.
    """

    kind: str
    source: Mapping[str, str] | None = None

    def __init__(self, *, image_size: int, downsample: int, latent_channels: int):
        super().__init__()
        self.image_size, self.downsample, self.latent_channels = image_size, downsample, latent_channels

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] => moments [B, 2C, H / downsample, W / downsample] (see `posterior`)."""

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] => images [B, 3, H, W], approximately in [-1, 1], not clipped."""

    @abc.abstractmethod
    def config(self) -> dict:
        """The keywords, besides `image_size`, that construct a tokenizer of this structure."""


class Identity(Tokenizer):
    """Pixels as latents, space to depth: channel (c, y, x) of a cell is colour c of its pixel in row y, column x."""

    kind = "identity"

    def __init__(self, *, image_size: int, downsample: int):
        super().__init__(image_size=image_size, downsample=downsample, latent_channels=3 * downsample**2)

    def encode(self, images: Tensor) -> Tensor:
        """Moments whose means are the pixels; the log-variance is the smallest possible."""
        mean = nn.functional.pixel_unshuffle(images, self.downsample)
        return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE_RANGE[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """The exact inverse of the means."""
        return nn.functional.pixel_shuffle(latents, self.downsample)

    def config(self) -> dict:
        """See `Tokenizer`."""
        return {"downsample": self.downsample}


class PCA(Tokenizer):
    """Principal components of patches, fitted by `ear.tokenizer.components`.

    Encoding subtracts the mean patch, projects on the components (orthonormal rows) and multiplies channel k by
    scale[k]. Decoding inverts this, and loses only what lies outside the components. The log-variance is the smallest
    possible, so a posterior sample is its mean up to rounding.
    """

    kind = "pca"
    mean: Tensor  # [D] with D = 3 * downsample^2, in the order of `Identity`'s channels
    components: Tensor  # [C, D]
    scale: Tensor  # [C]

    def __init__(self, *, image_size: int, downsample: int, channels: int):
        super().__init__(image_size=image_size, downsample=downsample, latent_channels=channels)
        self.register_buffer("mean", torch.zeros(3 * downsample**2))
        self.register_buffer("components", torch.zeros(channels, 3 * downsample**2))
        self.register_buffer("scale", torch.ones(channels))

    def encode(self, images: Tensor) -> Tensor:
        """See `Tokenizer`."""
        patches = nn.functional.pixel_unshuffle(images, self.downsample).movedim(1, -1)
        mean = (((patches - self.mean) @ self.components.T) * self.scale).movedim(-1, 1)
        return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE_RANGE[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Tokenizer`."""
        patches = (latents.movedim(1, -1) / self.scale) @ self.components + self.mean
        return nn.functional.pixel_shuffle(patches.movedim(-1, 1), self.downsample)

    def config(self) -> dict:
        """See `Tokenizer`."""
        return {"downsample": self.downsample, "channels": self.latent_channels}


class KL(Tokenizer):
    """The convolutional autoencoder of latent diffusion (Rombach et al. 2022), as diffusers implements it.

    `structure` holds keywords of diffusers' AutoencoderKL; see `kl_structure`. Its scaling and shift factors are not
    used: latents are normalised by the statistics that the cache stage measures.
    """

    kind = "kl"

    def __init__(self, *, image_size: int, structure: Mapping):
        levels = len(structure["block_out_channels"])
        super().__init__(
            image_size=image_size, downsample=2 ** (levels - 1), latent_channels=structure["latent_channels"]
        )
        # Importing diffusers takes seconds; programs without a KL autoencoder do not need it.
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
        """Weights of the decoder's last layer."""
        return self.network.decoder.conv_out.weight

    def config(self) -> dict:
        """See `Tokenizer`."""
        return {"structure": self.structure}


_KINDS = {kind.kind: kind for kind in (Identity, PCA, KL)}


def kl_structure(
    *,
    channels: int,  # of the latents
    block_channels: Sequence[int],  # per level, starting at the image's resolution; each level but the last halves it
    layers: int,  # residual blocks per level; the decoder has one more
) -> dict:
    """Keywords of diffusers' AutoencoderKL, with attention in the encoder's last level and in both middle blocks.

    Channels 128, 128, 256, 256, 512, two layers and 16 latent channels give the published KL-16 autoencoder.
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
    """Groups of group normalisation: the most that divide all widths with at least 4 channels each, at most 32."""
    common = math.gcd(*block_channels)
    return max(g for g in range(1, _MOST_GROUPS + 1) if common % g == 0 and (g == 1 or common // g >= _LEAST_GROUP))


def new_kl(*, seed: int, image_size: int, structure: Mapping) -> KL:
    """An untrained KL autoencoder whose weights depend only on `seed`."""
    # Torch's modules draw initial weights from the global random state, which is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KL(image_size=image_size, structure=structure)


def save_tokenizer(path: str | Path, tokenizer: Tokenizer) -> None:
    """Write weights and structure to one safetensors file, whose SHA-256 identifies the tokenizer."""
    write_tensors(path, tokenizer.state_dict(), describe_tokenizer(tokenizer))


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """The metadata stored with the weights of a tokenizer."""
    return {
        "format": FORMAT,
        "kind": tokenizer.kind,
        "image_size": tokenizer.image_size,
        "config": tokenizer.config(),
        "source": dict(tokenizer.source) if tokenizer.source else None,
    }


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer, in eval mode.

    Raises MissingFileError; UserError if the file is not a tokenizer or its tensors do not fit its structure.
    """
    tensors, description = read_tensors(path)
    return tokenizer_of(tensors, description, path)


def tokenizer_of(tensors: dict, description: Mapping, path: str | Path) -> Tokenizer:
    """Build a tokenizer, in eval mode, from its tensors and description; raises UserError naming their file, `path`."""
    require_format(path, description.get("format"), FORMAT, "run the tokenizer stage again")
    with reading(path, "description of a tokenizer", "run the tokenizer stage again"):
        kind, config = _KINDS[description["kind"]], description["config"]
        layers = config.get("structure", {}).get("layers_per_block", 0)
        tokenizer = built_with(
            lambda: kind(image_size=description["image_size"], **config),
            tensors,
            str(path),
            layers=layers,
            description=config,
        )
        tokenizer.source = description["source"]
    return tokenizer.eval().requires_grad_(False)
