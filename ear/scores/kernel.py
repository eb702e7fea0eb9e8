"""The Gaussian kernel score with several bandwidths: bounded and strictly proper (Gneiting & Raftery, 2007).

Its regret is the squared maximum mean discrepancy (MMD) of a characteristic kernel.
"""

import math

import torch
from torch import Tensor

from ear.config.scores import Kernel
from ear.scores.sample_based import SampleBasedScore, squared_distance
from ear.scores.score import HeadSize


class KernelScore(SampleBasedScore):
    """Kernel score and the noise-driven head that it trains."""

    def __init__(self, options: Kernel, size: HeadSize):
        super().__init__(options, size)
        # In units of sqrt(D), the typical length of a token whose channels have unit variance.
        self.lengths = [bandwidth * math.sqrt(size.token_channels) for bandwidth in options.bandwidths]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over bandwidths s of 1 - exp(-|a - b|^2 / (2 s^2)), [..., D], [..., D] => [...]."""
        squared = squared_distance(a, b)
        return torch.stack([-torch.expm1(-squared / (2 * s * s)) for s in self.lengths]).mean(dim=0)
