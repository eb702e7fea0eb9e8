"""The autoencoder's loss and the figures of a trained one, against independent computations."""

import numpy as np
import pytest
import torch
from prepared_sets import pixels
from skimage.metrics import peak_signal_noise_ratio

from ear import posterior
from ear.autoencoder import Identity, kl_structure, new_kl
from ear.autoencoder_loss import AutoencoderLoss, describe, psnr, reconstruct
from ear.images import to_signed, to_uint8
from ear.perceptual import load_perceptual
from ear.randomness import generator

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny():
    """An autoencoder whose posteriors have standard deviations around 0.6."""
    tokenizer = new_kl(seed=0, image_size=8, structure=kl_structure(channels=3, block_channels=[8, 16], layers=1))
    with torch.no_grad():
        tokenizer.network.quant_conv.bias[3:] -= 1
    return tokenizer.eval().requires_grad_(False)


def test_the_loss_is_mean_absolute_error_plus_divergence_per_pixel():
    tokenizer, images = tiny(), to_signed(pixels(4))
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
    tokenizer = tiny().requires_grad_(True)
    terms = AutoencoderLoss(kl_weight=1e-3)(tokenizer, to_signed(pixels(2)), torch.zeros(2, 3, 4, 4))
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


def test_psnr_is_scikit_images():
    first, second = pixels(3), pixels(3, seed=1)
    second[1] = first[1]
    second[1, 0, 0, 0] ^= 1
    second[2] = first[2]
    found = psnr(torch.from_numpy(first), torch.from_numpy(second))
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(first[:2], second[:2], strict=True)]
    np.testing.assert_allclose(found, [*expected, 100.0], rtol=1e-12)


def test_identity_reconstructs_exactly():
    images = torch.from_numpy(pixels(3))
    assert torch.equal(reconstruct(Identity(image_size=8, downsample=2), images), images)


def test_reconstruction_goes_through_the_posterior_mean():
    tokenizer, images = tiny(), torch.from_numpy(pixels(3))
    mean = tokenizer.encode(to_signed(images))[:, :3]
    assert torch.equal(reconstruct(tokenizer, images), to_uint8(tokenizer.decode(mean)))


def test_figures_are_those_of_all_images_together():
    tokenizer, images = tiny(), torch.from_numpy(pixels(10))
    figures = describe(tokenizer, images.split(4), generator(0))
    moments = tokenizer.encode(to_signed(images)).double()
    mean, variance = moments[:, :3].numpy(), moments[:, 3:].exp().numpy()
    std = np.sqrt(mean.var(axis=(0, 2, 3)) + variance.mean(axis=(0, 2, 3)))
    assert figures["psnr"] == pytest.approx(float(psnr(images, reconstruct(tokenizer, images)).mean()))
    assert figures["kl"] == pytest.approx(float(posterior.kl_divergence(moments).mean()), rel=1e-5)
    np.testing.assert_allclose(figures["channel_mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(figures["channel_std"], std, rtol=1e-5)
    np.testing.assert_allclose(figures["channel_posterior_std"], np.sqrt(variance.mean(axis=(0, 2, 3))), rtol=1e-5)
    assert figures["latent_std"] == pytest.approx(np.sqrt(mean.var() + variance.mean()), rel=1e-5)
    assert figures["posterior_ratio"] == pytest.approx(np.sqrt(variance.mean()) / figures["latent_std"], rel=1e-5)
    again = describe(tokenizer, images.split(4), generator(0))
    assert again == figures


def test_figures_of_the_identity():
    images = torch.from_numpy(pixels(6))
    figures = describe(Identity(image_size=8, downsample=2), [images], generator(0))
    assert figures["psnr"] == figures["psnr_sampled"] == 100.0
    assert figures["latent_std"] == pytest.approx(to_signed(images).std(correction=0).item(), rel=1e-5)
    assert figures["posterior_ratio"] < 1e-5


def test_perceptual_distance_is_added_with_its_weight(perceptual_folder):
    perceptual = load_perceptual(perceptual_folder)
    structure = kl_structure(channels=3, block_channels=[8, 16], layers=1)
    tokenizer, images = new_kl(seed=0, image_size=16, structure=structure), to_signed(pixels(2, size=16))
    noise = torch.zeros(2, 3, 8, 8)
    plain = AutoencoderLoss(kl_weight=0.5)(tokenizer, images, noise)
    terms = AutoencoderLoss(0.5, perceptual, 2.0)(tokenizer, images, noise)
    distance = perceptual(images, plain.decoded).mean()
    assert float(distance) > 0.01
    assert float(terms.figures["perceptual"]) == pytest.approx(float(distance), rel=1e-5)
    assert float(terms.loss - plain.loss) == pytest.approx(2 * float(distance), rel=1e-4)
    terms.loss.backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())
    assert all(p.grad is None for p in perceptual.parameters())
