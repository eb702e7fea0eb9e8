"""Figures beyond the log that show how a training goes."""

import pytest
import torch
from factories import tiny_model

from ear.model.autoregressive import MeanLoss
from ear.model.monitoring import Monitor, by_share
from ear.runtime.randomness import generator


def test_losses_by_share_of_predicted_tokens():
    found = by_share([0.2, 0.3, 0.4, 1.0], [1.0, 2.0, 4.0, 8.0], [0.2, 0.4, 0.8, 1.0])
    assert found == {"loss_masked_20_40": 1.5, "loss_masked_40_80": 4.0, "loss_masked_80_100": 8.0}
    assert len(by_share([], [], [0.99, 0.9925, 0.995, 0.9975, 1.0])) == 4
    assert by_share([0.5], [3.0], [0.2, 0.4, 1.0]) == {"loss_masked_20_40": None, "loss_masked_40_100": 3.0}


def test_a_monitor_counts_from_row_to_row_and_names_losses_to_compare_with():
    model = tiny_model()
    images, channels = 1000, model.shape.token_channels
    means = 10 * torch.arange(model.tokens)[:, None]  # a prediction that knows the position knows them
    noise = torch.randn(images, model.tokens, channels, generator=generator(0, "tokens"))
    tokens = (means + noise).flatten(0, 1)
    monitor = Monitor(model, tokens, 0.9, torch.device("cpu"))
    row = {"images_per_second": 10.0}
    for value in (1.0, 3.0):
        monitor.saw(MeanLoss(torch.tensor(value), {}, 1.0))
    figures = monitor.figures(row)
    *others, last = [name for name in figures if name.startswith("loss_masked")]
    assert (figures[last], {figures[name] for name in others}) == (2.0, {None})
    assert monitor.figures(row)[last] is None
    assert figures["untrained_loss"] == pytest.approx(2 * tokens.norm(dim=1).mean().item(), rel=1e-4)
    # E|y - y'| of a standard normal distribution is sqrt(2) E|y|; it is attracted twice, and repelled 0.9 times.
    assert figures["context_free_loss"] == pytest.approx(1.1 * 2**0.5 * noise.norm(dim=-1).mean().item(), rel=0.03)
    one_image = model.score.references(noise[:1], temperature=1.0)
    assert one_image == {"untrained_loss": pytest.approx(2 * noise[0].norm(dim=-1).mean().item(), rel=1e-4)}
