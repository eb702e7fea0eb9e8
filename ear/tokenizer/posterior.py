"""Posterior moments: the Gaussians over latents that a tokenizer gives for an image.

Moments are [B, 2C, h, w]: C means, then C natural logarithms of the variances, all dimensions independent.
"""

import torch
from torch import Tensor


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 2C, h, w] => mean and log-variance, [B, C, h, w] each, as float32 (float64 stays)."""
    wide = moments if moments.dtype == torch.float64 else moments.float()
    mean, log_variance = wide.chunk(2, dim=1)
    return mean, log_variance


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents [..., B, C, h, w]: mean + standard deviation * noise, for standard normal noise of that shape."""
    mean, log_variance = split(moments)
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(moments: Tensor) -> Tensor:
    """[B]: nats from the posterior of each image to the standard normal, summed over all its latent dimensions.

    KL = 1/2 sum(mean^2 + variance - log variance - 1); Kingma & Welling, "Auto-Encoding Variational Bayes",
    appendix B.
    """
    mean, log_variance = split(moments)
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).flatten(1).sum(dim=1)


def sums(moments: Tensor) -> Tensor:
    """float64 [4, C], additive over batches: per channel the count, and the sums of mean, mean^2 and variance."""
    mean, log_variance = split(moments.double())
    parts = (torch.ones_like(mean), mean, mean.square(), log_variance.exp())
    return torch.stack([part.sum(dim=(0, 2, 3)) for part in parts]).cpu()


def spread(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sums` over a data set => mean, standard deviation and posterior standard deviation, float64 [C] each.

    They describe *sampled* latents, exactly and without sampling, by the law of total variance: the variance is that
    of the means plus the average variance of the posteriors; the root of the latter is the posterior one.
    Give `total.sum(dim=1, keepdim=True)` for the figures of all channels together.
    """
    count, mean, square, variance = total
    mean, within = mean / count, variance / count
    between = (square / count - mean.square()).clamp(min=0)
    return mean, (between + within).sqrt(), within.sqrt()
