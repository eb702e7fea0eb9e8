"""The energy score: a strictly proper score that needs samples only (EAR, section 3; Gneiting & Raftery, 2007).

S(p, y) = E|x1 - x2|^alpha - 2 E|x1 - y|^alpha for independent x1, x2 ~ p, strictly proper for alpha in (0, 2).
Shapes: N tokens, D token channels, m samples per token, k targets per token, W hidden width, n noise channels.
"""

import itertools

import torch
from torch import Tensor, nn

from ear.randomness import Source, normal, uniform
from ear.scores.modulated_mlp import ModulatedMLP


def distance(a: Tensor, b: Tensor, *, alpha: float, smoothing: float) -> Tensor:
    """(|a - b|^2 + e^2)^(alpha/2) - e^alpha over the last dimension, in float32 or better.

    A Bernstein function of the squared distance, so the score stays strictly proper; its gradient is finite where a
    and b coincide, as the two samples of an untrained head do, for every alpha in (0, 2).
    """
    difference = a.float() - b.float() if a.dtype.itemsize < 4 else a - b
    return (difference.square().sum(-1) + smoothing**2).pow(alpha / 2) - smoothing**alpha


def energy_loss(
    samples: Tensor,  # [m, N, D]
    targets: Tensor,  # [k, N, D]
    *,
    alpha: float,  # exponent in (0, 2)
    temperature: float = 1.0,  # weight of the repulsion, in (0, 1]; only 1 is strictly proper
    smoothing: float = 1e-6,
) -> Tensor:
    """Per-token loss [N]: an unbiased estimate (U-statistic over all pairs) of the negative energy score.

    2/(mk) sum_ij d(x_i, y_j) - temperature * 2/(m(m-1)) sum_{i<j} d(x_i, x_j). With m = 2 and k = 1 this is the
    published |x1-y|^a + |x2-y|^a - temperature |x1-x2|^a; more samples lower the variance, never the expectation.
    """
    m, k = len(samples), len(targets)
    with torch.autocast(samples.device.type, enabled=False):
        attraction = sum(
            distance(x, y, alpha=alpha, smoothing=smoothing) for x, y in itertools.product(samples, targets)
        )
        repulsion = sum(distance(a, b, alpha=alpha, smoothing=smoothing) for a, b in itertools.combinations(samples, 2))
        return attraction * (2 / (m * k)) - repulsion * (temperature * 2 / (m * (m - 1)))


class EnergyScore(nn.Module):
    """Energy score and the noise-driven generator that it trains: x = g(hidden, noise)."""

    evaluations_per_token = 1  # network evaluations to draw one token

    def __init__(
        self,
        *,
        hidden_width: int,
        token_channels: int,
        width: int,
        depth: int,
        alpha: float,
        samples: int,
        smoothing: float,
        noise: str,  # uniform or gaussian
        noise_channels: int,
    ):
        super().__init__()
        self.alpha, self.samples, self.smoothing = alpha, samples, smoothing
        self.noise, self.noise_channels = noise, noise_channels
        self.hidden_embedding = nn.Linear(hidden_width, width)
        self.noise_embedding = nn.Linear(noise_channels, width)
        self.network = ModulatedMLP(width=width, depth=depth, out_channels=token_channels)

    def generate(self, hidden: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """hidden [N, W], noise [..., N, n] => tokens [..., N, D]; the inference temperature scales the noise's shifts.

        Unlike in a diffusion head the hidden state is the residual stream and the noise modulates it.
        """
        condition = self.noise_embedding(noise)
        stream = self.hidden_embedding(hidden).expand(condition.shape)
        return self.network(stream, condition, temperature)

    def draw_noise(self, shape: tuple[int, ...], source: Source, device: torch.device) -> Tensor:
        """Noise of the head, [*shape, n]."""
        shape = (*shape, self.noise_channels)
        return normal(shape, source, device) if self.noise == "gaussian" else uniform(shape, source, device) - 0.5

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
        """hidden [N, W], target [N, D] or [k, N, D] => negative score per token [N], float32."""
        noise = self.draw_noise((self.samples, len(hidden)), generator, hidden.device)
        samples = self.generate(hidden, noise)
        targets = target if target.dim() == 3 else target[None]
        return energy_loss(samples, targets, alpha=self.alpha, temperature=temperature, smoothing=self.smoothing)

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Source,
        temperature: float = 1.0,
        unconditional: Tensor | None = None,  # hidden states of the null class, for guidance
        guidance: float = 1.0,
    ) -> Tensor:
        """hidden [N, W] => one token per row [N, D]; guidance extrapolates the hidden state."""
        if unconditional is not None:
            hidden = guidance * hidden + (1 - guidance) * unconditional
        return self.generate(hidden, self.draw_noise((len(hidden),), source, hidden.device), temperature)
