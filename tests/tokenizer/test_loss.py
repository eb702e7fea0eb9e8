"""The autoencoder's loss against independent computations."""

import numpy as np
import pytest
import torch
from factories import tiny_autoencoder
from prepared_sets import pixels

from ear.data.images import to_signed
from ear.runtime.randomness import generator
from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import kl_structure, new_kl
from ear.tokenizer.loss import AutoencoderLoss
from ear.tokenizer.perceptual import load_perceptual

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_is_mean_absolute_error_plus_divergence_per_pixel():
    tokenizer, images = tiny_autoencoder(), to_signed(pixels(4))
    noise = torch.randn(4, 3, 4, 4, generator=generator(1))
    terms = AutoencoderLoss(kl_weight=0.5)(tokenizer, images, noise)
    moments = tokenizer.encode(images)
    decoded = tokenizer.decode(posterior.posterior_sample(moments, noise)).numpy()
    error = np.abs(images.numpy() - decoded).mean()
    divergence = float(posterior.kl_divergence(moments).mean())
    assert float(terms.figures["reconstruction"]) == pytest.approx(error, rel=1e-5)
    assert float(terms.figures["kl"]) == pytest.approx(divergence, rel=1e-6)
    assert terms.figures.keys() == {"reconstruction", "kl"}
    assert float(terms.loss) == pytest.approx(error + 0.5 * divergence / (3 * 8 * 8), rel=1e-5)


def test_the_loss_reaches_every_weight():
    tokenizer = tiny_autoencoder().requires_grad_(True)
    terms = AutoencoderLoss(kl_weight=1e-3)(tokenizer, to_signed(pixels(2)), torch.zeros(2, 3, 4, 4))
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


def test_perceptual_distance_is_added_with_its_weight(perceptual_folder):
    perceptual = load_perceptual(perceptual_folder)
    structure = kl_structure(channels=3, block_channels=[8, 16], layers=1)
    tokenizer, images = new_kl(seed=0, image_size=16, structure=structure), to_signed(pixels(2, size=16))
    noise = torch.zeros(2, 3, 8, 8)
    plain = AutoencoderLoss(kl_weight=0.5)(tokenizer, images, noise)
    terms = AutoencoderLoss(0.5, perceptual, 2.0)(tokenizer, images, noise)
    distance = perceptual(images, plain.decoded).mean()
    assert distance.item() > 0.01
    assert float(terms.figures["perceptual"]) == pytest.approx(distance.item(), rel=1e-5)
    assert (terms.loss - plain.loss).item() == pytest.approx(2 * distance.item(), rel=1e-4)
    terms.loss.backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())
    assert all(p.grad is None for p in perceptual.parameters())
