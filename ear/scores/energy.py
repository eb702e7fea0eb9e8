"""The energy score: strictly proper, and computed from samples only (EAR, section 3; Gneiting & Raftery, 2007).

S(p, y) = E|x1 - x2|^alpha - 2 E|x1 - y|^alpha for independent x1, x2 ~ p; strictly proper for alpha in (0, 2).
Shapes: N tokens, D token channels, m samples per token, k targets per token.
"""

from torch import Tensor

from ear.config.scores import Energy, Pairs
from ear.scores.sample_based import SampleBasedScore, pairwise_loss, squared_distance
from ear.scores.score import HeadSize


def distance(a: Tensor, b: Tensor, *, alpha: float, smoothing: float) -> Tensor:
    """(|a - b|^2 + e^2)^(alpha/2) - e^alpha over the last dimension.

    A Bernstein function of the squared distance, so the score stays strictly proper; its gradient is finite where a
    and b coincide, as the two samples of an untrained head do, for every alpha in (0, 2).
    """
    return (squared_distance(a, b) + smoothing**2).pow(alpha / 2) - smoothing**alpha


def energy_loss(
    samples: Tensor,  # [m, N, D]
    targets: Tensor,  # [k, N, D]
    *,
    alpha: float,  # exponent in (0, 2)
    temperature: float = 1.0,  # weight of the repulsion, in (0, 1]; only 1 is strictly proper
    smoothing: float = 1e-6,
    pairs: Pairs = "all",
) -> Tensor:
    """Per-token loss [N], the negative energy score.

    With m = 2 and k = 1 this is the published |x1-y|^a + |x2-y|^a - temperature |x1-x2|^a.
    """

    def between(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b, alpha=alpha, smoothing=smoothing)

    return pairwise_loss(samples, targets, between, temperature=temperature, pairs=pairs).value


class EnergyScore(SampleBasedScore):
    """Energy score and the noise-driven head that it trains."""

    def __init__(self, options: Energy, size: HeadSize):
        super().__init__(options, size)
        self.alpha, self.smoothing = options.alpha, options.smoothing

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The smoothed distance to the power alpha, [..., D], [..., D] => [...]."""
        return distance(a, b, alpha=self.alpha, smoothing=self.smoothing)
