"""The baselines of the benchmarks compute what is compared with them."""

import torch

from benchmarks.models import untrained
from benchmarks.sampling import naive
from benchmarks.training import plain_loss
from ear.config.compose import compose
from ear.model.masked import MaskedModel
from ear.runtime.randomness import image_streams, stream
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings

SMALL = ["preset=digits_smoke", "sample.steps=5", "sample.guidance=3.0", "model.dropout=0.0"]


def test_both_ways_of_sampling_draw_the_same_latents(one_thread):
    parameters = compose(SMALL)
    model, settings = untrained(parameters), SamplingSettings.of(parameters.sample)
    assert isinstance(model, MaskedModel)
    labels = torch.arange(7) % 10
    ours = sample(model, labels.tolist(), settings, source=image_streams(0, range(7)))
    tokens = naive(model, labels, settings, image_streams(0, range(7)))
    baseline = tokens.unflatten(1, model.shape.latent[1:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, baseline, rtol=0, atol=1e-5)


def test_both_ways_of_training_have_the_same_loss(one_thread):
    """With all tokens masked, so that both draw noise for the same ones."""
    model = untrained(compose([*SMALL, "model.mask_ratio_min=1.0"]))
    assert isinstance(model, MaskedModel)
    latents = torch.randn(6, *model.shape.latent, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    ours = model.loss(latents, labels, temperature=1.0, source=stream(0, "loss")).value
    torch.testing.assert_close(plain_loss(model, latents, labels, stream(0, "loss")), ours, rtol=1e-5, atol=0)
