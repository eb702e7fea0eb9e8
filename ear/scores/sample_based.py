"""Scores estimated from samples: a noise-driven head, and the U-statistic over its samples.

The loss 2 E d(x, y) - E d(x, x'), a negative score, is strictly proper if d(a, b) = phi(|a - b|^2) for a non-linear
Bernstein function phi. A subclass only defines d (`distance`). Shapes: N tokens, D token channels, m samples per token,
k targets per token, W hidden width, n noise channels.
"""

import functools
import itertools
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ear.config.scores import Pairs, SampleBased
from ear.runtime.randomness import Stream, normal, uniform
from ear.scores.modulated_mlp import ModulatedMLP
from ear.scores.score import DENOISING, Denoising, HeadSize, Score, TokenLoss

Distance = Callable[[Tensor, Tensor], Tensor]  # [..., D], [..., D] => [...]


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 over the last dimension, in float32 or better: low precision loses the direction of near pairs."""
    difference = a.float() - b.float() if a.dtype.itemsize < 4 else a - b
    return difference.square().sum(-1)


def pairwise_loss(
    samples: Tensor,  # [m, N, D]; given the hidden state, those of a pair are independent
    targets: Tensor,  # [k, N, D]
    distance: Distance,
    *,
    temperature: float = 1.0,  # weight of the repulsion, in (0, 1]; only 1 is strictly proper
    pairs: Pairs = "all",  # which samples repel each other: see `_independent`
) -> TokenLoss:
    """Per-token loss [N]: an unbiased estimate of the negative score; with all pairs, a U-statistic.

    It is attraction - temperature * repulsion, and both are its parts. The attraction is 2/(mk) sum_ij d(x_i, y_j); the
    repulsion is the mean over pairs of d(x_i, x_j). More samples reduce the variance without changing the expectation;
    all pairs reduce it more than disjoint ones, antithetic samples more still. Distances are computed without autocast.
    """
    m, k = len(samples), len(targets)
    repelled = _independent(samples, pairs)
    with torch.autocast(samples.device.type, enabled=False):
        attraction = _sum(distance(x, y) for x, y in itertools.product(samples, targets)) * (2 / (m * k))
        repulsion = _sum(distance(a, b) for a, b in repelled) / len(repelled)
        parts = {"attraction": attraction.detach(), "repulsion": repulsion.detach()}
        return TokenLoss(attraction - temperature * repulsion, parts)


def _independent(samples: Tensor, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """The pairs of independent samples of [m, N, D], whose mean distance estimates E d(x, x').

    all: every pair; disjoint: each sample in one pair (the mean of m/2 two-sample losses); antithetic: every pair
    except samples i and i + m/2, which have opposite noise.
    """
    each = samples.unbind()  # not samples[i]: gradients would be summed in another order, which rounds differently
    m = len(each)
    if pairs == "disjoint":
        return list(zip(each[::2], each[1::2], strict=True))
    apart = m // 2 if pairs == "antithetic" else 0
    return [(each[i], each[j]) for i, j in itertools.combinations(range(m), 2) if j - i != apart]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, in order."""
    return functools.reduce(operator.add, terms)


class SampleBasedScore(Score):
    """A head that maps noise to tokens, x = g(hidden, noise), trained with the `distance` of a subclass."""

    temperature_scales = "the noise's shift of the features in every block"
    guidance_extrapolates = "hidden state"

    def __init__(self, options: SampleBased, size: HeadSize):
        super().__init__()
        self.samples, self.pairs, self.targets = options.samples, options.pairs, options.targets
        self.noise, self.noise_channels = options.noise, options.noise_channels
        self.hidden_embedding = nn.Linear(size.hidden_width, size.width)
        self.noise_embedding = nn.Linear(options.noise_channels, size.width)
        self.network = ModulatedMLP(width=size.width, depth=size.depth, out_channels=size.token_channels)

    def initialise(self, generator: torch.Generator) -> None:
        """Make the untrained head output 0 for every noise."""
        self.network.zero_initialise()

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of the score, [..., D], [..., D] => [...]."""

    def generate(self, hidden: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Hidden [N, W], noise [..., N, n] => tokens [..., N, D].

        Unlike in a diffusion head, the hidden state is the residual stream and the noise modulates it. `temperature`
        multiplies the shifts of the blocks, as published; scales and gates depend on the noise, too, so draws differ
        even at 0.
        """
        condition = self.noise_embedding(noise)
        stream = self.hidden_embedding(hidden).expand(condition.shape)
        return self.network(stream, condition, temperature)

    def draw_noise(self, shape: tuple[int, ...], source: Stream, device: torch.device) -> Tensor:
        """Draw noise for the head, [*shape, n]."""
        shape = (*shape, self.noise_channels)
        return normal(shape, source, device) if self.noise == "gaussian" else uniform(shape, source, device) - 0.5

    def _noise(self, tokens: int, source: Stream, device: torch.device) -> Tensor:
        """Noise of the samples in training [m, N, n]; antithetic: the second half is the first with opposite sign."""
        if self.pairs != "antithetic":
            return self.draw_noise((self.samples, tokens), source, device)
        half = self.draw_noise((self.samples // 2, tokens), source, device)
        return torch.cat([half, -half])

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, source: Stream) -> TokenLoss:
        """Hidden [N, W], target [N, D] or [k, N, D] => negative score per token [N], float32.

        Parts: attraction and repulsion, whose difference at temperature 1 is the loss.
        """
        noise = self._noise(len(hidden), source, hidden.device)
        targets = target if target.dim() == 3 else target[None]
        samples = self.generate(hidden, noise)
        return pairwise_loss(samples, targets, self.distance, temperature=temperature, pairs=self.pairs)

    def references(self, tokens: Tensor, temperature: float) -> dict[str, float]:
        """Losses to compare with, from tokens [images, L, D].

        untrained_loss: of a head that outputs 0, 2 E d(y, 0). context_free_loss: of a head that draws from all images'
        tokens at the same position, (2 - temperature) E d(y, y') with y, y' from different images; needs two images.
        """
        tokens = tokens.float()
        untrained = 2 * self.distance(tokens, torch.zeros_like(tokens)).mean().item()
        if len(tokens) < 2:
            return {"untrained_loss": untrained}
        apart = self.distance(tokens, tokens.roll(1, dims=0)).mean().item()  # from another image
        return {"untrained_loss": untrained, "context_free_loss": (2 - temperature) * apart}

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Stream,
        temperature: float = 1.0,
        unconditional: Tensor | None = None,  # hidden states of the null class, for guidance
        guidance: float = 1.0,
        denoising: Denoising = DENOISING,  # ignored
    ) -> Tensor:
        """Hidden [N, W] => one token per row [N, D]; guidance extrapolates the hidden state."""
        if unconditional is not None:
            hidden = guidance * hidden + (1 - guidance) * unconditional
        return self.generate(hidden, self.draw_noise((len(hidden),), source, hidden.device), temperature)
