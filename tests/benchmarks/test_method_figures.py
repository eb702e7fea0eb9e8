"""The figures of docs/method.md."""

import pytest
import torch

from benchmarks.method_figures import expected_loss
from ear.runtime.randomness import generator
from ear.scores.energy import energy_loss


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_landscape_is_the_mean_of_the_loss_that_is_trained(alpha):
    source = generator(0, "landscape")
    target, *pair = (torch.randn(200_000, 1, generator=source) for _ in range(3))
    for spread in (0.4, 1.0, 2.0):
        samples = spread * torch.stack(pair)
        mean = energy_loss(samples, target[None], alpha=alpha).mean()
        torch.testing.assert_close(expected_loss(torch.tensor(spread), alpha), mean, rtol=0, atol=0.01)


def test_only_exponents_below_2_find_the_true_spread():
    spreads = torch.linspace(0, 2.5, 51)
    for alpha in (0.5, 1.0, 1.5):
        assert spreads[expected_loss(spreads, alpha).argmin()] == 1.0
    torch.testing.assert_close(expected_loss(spreads, 2.0), torch.full((51,), 2.0))
