"""Posterior moments against torch.distributions and against numpy over samples."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ear.runtime.randomness import generator
from ear.tokenizer import posterior


def moments(batch: int = 5, channels: int = 3) -> torch.Tensor:
    """Means around channel-dependent centres, log-variances around -1."""
    source = generator(0, "moments")
    mean = torch.randn(batch, channels, 2, 4, generator=source) + torch.arange(channels)[:, None, None]
    return torch.cat([mean, 0.5 * torch.randn(batch, channels, 2, 4, generator=source) - 1], dim=1)


def test_samples_are_mean_plus_scaled_noise():
    m = moments()
    mean, log_variance = m[:, :3], m[:, 3:]
    noise = torch.randn(mean.shape, generator=generator(1))
    expected = mean + log_variance.exp().sqrt() * noise
    torch.testing.assert_close(posterior.posterior_sample(m, noise), expected)


def test_stored_moments_are_computed_with_in_float32():
    m = moments().half()
    assert [part.dtype for part in posterior.split(m)] == [torch.float32] * 2
    assert posterior.posterior_sample(m, torch.zeros(5, 3, 2, 4)).dtype == torch.float32
    assert torch.equal(posterior.split(m)[0], m[:, :3].float())


def test_divergence_is_that_of_the_normal_distributions():
    m = moments()
    posteriors = Normal(m[:, :3], (0.5 * m[:, 3:]).exp())
    expected = kl_divergence(posteriors, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl_divergence(m), expected)
    assert torch.equal(posterior.kl_divergence(torch.zeros(2, 6, 2, 4)), torch.zeros(2))


def test_sums_add_up_over_batches():
    m = moments()
    torch.testing.assert_close(posterior.sums(m[:2]) + posterior.sums(m[2:]), posterior.sums(m), rtol=1e-12, atol=0)
    assert posterior.sums(m).dtype == torch.float64
    assert posterior.sums(m)[0].tolist() == [5 * 2 * 4] * 3


def test_spread_is_numpys_over_samples():
    m = moments().double()
    noise = torch.randn(20_000, 5, 3, 2, 4, generator=generator(2), dtype=torch.float64)
    sampled = (m[:, :3] + (0.5 * m[:, 3:]).exp() * noise).numpy()
    mean, std, within = posterior.spread(posterior.sums(m))
    np.testing.assert_allclose(mean, sampled.mean(axis=(0, 1, 3, 4)), atol=5e-3)
    np.testing.assert_allclose(std, sampled.std(axis=(0, 1, 3, 4)), rtol=5e-3)
    np.testing.assert_allclose(within, np.sqrt(sampled.var(axis=0).mean(axis=(0, 2, 3))), rtol=5e-3)
    mean, std, _ = posterior.spread(posterior.sums(m).sum(dim=1, keepdim=True))
    assert mean.item() == pytest.approx(sampled.mean(), abs=5e-3)
    assert std.item() == pytest.approx(sampled.std(), rel=5e-3)


def test_spread_of_a_constant_is_zero_not_nan():
    constant = torch.cat([torch.full((3, 1, 2, 2), 1000.1), torch.full((3, 1, 2, 2), -30.0)], dim=1)
    mean, std, within = posterior.spread(posterior.sums(constant))
    assert mean.item() == pytest.approx(1000.1, rel=1e-6)
    assert within.item() == pytest.approx(np.exp(-15))
    assert 0 < std.item() < 1e-3
