"""The perceptual network against torch-fidelity's, and its files."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch_fidelity.sample_similarity_lpips as theirs
import torchvision
from perceptual_files import generated_files
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from ear.files.digests import sha256
from ear.runtime.randomness import generator
from ear.tokenizer.perceptual import Perceptual, load_perceptual

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(perceptual_folder) -> Path:
    return perceptual_folder


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    source = generator(0, "pair")
    return tuple(torch.rand(2, 3, 24, 32, generator=source) * 2 - 1 for _ in range(2))


def test_distances_are_torch_fidelitys(folder, monkeypatch):
    """Its network and its arithmetic, with its downloads replaced by our files."""
    features = make_layers(cfgs["D"], batch_norm=False)
    vgg = torch.load(folder / "vgg16-397923af.pth")
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in vgg.items()})
    channel_weights = torch.load(folder / "weights-vgg16-lpips.pth")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: channel_weights)
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=features))
    judge = theirs.SampleSimilarityLPIPS("lpips-vgg16")
    first, second = pair()
    expected = judge((first + 1) * 127.5, (second + 1) * 127.5)
    found = load_perceptual(folder)(first, second)
    assert expected.min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_equal_images_have_distance_zero_and_distances_are_symmetric(folder):
    network = load_perceptual(folder)
    first, second = pair()
    assert torch.equal(network(first, first), torch.zeros(2))
    torch.testing.assert_close(network(first, second), network(second, first))


def test_gradients_are_finite_where_all_features_vanish(folder):
    network = load_perceptual(folder)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.bias.fill_(-5.0)  # no feature survives
    first, second = pair()
    second.requires_grad_(True)
    network(first, second).sum().backward()
    assert torch.equal(second.grad, torch.zeros_like(second))


def test_gradients_point_downhill(folder):
    network = load_perceptual(folder)
    first, second = pair()
    second.requires_grad_(True)
    before = network(first, second).sum()
    (gradient,) = torch.autograd.grad(before, second)
    after = network(first, second - 1e-3 * gradient / gradient.norm()).sum()
    assert (before - after).item() == pytest.approx(1e-3 * gradient.norm().item(), rel=0.2)


def test_network_is_frozen(folder):
    network = load_perceptual(folder)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.levels.parameters()) == 14_714_688  # VGG16 without its classifier


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth does not exist; put it there, or set"):
        load_perceptual(tmp_path)
    generated_files(tmp_path)
    (tmp_path / "weights-vgg16-lpips.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights-vgg16-lpips\.pth cannot be read as plain weights"):
        load_perceptual(tmp_path)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "weights-vgg16-lpips.pth")
    with pytest.raises(ValueError, match=r"the perceptual network in .* lacks channel_weights\.1"):
        load_perceptual(tmp_path)


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """Generated files where torch would download from, and torch's own folder empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = generated_files(tmp_path / "web")
    vgg = folder / f"vgg16-{sha256(folder / 'vgg16-397923af.pth')[:8]}.pth"
    (folder / "vgg16-397923af.pth").rename(vgg)
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=vgg.as_uri()))
    monkeypatch.setattr(torchvision.models, "VGG16_Weights", weights)
    monkeypatch.setattr(theirs, "URL_VGG16_LPIPS", (folder / "weights-vgg16-lpips.pth").as_uri())
    return folder


def test_files_are_downloaded_once(published, tmp_path):
    network = load_perceptual()
    assert torch.equal(network.levels[0][0].weight, load_perceptual(published).levels[0][0].weight)
    assert len(list((tmp_path / "torch/hub/checkpoints").iterdir())) == 2
    for path in published.iterdir():
        path.unlink()
    assert isinstance(load_perceptual(), Perceptual)


def test_what_cannot_be_downloaded_or_is_damaged_is_said_with_the_remedy(published, tmp_path):
    channel_weights, vgg = published / "weights-vgg16-lpips.pth", next(published.glob("vgg16-*"))
    content = channel_weights.read_bytes()
    channel_weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"vgg16-lpips\.pth cannot be downloaded .* put it and the other"):
        load_perceptual()
    channel_weights.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"checkpoints/weights-vgg16-lpips\.pth cannot be read as plain weights"):
        load_perceptual()
    cached = tmp_path / "torch/hub/checkpoints" / vgg.name
    cached.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{vgg.name} is damaged: its SHA-256 does not start with"):
        load_perceptual()
    cached.unlink()
    vgg.write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=rf"{vgg.name} cannot be downloaded \(invalid hash value"):
        load_perceptual()
    assert not cached.exists()
