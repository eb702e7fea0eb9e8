"""Principal components of patches: against scikit-learn, exact if all are kept, refused if there are fewer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_sets import pixels, write_prepared
from sklearn.decomposition import PCA as Independent

from ear.data.images import to_signed, to_uint8
from ear.data.prepared import PreparedImages
from ear.errors import UserError
from ear.files.digests import sha256
from ear.tokenizer.autoencoder import Identity, load_tokenizer, save_tokenizer
from ear.tokenizer.components import fit_pca

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path) -> PreparedImages:
    return prepared(tmp_path, smooth(40))


def smooth(count: int) -> np.ndarray:
    """Images whose pixels vary together, and each a little by itself."""
    own = pixels(count).astype(np.float64)
    return (0.6 * own.mean(axis=(1, 2), keepdims=True) + 0.2 * own.mean(axis=2, keepdims=True) + 0.2 * own).astype(
        np.uint8
    )


def prepared(folder: Path, images: np.ndarray) -> PreparedImages:
    return PreparedImages(write_prepared(folder / "data/prepared", images, [len(images) - 2], val=2), "train")


def all_of(images: PreparedImages) -> torch.Tensor:
    return torch.from_numpy(images.images(range(len(images))))


def patches(images: PreparedImages) -> np.ndarray:
    cells = Identity(image_size=8, downsample=2).encode(to_signed(all_of(images)))[:, :12]
    return cells.movedim(1, -1).reshape(-1, 12).double().numpy()


def latents(tokenizer, images: PreparedImages) -> torch.Tensor:
    mean, log_variance = tokenizer.encode(to_signed(all_of(images))).chunk(2, dim=1)
    assert (log_variance == -30).all()
    return mean


def test_components_are_those_of_another_implementation(images):
    tokenizer = fit_pca(images, downsample=2, channels=5, whitening=0.0)
    independent = Independent(5).fit(patches(images))
    products = tokenizer.components.double().numpy() @ independent.components_.T
    np.testing.assert_allclose(np.abs(products), np.eye(5), atol=1e-5)
    expected = np.abs(independent.transform(patches(images)))
    found = latents(tokenizer, images).movedim(1, -1).reshape(-1, 5).double().numpy()
    np.testing.assert_allclose(np.abs(found), expected, atol=1e-5)
    restored = independent.inverse_transform(independent.transform(patches(images)))
    decoded = Identity(image_size=8, downsample=2).encode(tokenizer.decode(latents(tokenizer, images)))[:, :12]
    np.testing.assert_allclose(decoded.movedim(1, -1).reshape(-1, 12).double().numpy(), restored, atol=1e-5)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_all_components_together_lose_nothing(images, whitening):
    tokenizer = fit_pca(images, downsample=2, channels=12, whitening=whitening)
    assert torch.equal(to_uint8(tokenizer.decode(latents(tokenizer, images).half().float())), all_of(images))


def test_whitening_sets_the_spread_of_the_channels(images):
    plain, half, whole = (
        latents(fit_pca(images, downsample=2, channels=12, whitening=w), images).double().std((0, 2, 3), correction=0)
        for w in (0.0, 0.5, 1.0)
    )
    assert plain.max() > 1.2 * plain.min()
    torch.testing.assert_close(whole, torch.ones(12).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(half, plain.sqrt(), atol=1e-4, rtol=0)


def test_a_fitted_tokenizer_is_saved_in_the_same_bytes_and_loaded(images, tmp_path):
    paths = [Path(tmp_path, name) for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        save_tokenizer(path, fit_pca(images, downsample=4, channels=7, whitening=0.5))
    assert sha256(paths[0]) == sha256(paths[1])
    tokenizer = fit_pca(images, downsample=4, channels=7, whitening=0.5)
    assert torch.equal(latents(load_tokenizer(paths[0]), images), latents(tokenizer, images))


def test_more_components_than_grey_patches_have_are_refused(tmp_path):
    images = prepared(tmp_path, np.repeat(smooth(40)[..., :1], 3, axis=3))
    tokenizer = fit_pca(images, downsample=2, channels=4, whitening=1.0)
    assert torch.equal(to_uint8(tokenizer.decode(latents(tokenizer, images))), all_of(images))
    with pytest.raises(UserError, match=r"channels is 5, but patches of 2 pixels .* have 4 components; lower it"):
        fit_pca(images, downsample=2, channels=5, whitening=1.0)
