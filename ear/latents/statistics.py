"""Statistics of sampled latents, and normalisation by them.

A channel is *collapsed* (posterior collapse) if nearly all of its variance is noise of the posterior. It carries no
information about an image, but a model would have to predict its noise, so normalisation replaces it by its mean.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ear.tokenizer import posterior


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of sampled latents, over everything and per channel; which channels collapsed."""

    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    collapsed: tuple[int, ...] = ()

    @classmethod
    def of(cls, moment_sums: Tensor, *, noise_limit: float = 1.0) -> "Statistics":
        """From `posterior.sums` over a data set.

        noise_limit: a channel is collapsed if more than this share of its variance is noise of the posterior.
        """
        mean, std, _ = posterior.spread(moment_sums.sum(dim=1, keepdim=True))
        channel_mean, channel_std, noise = posterior.spread(moment_sums)
        collapsed = (noise.square() > noise_limit * channel_std.square()).nonzero().flatten()
        channels = (tuple(each.tolist()) for each in (channel_mean, channel_std, collapsed))
        return cls(mean.item(), std.item(), *channels)

    @classmethod
    def from_dict(cls, stored: dict) -> "Statistics":
        """The inverse of `as_dict`."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        return cls(**values)

    def as_dict(self) -> dict:
        """Plain values; without collapsed channels, those of versions that did not know them."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return values if self.collapsed else {k: v for k, v in values.items() if k != "collapsed"}


def normalised(moments: Tensor, noise: Tensor, statistics: Statistics) -> Tensor:
    """Moments [B, 2C, h, w] and standard normal noise [..., B, C, h, w] => latents of the noise's shape.

    (posterior sample - mean) / std with the *global* mean and std: one shift and one scale for all channels keep the
    geometry of the latent space. The published recipe for KL-16 multiplies by 0.2325 and subtracts no mean.
    Collapsed channels become constant: the mean of the channel.
    """
    latents = (posterior.posterior_sample(moments, noise) - statistics.mean) / statistics.std
    for channel in statistics.collapsed:
        latents.select(-3, channel).fill_((statistics.channel_mean[channel] - statistics.mean) / statistics.std)
    return latents


def denormalised(latents: Tensor, statistics: Statistics) -> Tensor:
    """Normalised latents => latents for the tokenizer's decoder; undoes the normalisation of `normalised`."""
    return latents * statistics.std + statistics.mean
