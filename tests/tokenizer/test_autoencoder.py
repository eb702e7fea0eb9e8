"""Tokenizers: shapes, exactness, files."""

import json
import math
from pathlib import Path

import pytest
import torch

from ear.data.images import to_signed, to_uint8
from ear.files.digests import sha256
from ear.files.tensors import read_tensors, write_tensors
from ear.runtime.randomness import generator
from ear.tokenizer import autoencoder
from ear.tokenizer.autoencoder import KL, Identity, kl_structure, load_tokenizer, new_kl, save_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"channels": 3, "block_channels": [8, 16], "layers": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(seed: int = 0) -> KL:
    return new_kl(seed=seed, image_size=8, structure=kl_structure(**TINY)).eval()


def signed(count: int = 2, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator(3)) * 2 - 1


def test_identity_brings_every_pixel_value_back_through_float16():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    tokenizer = Identity(image_size=16, downsample=4)
    moments = tokenizer.encode(to_signed(images))
    assert moments.shape == (1, 96, 4, 4)
    assert torch.equal(moments[:, 48:], torch.full((1, 48, 4, 4), -30.0))
    assert torch.equal(to_uint8(tokenizer.decode(moments[:, :48].half().float())), images)


def test_identity_lays_a_cells_pixels_out_by_colour_row_and_column():
    images = signed(1)
    mean = Identity(image_size=8, downsample=2).encode(images)[:, :12]
    for colour, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        expected = images[:, colour, row::2, column::2]
        assert torch.equal(mean[:, 4 * colour + 2 * row + column], expected)


def test_autoencoder_shapes_hold_at_other_sides_than_its_own():
    tokenizer = tiny()
    assert (tokenizer.downsample, tokenizer.latent_channels) == (2, 3)
    for height, width in ((8, 8), (12, 20)):
        moments = tokenizer.encode(torch.zeros(2, 3, height, width))
        assert moments.shape == (2, 6, height // 2, width // 2)
        assert tokenizer.decode(moments[:, :3]).shape == (2, 3, height, width)


def test_log_variances_are_clamped():
    tokenizer = tiny()
    with torch.no_grad():
        tokenizer.network.quant_conv.bias += torch.tensor([0.0, 0.0, 0.0, 100.0, -100.0, 0.0])
    log_variance = tokenizer.encode(signed())[:, 3:]
    assert torch.equal(log_variance[:, 0], torch.full((2, 4, 4), 20.0))
    assert torch.equal(log_variance[:, 1], torch.full((2, 4, 4), -30.0))
    assert log_variance[:, 2].abs().max() < 10


def test_new_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    a = tiny(seed=5).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    b, c = tiny(seed=5).state_dict(), tiny(seed=6).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["network.encoder.conv_in.weight"], c["network.encoder.conv_in.weight"])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("channels", "groups"), [((128, 128, 256, 256, 512), 32), ((32, 64, 64), 8), ((8, 16), 2), ((24, 36), 3), ((5,), 1)]
)
def test_groups_of_the_normalisation(channels, groups):
    assert autoencoder._groups(channels) == groups
    assert all(width % groups == 0 for width in channels)


def test_the_published_structure_has_the_published_number_of_parameters():
    golden = json.loads((GOLDEN / "kl16_parameters.json").read_text())
    parameters = golden.get("parameters", golden)
    with torch.device("meta"):
        structure = kl_structure(channels=16, block_channels=(128, 128, 256, 256, 512), layers=2)
        tokenizer = KL(image_size=256, structure=structure)
    shapes = sorted(math.prod(shape) for shape in parameters.values())
    assert sorted(p.numel() for p in tokenizer.parameters()) == shapes
    assert sum(shapes) == 66_456_019
    assert tokenizer.downsample == 16


@pytest.mark.parametrize("tokenizer", [Identity(image_size=8, downsample=2), tiny()], ids=["identity", "kl"])
def test_files_hold_everything_and_repeat_their_bytes(tokenizer, tmp_path):
    save_tokenizer(tmp_path / "a.safetensors", tokenizer)
    save_tokenizer(tmp_path / "b.safetensors", tokenizer)
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "b.safetensors")
    again = load_tokenizer(tmp_path / "a.safetensors")
    assert (again.kind, again.image_size, again.config()) == (tokenizer.kind, 8, tokenizer.config())
    assert torch.equal(again.encode(signed()), tokenizer.encode(signed()))
    latents = torch.randn(1, again.latent_channels, 4, 4, generator=generator(4))
    assert torch.equal(again.decode(latents), tokenizer.decode(latents))
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.safetensors does not exist; run the stage"):
        load_tokenizer(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors is not a readable safetensors file"):
        load_tokenizer(path)
    write_tensors(path, {"x": torch.zeros(1)}, {"format": "ear-model-1"})
    with pytest.raises(ValueError, match="has format 'ear-model-1', but must have 'ear-tokenizer-1'"):
        load_tokenizer(path)
    save_tokenizer(path, tiny())
    tensors, description = read_tensors(path)
    write_tensors(path, tensors, {**description, "config": {"structure": kl_structure(**{**TINY, "channels": 4})}})
    with pytest.raises(ValueError, match=r"tokenizer\.safetensors holds network\.encoder\.conv_out\.weight with shape"):
        load_tokenizer(path)
    del tensors["network.encoder.conv_in.bias"]
    write_tensors(path, tensors, description)
    with pytest.raises(ValueError, match=r"lacks network\.encoder\.conv_in\.bias"):
        load_tokenizer(path)
