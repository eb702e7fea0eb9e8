"""Strict propriety of every rule in two dimensions: the expected loss, by the library's code, is least at the truth.

Expectations over Gaussians are sums over quadrature nodes; only the diffusion loss is averaged over draws, the same
ones for every forecast.
"""

import math

import numpy as np
import pytest
import torch
from factories import score_options

from ear import scores
from ear.runtime.randomness import generator, stream
from ear.scores import hyvarinen
from ear.scores.energy import energy_loss
from ear.scores.logarithmic import Mixture
from ear.scores.sample_based import SampleBasedScore

DOUBLE = torch.float64
CORRELATIONS = [round(0.1 * k, 1) for k in range(-9, 10)]
SCALES = [round(0.5 + 0.05 * k, 2) for k in range(31)]


def nodes(radii=32, angles=48) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [n, 2] and weights [n] of the standard normal: half the squared radius is exponential, the angle even."""
    u, w = map(torch.tensor, np.polynomial.laguerre.laggauss(radii))
    angle = 2 * math.pi * torch.arange(angles, dtype=DOUBLE) / angles
    directions = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return ((2 * u).sqrt()[:, None, None] * directions).flatten(0, 1), (w / angles).repeat_interleave(angles)


POINTS, WEIGHTS = nodes()


def correlated(correlation: float) -> torch.Tensor:
    return torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=DOUBLE)


def scaled(scale: float) -> torch.Tensor:
    return scale**2 * torch.eye(2, dtype=DOUBLE)


def build(name: str, **options) -> scores.Score:
    size = scores.HeadSize(hidden_width=4, token_channels=2, width=8, depth=1)
    return scores.build(score_options(name).model_copy(update=options), size)  # unchecked: alpha can be 2


def pairwise(score: SampleBasedScore, forecast: torch.Tensor, truth: torch.Tensor) -> float:
    """2 E d(x, y) - E d(x, x'): differences of independent Gaussians are Gaussian."""

    def expected(covariance):
        differences = POINTS @ torch.linalg.cholesky(covariance).T
        return WEIGHTS @ score.distance(differences, torch.zeros_like(differences))

    return float(2 * expected(forecast + truth) - expected(2 * forecast))


def log_loss(forecast: torch.Tensor, truth: torch.Tensor) -> float:
    zero = torch.zeros(1, 1, 2, dtype=DOUBLE)
    mixture = Mixture(zero[..., 0], zero, torch.linalg.cholesky(forecast)[None, None])
    return float(-WEIGHTS @ mixture.log_density((POINTS @ torch.linalg.cholesky(truth).T)[None])[0])


def cross_entropy(forecast: torch.Tensor, truth: torch.Tensor) -> float:
    """Over a codebook on a grid, whose probabilities follow the Gaussians."""
    side = torch.linspace(-3, 3, 7, dtype=DOUBLE)
    codes = torch.cartesian_prod(side, side)
    logs = [-0.5 * (codes @ torch.linalg.inv(c) * codes).sum(-1) for c in (forecast, truth)]
    score = build("categorical", codes=len(codes))
    with torch.no_grad():
        score.projection.weight.zero_()
        score.projection.bias.copy_(logs[0])
        score.codebook.copy_(codes)
        losses = score.loss(torch.zeros(len(codes), 4), codes, temperature=1.0, source=stream(0)).value
    return float(logs[1].softmax(0) @ losses.double())


class ExactNoise(hyvarinen.HyvarinenScore):
    """Predicts the noise of N(0, covariance) exactly."""

    covariance: torch.Tensor

    def predict(self, noised, time, hidden):
        level = hyvarinen.cosine_alpha_bar(hyvarinen.TRAINING_STEPS)[:, None, None]
        identity = torch.eye(noised.shape[1], dtype=DOUBLE)
        gain = (1 - level).sqrt() * torch.linalg.inv(level * self.covariance + (1 - level) * identity)
        noise = (gain[time] @ noised.double()[..., None])[..., 0]
        return noise.float(), torch.full_like(noised, 0.5)


def denoising_loss(forecast: torch.Tensor, truth: torch.Tensor, count=8000, kind=ExactNoise) -> float:
    channels = len(truth)
    size = scores.HeadSize(hidden_width=4, token_channels=channels, width=8, depth=1)
    score = kind(score_options("hyvarinen", samples=1), size)
    score.covariance = forecast
    y = torch.randn(count, channels, generator=generator(0, "y"), dtype=DOUBLE) @ torch.linalg.cholesky(truth).T
    return float(score.loss(torch.zeros(count, 4), y.float(), temperature=1.0, source=stream(1)).value.mean())


RULES = {
    "energy, alpha 1": lambda p, q: pairwise(build("energy"), p, q),
    "energy, alpha 0.5": lambda p, q: pairwise(build("energy", alpha=0.5, smoothing=1e-2), p, q),
    "energy, alpha 1.75": lambda p, q: pairwise(build("energy", alpha=1.75), p, q),
    "energy, smoothed": lambda p, q: pairwise(build("energy", smoothing=0.5), p, q),
    "kernel": lambda p, q: pairwise(build("kernel"), p, q),
    "logarithmic": log_loss,
    "hyvarinen": denoising_loss,
    "categorical": cross_entropy,
}


def test_every_score_is_among_them():
    assert {rule.partition(",")[0] for rule in RULES} == set(scores.SCORES)


@pytest.mark.parametrize("rule", RULES)
def test_expected_loss_is_least_at_the_true_correlation(one_thread, rule):
    losses = [RULES[rule](correlated(r), correlated(0.5)) for r in CORRELATIONS]
    assert CORRELATIONS[int(np.argmin(losses))] == 0.5
    assert all(np.diff(losses[: CORRELATIONS.index(0.5) + 1]) < 0)  # and it falls all the way there


@pytest.mark.parametrize("rule", RULES)
def test_expected_loss_is_least_at_the_true_scale(one_thread, rule):
    losses = [RULES[rule](scaled(s), scaled(1.0)) for s in SCALES]
    assert SCALES[int(np.argmin(losses))] == 1.0


def test_alpha_two_sees_neither():
    rule = lambda p, q: pairwise(build("energy", alpha=2.0), p, q)  # noqa: E731 - as above
    for family in ([correlated(r) for r in CORRELATIONS], [scaled(s) for s in SCALES]):
        losses = [rule(p, family[5]) for p in family]
        assert max(losses) - min(losses) < 1e-5


def test_samples_show_alpha_two_blind_to_a_wider_forecast():
    """The same by the estimator: another forecast of equal mean costs nothing at alpha 2, and something at alpha 1."""
    n = 200_000
    x, y = torch.randn(2, n, 1, generator=generator(0)), torch.randn(1, n, 1, generator=generator(1))
    for alpha, blind in ((2.0, True), (1.0, False)):
        gap = energy_loss(1.5 * x, y, alpha=alpha) - energy_loss(x, y, alpha=alpha)
        seen = gap.mean() > 4 * gap.std() / math.sqrt(n)
        assert seen == (not blind)


def test_regret_of_the_denoising_loss_is_the_fisher_divergence_over_noise_levels():
    """E|e - e_p|^2 - E|e - e_q|^2 = mean over levels of (1 - a) E|score_p - score_q|^2, for N(0, v) against N(0, 1)."""

    class ErrorOnly(ExactNoise):
        def _variance_bound(self, target, *_):
            return torch.zeros(len(target))

    level, one = hyvarinen.cosine_alpha_bar(hyvarinen.TRAINING_STEPS), torch.ones(1, 1, dtype=DOUBLE)
    for variance in (0.25, 4.0):
        regret = denoising_loss(variance * one, one, 200_000, ErrorOnly) - denoising_loss(one, one, 200_000, ErrorOnly)
        fisher = ((1 - level) * (1 - 1 / (level * variance + 1 - level)).square()).mean()
        assert abs(regret / fisher - 1) < 0.05


def test_energy_sees_the_weights_of_far_modes():
    """Modes at +-6 of weights 0.9 and 0.1 against equal ones: what the score of a single noise level cannot see."""
    x = torch.linspace(-12, 12, 481, dtype=DOUBLE)[:, None]
    bump = lambda mode: torch.exp(-((x[:, 0] - mode) ** 2) / 2)  # noqa: E731 - a formula
    p, q = (w * bump(-6) + (1 - w) * bump(6) for w in (0.9, 0.5))
    p, q = p / p.sum(), q / q.sum()
    distance = build("energy").distance(x[:, None], x[None])
    regret = 2 * p @ distance @ q - p @ distance @ p - q @ distance @ q
    exact = 2 * (24 / 480) * (p.cumsum(0) - q.cumsum(0)).square().sum()  # twice the integral of squared differences
    assert regret > 3
    torch.testing.assert_close(regret, exact, rtol=1e-4, atol=0)
