"""Import KL autoencoders: from a published checkpoint, or from a folder that diffusers wrote.

Both are converted strictly to the pipeline's `KL`: an error names a tensor that is missing, extra or misshapen. Only
weights are unpickled, and nothing is downloaded. Scaling and shift factors are dropped (see `KL`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ear import config
from ear.errors import MissingFileError, UserError
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.files.tensors import read_tensors
from ear.files.weights import load_weights, read_pickled, tensors_by_name
from ear.tokenizer.autoencoder import KL

_ENTRIES = ("model", "state_dict")  # one of these entries of a published file holds the weights
_CRITIC = "loss."  # prefix of what only training needs: perceptual network and critic
_GROUPS = 32  # groups of group normalisation in published autoencoders; no tensor shows their number
# Published name => diffusers' name; all matching rules apply, in order. Decoder levels are numbered from the other end;
# `our_name` converts them.
_RULES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),  # older versions of diffusers wrote query, key, ...
    (r"(attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)
_STRUCTURE = {  # keys of config.json that describe the network, with diffusers' defaults
    "act_fn": "silu",
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def import_tokenizer(options: config.Tokenizer, *, image_size: int) -> KL:
    """Import `options.weights` by `import_published` or `import_diffusers`, as `options.name` says; raises as they do.

    Also raises UserError if downsampling or channels differ from the options.
    """
    path, read = options.weights, import_published if options.name == "published" else import_diffusers
    imported = read(path, image_size=image_size)
    found = {"downsample": imported.downsample, "channels": imported.latent_channels}
    for name, expected in (("downsample", options.downsample), ("channels", options.channels)):
        if expected != found[name]:
            raise UserError(
                f"tokenizer.{name} is {expected}, but the autoencoder of {path} has {found[name]}; set "
                f"tokenizer.{name} to {found[name]}."
            )
    return imported


def import_published(path: str | Path, *, image_size: int) -> KL:
    """Import a published checkpoint: a pickled dict whose `model` or `state_dict` maps names to tensors.

    Names are those of the latent diffusion repository (KL-16 is such a file). All sizes are read off the tensors.
    Raises MissingFileError; UserError if the file is no such checkpoint, would run code when unpickled, or its tensors
    (named) do not make an autoencoder.
    """
    path = Path(path)
    published = _entry(read_pickled(path), path)
    weights = {name: tensor for name, tensor in published.items() if not name.startswith(_CRITIC)}
    structure = published_structure(weights, origin=str(path))
    return _imported(weights, structure, image_size=image_size, path=path, kind="published")


def import_diffusers(folder: str | Path, *, image_size: int) -> KL:
    """Import a folder with config.json and diffusion_pytorch_model.safetensors, of class AutoencoderKL.

    Raises MissingFileError; UserError for another class, images that are not RGB, an impossible structure, or tensors
    (named) that are missing, extra or of another shape.
    """
    description, path = Path(folder) / "config.json", Path(folder) / "diffusion_pytorch_model.safetensors"
    for needed in (description, path):
        if not needed.is_file():
            raise MissingFileError(f"{needed} does not exist; give the folder of an AutoencoderKL.")
    config = read_json(description)
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{folder} holds a {config.get('_class_name')}, not an AutoencoderKL; give the folder of one.")
    colours = [config.get(key, 3) for key in ("in_channels", "out_channels")]
    if colours != [3, 3]:
        raise UserError(f"the autoencoder of {folder} has {colours} channels in and out; it must be made for RGB.")
    structure = {key: config.get(key, default) for key, default in _STRUCTURE.items()}
    return _imported(read_tensors(path)[0], structure, image_size=image_size, path=path, kind="diffusers")


def published_structure(weights: Mapping[str, Tensor], *, origin: str) -> dict:
    """Keywords of diffusers' AutoencoderKL, from published tensors; raises UserError naming a missing one."""

    def size(name: str) -> int:
        if name not in weights or not weights[name].dim():
            raise UserError(f"{origin} lacks {name}; give a complete latent-diffusion autoencoder.")
        return weights[name].shape[0]

    levels = max(_count(weights, "encoder.down."), 1)  # if there is none, the error names the first one
    attending = {name.partition(".attn.")[0] for name in weights if ".attn." in name}

    def kind(level: str, block: str) -> str:
        return f"Attn{block}" if level in attending else block

    return {
        "down_block_types": [kind(f"encoder.down.{k}", "DownEncoderBlock2D") for k in range(levels)],
        "up_block_types": [kind(f"decoder.up.{k}", "UpDecoderBlock2D") for k in reversed(range(levels))],
        "block_out_channels": [size(f"encoder.down.{k}.block.0.conv1.weight") for k in range(levels)],
        "layers_per_block": _count(weights, "encoder.down.0.block."),
        "latent_channels": size("post_quant_conv.weight"),
        "norm_num_groups": _GROUPS,
    }


def our_name(name: str, levels: int) -> str:
    """The name in `KL` of a published tensor, or of one of diffusers' own (older or newer)."""
    name = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    for pattern, ours in _RULES:
        name = re.sub(pattern, ours, name)
    return f"network.{name}"


def _entry(content: object, path: Path) -> Mapping[str, Tensor]:
    """The weights of an unpickled file."""
    names = list(content) if isinstance(content, dict) else [type(content).__name__]
    found = [name for name in _ENTRIES if name in names]
    if not isinstance(content, dict) or not found:
        shown = ", ".join(map(str, names[:5]))
        raise UserError(f"{path} has neither an entry 'model' nor 'state_dict' (it holds: {shown}).")
    return tensors_by_name(content[found[0]], origin=f"the entry {found[0]!r} of {path}")


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow the prefix in the names."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _imported(weights: Mapping[str, Tensor], structure: dict, *, image_size: int, path: Path, kind: str) -> KL:
    try:
        tokenizer = KL(image_size=image_size, structure=structure)
    except (TypeError, ValueError, IndexError) as error:  # diffusers does not check its arguments
        raise UserError(f"{path}: no AutoencoderKL has its structure ({error}); give a complete one.") from error
    levels, expected, named = len(structure["block_out_channels"]), tokenizer.state_dict().keys(), {}
    for name, tensor in weights.items():
        ours = our_name(name, levels)
        if ours not in expected:
            raise UserError(f"{path} has {name}, which no KL autoencoder of its sizes has; give another file.")
        named[ours] = _as_linear(ours, tensor)
    load_weights(tokenizer, named, origin=str(path))
    tokenizer.source = {"format": kind, "file": path.name, "sha256": sha256(path)}
    return tokenizer.eval().requires_grad_(False)


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Convert attention's 1 x 1 convolutions to linear maps, as diffusers has them, and half precision to float32."""
    inside = re.search(r"attentions\.\d+\.to_", name)
    return (tensor.flatten(1) if inside and tensor.dim() == 4 else tensor).float()
