"""Statistics of sampled latents, and normalisation by them."""

from dataclasses import asdict, dataclass

from torch import Tensor

from ear.tokenizer import posterior


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of sampled latents: over everything, and per channel."""

    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @classmethod
    def of(cls, moment_sums: Tensor) -> "Statistics":
        """From `posterior.sums` over a data set."""
        mean, std, _ = posterior.spread(moment_sums.sum(dim=1, keepdim=True))
        channel_mean, channel_std, _ = posterior.spread(moment_sums)
        return cls(mean.item(), std.item(), tuple(channel_mean.tolist()), tuple(channel_std.tolist()))

    def as_dict(self) -> dict:
        """Plain values; `Statistics(**values)` restores the object."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def normalised(moments: Tensor, noise: Tensor, statistics: Statistics) -> Tensor:
    """Moments [B, 2C, h, w] and standard normal noise [..., B, C, h, w] => latents of the noise's shape.

    (posterior sample - mean) / std with the *global* mean and std: one shift and one scale for all channels keep the
    geometry of the latent space. The published recipe for KL-16 multiplies by 0.2325 and subtracts no mean.
    """
    return (posterior.posterior_sample(moments, noise) - statistics.mean) / statistics.std


def denormalised(latents: Tensor, statistics: Statistics) -> Tensor:
    """Normalised latents => latents for the tokenizer's decoder; undoes the normalisation of `normalised`."""
    return latents * statistics.std + statistics.mean
