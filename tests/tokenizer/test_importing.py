"""Imported tokenizers: the golden values of KL-16, folders of diffusers, and what is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from published_files import GOLDEN, kl16_weight, write_kl16
from safetensors.torch import load_file, save_file

from ear.files.digests import sha256
from ear.tokenizer.autoencoder import KL, kl_structure, load_tokenizer, save_tokenizer
from ear.tokenizer.importing import import_diffusers, import_published

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kl16(tmp_path_factory) -> Path:
    """A file in the published format with the golden weights."""
    return write_kl16(tmp_path_factory.mktemp("published") / "kl16.ckpt")


@torch.no_grad()
def test_published_autoencoder_meets_the_golden_values(kl16, tmp_path):
    tokenizer = import_published(kl16, image_size=256)
    golden = load_file(GOLDEN / "kl16_outputs.safetensors")
    assert (tokenizer.downsample, tokenizer.latent_channels) == (16, 16)
    assert tokenizer.structure == kl_structure(channels=16, block_channels=[128, 128, 256, 256, 512], layers=2)
    torch.testing.assert_close(tokenizer.encode(golden["image"]), golden["moments"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(golden["latents"]), golden["decoded"], atol=1e-4, rtol=0)
    assert tokenizer.source == {"format": "published", "file": "kl16.ckpt", "sha256": sha256(kl16)}

    save_tokenizer(tmp_path / "tokenizer.safetensors", tokenizer)
    again = load_tokenizer(tmp_path / "tokenizer.safetensors")
    assert again.source == tokenizer.source
    torch.testing.assert_close(again.encode(golden["image"]), golden["moments"], atol=1e-4, rtol=0)


SMALL = {
    "encoder.conv_in": (32, 3, 3),
    "encoder.down.0.block.0.norm1": (32,),
    "encoder.down.0.block.0.conv1": (32, 32, 3),
    "encoder.down.0.block.0.norm2": (32,),
    "encoder.down.0.block.0.conv2": (32, 32, 3),
    "encoder.norm_out": (32,),
    "encoder.conv_out": (8, 32, 3),
    "decoder.conv_in": (32, 4, 3),
    "decoder.norm_out": (32,),
    "decoder.conv_out": (3, 32, 3),
    "quant_conv": (8, 8, 1),
    "post_quant_conv": (4, 4, 1),
} | {
    f"{side}.mid.{block}.{part}": (32, 32, 3)[: 3 if "conv" in part else 1]
    for side in ("encoder", "decoder")
    for block in ("block_1", "block_2")
    for part in ("norm1", "conv1", "norm2", "conv2")
} | {
    f"{side}.mid.attn_1.{part}": (32, 32, 1)[: 1 if part == "norm" else 3]
    for side in ("encoder", "decoder")
    for part in ("norm", "q", "k", "v", "proj_out")
} | {
    f"decoder.up.0.block.{number}.{part}": (32, 32, 3)[: 3 if "conv" in part else 1]
    for number in (0, 1)
    for part in ("norm1", "conv1", "norm2", "conv2")
}  # fmt: skip


def small() -> dict[str, torch.Tensor]:
    """A published autoencoder of one level, with 32 channels and one layer."""
    weights = {}
    for name, (first, *rest) in SMALL.items():
        shape = [first, *rest[:1], *(rest[1:] * 2)]
        weights |= {f"{name}.weight": kl16_weight(name, shape), f"{name}.bias": kl16_weight(name, [first])}
    return weights


def test_the_other_entry_holds_weights_too_and_the_critic_is_left_out(tmp_path):
    critic = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": small() | critic}, tmp_path / "last.ckpt")
    tokenizer = import_published(tmp_path / "last.ckpt", image_size=8)
    assert (tokenizer.downsample, tokenizer.latent_channels) == (1, 4)
    assert torch.equal(
        tokenizer.state_dict()["network.decoder.mid_block.attentions.0.to_q.weight"],
        small()["decoder.mid.attn_1.q.weight"][:, :, 0, 0],
    )


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("post_quant_conv.weight"), r"last\.ckpt lacks post_quant_conv\.weight"),
        (without("decoder.conv_out.bias"), r"last\.ckpt lacks network\.decoder\.conv_out\.bias"),
        (lambda w: w | {"encoder.extra": torch.zeros(1)}, r"last\.ckpt has encoder\.extra, which no KL autoencoder"),
        (lambda w: w | {"decoder.up.7.block.0.norm1.weight": torch.zeros(1)}, r"has decoder\.up\.7\.block\.0\.norm1"),
        (
            lambda w: w | {"decoder.conv_out.bias": torch.zeros(4)},
            r"decoder\.conv_out\.bias with shape \[4\], the model needs \[3\]",
        ),
        (lambda w: {}, r"lacks .*; give a complete latent-diffusion autoencoder"),
        (
            lambda w: {name: tensor for name, tensor in w.items() if not name.startswith("encoder.")},
            r"last\.ckpt lacks encoder\.down\.0\.block\.0\.conv1\.weight; give a complete latent-diffusion autoencoder",
        ),
        (lambda w: w | {"post_quant_conv.weight": torch.tensor(4.0)}, r"last\.ckpt lacks post_quant_conv\.weight"),
        (
            lambda w: w | {"encoder.down.0.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)},
            r"last\.ckpt: no AutoencoderKL has its structure \(.*32.*\)",
        ),
        (lambda w: w | {"quant_conv.bias": None}, r"'model' of .*last\.ckpt maps 'quant_conv\.bias' to a NoneType"),
        (lambda w: w | {7: torch.zeros(1)}, r"'model' of .*last\.ckpt maps 7 to a Tensor"),
        (lambda w: None, r"the entry 'model' of .*last\.ckpt is a NoneType, but must be a dict of tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    torch.save({"model": change(small())}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        import_published(tmp_path / "last.ckpt", image_size=8)


class Code:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_with_code_or_without_weights_are_refused(tmp_path):
    path, trace = tmp_path / "last.ckpt", tmp_path / "it ran"
    path.write_bytes(pickle.dumps({"model": Code(trace)}))
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as plain weights"):
        import_published(path, image_size=8)
    torch.save({"model": Code(trace)}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as plain weights"):
        import_published(path, image_size=8)
    assert not trace.exists()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as plain weights"):
        import_published(path, image_size=8)
    for content, found in (({"weights": {}, "epoch": 3}, "weights, epoch"), ([1], "list")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"neither an entry 'model' nor 'state_dict' \(it holds: {found}\)"):
            import_published(path, image_size=8)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        import_published(tmp_path / "nowhere.ckpt", image_size=8)


STRUCTURE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 5,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
}


@pytest.fixture(params=[True, False], ids=["quant_conv", "no quant_conv"])
def saved(request, tmp_path) -> tuple[AutoencoderKL, Path]:
    """An autoencoder of diffusers and its folder."""
    network = AutoencoderKL(**STRUCTURE, use_quant_conv=request.param, use_post_quant_conv=request.param).eval()
    network.save_pretrained(tmp_path / "vae")
    return network, tmp_path / "vae"


@torch.no_grad()
def test_folder_of_diffusers_gives_what_diffusers_gives(saved):
    network, folder = saved
    imported = import_diffusers(folder, image_size=8)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = network.encode(images).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
    torch.testing.assert_close(imported.encode(images), expected, atol=1e-6, rtol=0)
    latents = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(imported.decode(latents), network.decode(latents).sample, atol=1e-6, rtol=0)
    file = folder / "diffusion_pytorch_model.safetensors"
    assert imported.source == {"format": "diffusers", "file": file.name, "sha256": sha256(file)}
    assert isinstance(imported, KL)


def test_older_names_and_half_precision_are_understood(saved):
    network, folder = saved
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in network.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = tensor.half().contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    found = import_diffusers(folder, image_size=8).network.state_dict()
    expected = network.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].half().float(), atol=0, rtol=0)


def test_absent_keys_of_a_folder_have_the_defaults_of_diffusers(tmp_path):
    AutoencoderKL().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    tokenizer = import_diffusers(tmp_path, image_size=8)
    assert (tokenizer.downsample, tokenizer.latent_channels) == (1, 4)
    assert tokenizer.structure == {key: config[key] for key in tokenizer.structure}
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": []}')
    with pytest.raises(ValueError, match=r"model\.safetensors: no AutoencoderKL has its structure"):
        import_diffusers(tmp_path, image_size=8)


def test_folders_that_do_not_fit_are_refused(saved):
    _, folder = saved
    path, config = folder / "diffusion_pytorch_model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(path)

    def refused(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            import_diffusers(folder, image_size=8)

    save_file({name: t for name, t in tensors.items() if name != "decoder.conv_out.bias"}, path)
    refused(r"lacks network\.decoder\.conv_out\.bias")
    save_file(tensors | {"encoder.more": torch.zeros(1)}, path)
    refused(r"diffusion_pytorch_model\.safetensors has encoder\.more, which no KL autoencoder")
    for change, message in (
        ({"latent_channels": 6}, r"with shape \[10, .*the model needs \[12, "),
        ({"in_channels": 1}, r"has \[1, 3\] channels in and out; it must be made for RGB"),
        ({"_class_name": "VQModel"}, "holds a VQModel, not an AutoencoderKL"),
    ):
        save_file(tensors, path)
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(message)
    path.unlink()
    refused(r"model\.safetensors does not exist; give the folder of an AutoencoderKL", FileNotFoundError)
