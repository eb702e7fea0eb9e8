"""Reconstructions and the figures of a tokenizer, against independent computations."""

import numpy as np
import pytest
import torch
from factories import tiny_autoencoder
from prepared_sets import pixels
from skimage.metrics import peak_signal_noise_ratio

from ear.data.images import to_signed, to_uint8
from ear.runtime.randomness import stream
from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Identity
from ear.tokenizer.reconstruction import describe, psnr, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")


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
    tokenizer, images = tiny_autoencoder(), torch.from_numpy(pixels(3))
    mean = tokenizer.encode(to_signed(images))[:, :3]
    assert torch.equal(reconstruct(tokenizer, images), to_uint8(tokenizer.decode(mean)))


def test_figures_are_those_of_all_images_together():
    tokenizer, images = tiny_autoencoder(), torch.from_numpy(pixels(10))
    figures, channels = describe(tokenizer, images.split(4), stream(0))
    moments = tokenizer.encode(to_signed(images)).double()
    mean, variance = moments[:, :3].numpy(), moments[:, 3:].exp().numpy()
    std = np.sqrt(mean.var(axis=(0, 2, 3)) + variance.mean(axis=(0, 2, 3)))
    assert figures["psnr"] == pytest.approx(float(psnr(images, reconstruct(tokenizer, images)).mean()))
    assert figures["kl"] == pytest.approx(float(posterior.kl_divergence(moments).mean()), rel=1e-5)
    columns = {name: [row[name] for row in channels] for name in ("channel", "mean", "std", "posterior_std")}
    assert columns["channel"] == [0, 1, 2]
    np.testing.assert_allclose(columns["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(columns["std"], std, rtol=1e-5)
    np.testing.assert_allclose(columns["posterior_std"], np.sqrt(variance.mean(axis=(0, 2, 3))), rtol=1e-5)
    assert figures["latent_std"] == pytest.approx(np.sqrt(mean.var() + variance.mean()), rel=1e-5)
    assert figures["posterior_ratio"] == pytest.approx(np.sqrt(variance.mean()) / figures["latent_std"], rel=1e-5)
    again = describe(tokenizer, images.split(4), stream(0))
    assert again == (figures, channels)


def test_figures_of_the_identity():
    images = torch.from_numpy(pixels(6))
    figures, _ = describe(Identity(image_size=8, downsample=2), [images], stream(0))
    assert figures["psnr"] == figures["psnr_sampled"] == 100.0
    assert figures["latent_std"] == pytest.approx(to_signed(images).std(correction=0).item(), rel=1e-5)
    assert figures["posterior_ratio"] < 1e-5
