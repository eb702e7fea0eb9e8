"""The Gaussian kernel score with a mixture of bandwidths, bounded and strictly proper (Gneiting & Raftery, 2007).

Its regret is the squared maximum mean discrepancy of a characteristic kernel.
"""

import math

import torch
from torch import Tensor

from ear.scores.generator import GeneratorScore, squared_distance


class KernelScore(GeneratorScore):
    """Kernel score and the noise-driven generator that it trains."""

    options = (*GeneratorScore.options, "bandwidths")

    def __init__(self, *, bandwidths: tuple[float, ...], token_channels: int, **head):
        super().__init__(token_channels=token_channels, **head)
        # In units of the distance from the origin of a token of unit-variance channels, sqrt(D).
        self.lengths = [width * math.sqrt(token_channels) for width in bandwidths]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over bandwidths s of 1 - exp(-|a - b|^2 / (2 s^2))."""
        squared = squared_distance(a, b)
        return torch.stack([-torch.expm1(-squared / (2 * s * s)) for s in self.lengths]).mean(dim=0)
