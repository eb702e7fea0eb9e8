"""Posterior moments: the Gaussian over latents that a tokenizer assigns to an image.

Moments are [B, 2C, h, w]: C means, then C natural logarithms of variances; all dimensions are independent.
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
    """[B]: KL divergence from each posterior to the standard normal, in nats, summed over all latent dimensions.

    KL = 1/2 sum(mean^2 + variance - log variance - 1); Kingma & Welling, "Auto-Encoding Variational Bayes", appendix B.
    """
    mean, log_variance = split(moments)
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).flatten(1).sum(dim=1)


def sums(moments: Tensor) -> Tensor:
    """float64 [4, C] per channel, additive over batches: count, sum of means, of squared means, of variances."""
    mean, log_variance = split(moments.double())
    parts = (torch.ones_like(mean), mean, mean.square(), log_variance.exp())
    return torch.stack([part.sum(dim=(0, 2, 3)) for part in parts]).cpu()


def spread(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sums` of a data set => mean, standard deviation and posterior standard deviation, float64 [C] each.

    They describe *sampled* latents, exactly and without sampling, by the law of total variance: the variance is the
    variance of the means plus the mean of the posterior variances; the root of the latter is the posterior standard
    deviation. For all channels together, pass `total.sum(dim=1, keepdim=True)`.
    """
    count, mean, square, variance = total
    mean, within = mean / count, variance / count
    between = (square / count - mean.square()).clamp(min=0)
    return mean, (between + within).sqrt(), within.sqrt()
