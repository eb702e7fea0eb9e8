"""The logarithmic score of a Gaussian mixture: the likelihood head of GIVT (Tschannen et al., 2024).

Shapes: N tokens, D token channels, K components, W hidden width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ear.randomness import Source, normal, uniform
from ear.scores.score import Score

_INIT_SD = 0.02  # an all-zero start is an exact saddle: equal components get equal gradients for ever


@dataclass(frozen=True)
class Mixture:
    """Parameters of N Gaussian mixtures; `factors` are the components' Cholesky factors or diagonal scales."""

    logits: Tensor  # [N, K]
    means: Tensor  # [N, K, D]
    factors: Tensor  # scales [N, K, D], or lower triangular [N, K, D, D]

    @property
    def full(self) -> bool:
        """Whether the components have full covariance."""
        return self.factors.dim() == 4

    def component(self, index: Tensor) -> "Mixture":
        """The components `index` [N] as mixtures of one."""
        rows = torch.arange(len(index), device=index.device)
        return Mixture(*(values[rows, index][:, None] for values in (self.logits, self.means, self.factors)))

    def log_density(self, y: Tensor) -> Tensor:
        """y [N, D] => log p(y) [N], in nats."""
        difference = y[:, None] - self.means  # [N, K, D]
        if self.full:
            white = torch.linalg.solve_triangular(self.factors, difference[..., None], upper=False)[..., 0]
            log_scales = self.factors.diagonal(dim1=-2, dim2=-1).log()
        else:
            white, log_scales = difference / self.factors, self.factors.log()
        log_normal = -0.5 * white.square() - log_scales - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(self.logits.log_softmax(-1) + log_normal.sum(-1), dim=-1)


def square_plus(x: Tensor, floor: float) -> Tensor:
    """Positive scales (x + sqrt(x^2 + 4)) / 2, at least `floor`."""
    return ((x + (x * x + 4).sqrt()) / 2).clamp_min(floor)


class LogarithmicScore(Score):
    """Log-likelihood of a K-component mixture whose parameters are linear in the hidden state."""

    options = ("components", "covariance", "scale_floor")
    temperature_scales = "the standard deviations of the chosen component"
    guidance_extrapolates = "log-density of the chosen component"

    def __init__(
        self,
        *,
        hidden_width: int,
        token_channels: int,
        width: int,  # not used: as in GIVT the head is one linear layer
        depth: int,  # not used
        components: int,
        covariance: str,  # diagonal or full
        scale_floor: float,
    ):
        super().__init__()
        self.components, self.channels = components, token_channels
        self.full, self.scale_floor = covariance == "full", scale_floor
        d = token_channels
        self.sizes = (1, d, d * (d + 1) // 2 if self.full else d)  # of a component: logit, mean, factor
        self.projection = nn.Linear(hidden_width, components * sum(self.sizes))

    def initialise(self, generator: torch.Generator) -> None:
        """Break the symmetry between components: weights N(0, 0.02^2)."""
        nn.init.normal_(self.projection.weight, std=_INIT_SD, generator=generator)
        nn.init.zeros_(self.projection.bias)

    def mixture(self, hidden: Tensor) -> Mixture:
        """hidden [N, W] => mixtures, in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.projection(hidden.float()).unflatten(-1, (self.components, -1))
            logits, means, factors = raw.split(self.sizes, dim=-1)
            build = self._cholesky if self.full else lambda raw: square_plus(raw, self.scale_floor)
            return Mixture(logits[..., 0], means, build(factors))

    def _cholesky(self, raw: Tensor) -> Tensor:
        """Raw numbers [..., D (D + 1) / 2] => lower triangular factors; only the diagonal is made positive."""
        d = self.channels
        rows, columns = torch.tril_indices(d, d, device=raw.device)
        values = torch.where(rows == columns, square_plus(raw, self.scale_floor), raw)
        factors = raw.new_zeros(*raw.shape[:-1], d, d)
        factors[..., rows, columns] = values
        return factors

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
        """hidden [N, W], target [N, D] => -log p(target) [N] in nats per token; training temperature has no meaning."""
        return -self.mixture(hidden).log_density(target.float())

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Source,
        temperature: float = 1.0,  # multiplies the standard deviations
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """hidden [N, W] => [N, D]: a component by its weight, then its Gaussian, guided in density."""
        mixture = self.mixture(hidden)
        threshold = uniform((len(hidden), 1), source, hidden.device)
        cumulative = mixture.logits.softmax(-1).cumsum(-1)
        index = (cumulative < threshold * cumulative[:, -1:]).sum(-1)  # inversion: one number a token
        chosen = mixture.component(index)
        if unconditional is not None:
            chosen = guided(chosen, self.mixture(unconditional).component(index), guidance)
        noise = normal((len(hidden), self.channels), source, hidden.device)
        mean, factor = chosen.means[:, 0], chosen.factors[:, 0]
        spread = (factor @ noise[..., None])[..., 0] if chosen.full else factor * noise
        return mean + temperature * spread


def guided(conditional: Mixture, unconditional: Mixture, scale: float) -> Mixture:
    """One Gaussian per token, proportional to p_c^scale p_u^(1 - scale): GIVT's density guidance in closed form.

    Where that is no density (its precision is not positive) the conditional one stays: per channel for diagonal
    covariances, per token for full ones.
    """
    return (_guided_full if conditional.full else _guided_diagonal)(conditional, unconditional, scale)


def _guided_diagonal(c: Mixture, u: Mixture, scale: float) -> Mixture:
    weight_c, weight_u = scale / c.factors.square(), (1 - scale) / u.factors.square()
    precision = weight_c + weight_u
    proper = precision > 0
    safe = torch.where(proper, precision, torch.ones_like(precision))
    means = torch.where(proper, (weight_c * c.means + weight_u * u.means) / safe, c.means)
    return Mixture(c.logits, means, torch.where(proper, safe.rsqrt(), c.factors))


def _guided_full(c: Mixture, u: Mixture, scale: float) -> Mixture:
    weight_c = scale * torch.cholesky_inverse(c.factors)
    weight_u = (1 - scale) * torch.cholesky_inverse(u.factors)
    root, failed = torch.linalg.cholesky_ex(weight_c + weight_u)  # precision = root root^T
    proper = (failed == 0)[..., None, None]
    identity = torch.eye(root.shape[-1], device=root.device).expand_as(root)
    root = torch.where(proper, root, identity)
    pull = weight_c @ c.means[..., None] + weight_u @ u.means[..., None]
    means = torch.where(proper[..., 0], torch.cholesky_solve(pull, root)[..., 0], c.means)
    covariance = torch.cholesky_inverse(root)
    factors = torch.where(proper, torch.linalg.cholesky_ex(covariance)[0], c.factors)
    return Mixture(c.logits, means, factors)
