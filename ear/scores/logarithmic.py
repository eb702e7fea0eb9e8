"""The logarithmic score of a Gaussian mixture: GIVT's likelihood head (Tschannen et al., 2024).

Shapes: N tokens, D token channels, K components, W hidden width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ear.config.scores import Logarithmic
from ear.runtime.randomness import Stream, choose, normal
from ear.scores.score import DENOISING, Denoising, HeadSize, Score, TokenLoss

_CANDIDATES = 64  # draws that guidance selects from; at GIVT's scale of 1.4, 64 are enough to match the formula
# Values per block of candidates: to fit a CPU's cache, or need few launches on a GPU. They do not affect the samples.
_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**24
_INIT_SD = 0.02  # with zeros, all components would stay equal: they get equal gradients


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

    def log_density(self, y: Tensor) -> Tensor:
        """Points y [N, P, D], P for each mixture => log p(y) [N, P], in nats."""
        difference = y[:, None] - self.means[:, :, None]  # [N, K, P, D]
        if self.full:
            white = torch.linalg.solve_triangular(self.factors, difference.mT, upper=False).mT
            log_scales = self.factors.diagonal(dim1=-2, dim2=-1).log()
        else:
            white, log_scales = difference / self.factors[:, :, None], self.factors.log()
        log_normal = -0.5 * white.square() - log_scales[:, :, None] - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(self.logits.log_softmax(-1)[..., None] + log_normal.sum(-1), dim=1)

    def draw(self, source: Stream, *, temperature: float = 1.0) -> Tensor:
        """Draw a component, then from its Gaussian with standard deviations times `temperature` => [N, D]."""
        return self.place(*self.origins(1, source), temperature=temperature)[:, 0]

    def origins(self, count: int, source: Stream) -> tuple[Tensor, Tensor]:
        """Random inputs of P = `count` draws per mixture: components, int64 [N, P], and noise [N, P, D]."""
        index = choose(self.logits, source, count)
        return index, normal((*index.shape, self.means.shape[-1]), source, index.device)

    def place(self, index: Tensor, noise: Tensor, *, temperature: float) -> Tensor:
        """Components [N, P] and noise [N, P, D] => draws [N, P, D]."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        mean, factor = self.means[rows, index], self.factors[rows, index]
        # A sum, not a matrix product, which autocast and TF32 would round.
        spread = (factor * noise[..., None, :]).sum(-1) if self.full else factor * noise
        return mean + temperature * spread


def square_plus(x: Tensor, floor: float) -> Tensor:
    """Positive scales (x + sqrt(x^2 + 4)) / 2, at least `floor`."""
    return ((x + (x * x + 4).sqrt()) / 2).clamp_min(floor)


class LogarithmicScore(Score):
    """Log-likelihood of a K-component mixture; the head is one linear layer, as in GIVT."""

    temperature_scales = "the standard deviations of the components"
    guidance_extrapolates = "log-density, by choosing among draws"

    def __init__(self, options: Logarithmic, size: HeadSize):
        super().__init__()
        self.components, self.channels = options.components, size.token_channels
        self.full, self.scale_floor = options.covariance == "full", options.scale_floor
        d = size.token_channels
        self.sizes = (1, d, d * (d + 1) // 2 if self.full else d)  # numbers per component: logit, mean, factor
        self.projection = nn.Linear(size.hidden_width, self.components * sum(self.sizes))

    def initialise(self, generator: torch.Generator) -> None:
        """Break the symmetry between components: weights N(0, 0.02^2)."""
        nn.init.normal_(self.projection.weight, std=_INIT_SD, generator=generator)
        nn.init.zeros_(self.projection.bias)

    def mixture(self, hidden: Tensor) -> Mixture:
        """Hidden [N, W] => N mixtures, in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.projection(hidden.float()).unflatten(-1, (self.components, -1))
            logits, means, factors = raw.split(self.sizes, dim=-1)
            build = self._cholesky if self.full else lambda raw: square_plus(raw, self.scale_floor)
            return Mixture(logits[..., 0], means, build(factors))

    def _cholesky(self, raw: Tensor) -> Tensor:
        """Raw values [..., D (D + 1) / 2] => lower triangular factors [..., D, D] with a positive diagonal."""
        d = self.channels
        rows, columns = torch.tril_indices(d, d, device=raw.device)
        values = torch.where(rows == columns, square_plus(raw, self.scale_floor), raw)
        factors = raw.new_zeros(*raw.shape[:-1], d, d)
        factors[..., rows, columns] = values
        return factors

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, source: Stream) -> TokenLoss:
        """Hidden [N, W], target [N, D] => -log p(target) [N] in nats per token; the training temperature is ignored."""
        return TokenLoss(-self.mixture(hidden).log_density(target.float()[:, None])[:, 0])

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Stream,
        temperature: float = 1.0,  # multiplies the standard deviations
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        denoising: Denoising = DENOISING,  # ignored
    ) -> Tensor:
        """Hidden [N, W] => tokens [N, D]; guidance acts on the density (`guided`)."""
        mixture = self.mixture(hidden)
        if unconditional is None:
            return mixture.draw(source, temperature=temperature)
        return guided(mixture, self.mixture(unconditional), scale=guidance, source=source, temperature=temperature)


def guided(
    conditional: Mixture, unconditional: Mixture, *, scale: float, source: Stream, temperature: float = 1.0
) -> Tensor:
    """Sample from p_c^scale p_u^(1 - scale), GIVT's density guidance, by sampling importance resampling => [N, D].

    One of `_CANDIDATES` draws from the conditional mixture p_c is kept, with probability proportional to (p_c /
    p_u)^(scale - 1). This is exact in the limit of many draws and always stays in the support of the condition, whereas
    the quotient of two Gaussians need not be a density. It saturates at the best of the draws: with more channels or a
    larger scale, the effect falls short of the formula (two Gaussians half a standard deviation apart in 16 channels:
    the full shift of the mean at scale 1.4, half of it at 3). At other temperatures the draws have standard deviations
    times `temperature`; the ratio is unchanged.
    """

    def weigh(index: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        drawn = conditional.place(index, noise, temperature=temperature)
        return drawn, conditional.log_density(drawn) - unconditional.log_density(drawn)

    room = _CPU_BLOCK if conditional.means.device.type == "cpu" else _GPU_BLOCK
    block = max(1, room // conditional.factors.numel())
    origins = (part.split(block, dim=1) for part in conditional.origins(_CANDIDATES, source))
    candidates, ratio = (torch.cat(parts, dim=1) for parts in zip(*map(weigh, *origins), strict=True))
    kept = choose((scale - 1) * ratio, source)[:, 0]
    return candidates[torch.arange(len(kept), device=kept.device), kept]
