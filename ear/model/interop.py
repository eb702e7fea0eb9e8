"""Read and write published EAR checkpoints: the same weights under the published names.

A published file is a pickled dict whose entries `model_ema` and `model` map names to tensors; only weights are
unpickled. Most sizes follow from the tensors; attention heads, buffer size and patch size do not: they can be given,
and default to those of the published models.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ear import config
from ear.config.scores import Energy
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.files.weights import load_weights, read_pickled, tensors_by_name
from ear.latents.statistics import Statistics
from ear.model.autoregressive import AutoregressiveModel
from ear.model.masked import MaskedModel
from ear.model.shape import Shape

# Settings of the published runs that no tensor shows.
_SCORE = Energy(
    name="energy",
    samples=4,
    pairs="disjoint",
    targets=1,
    noise="uniform",
    noise_channels=64,
    alpha=1.0,
    smoothing=1e-6,
)
_HEADS = {768: 12, 1024: 16, 1280: 16}  # attention heads of the published widths: base, large, huge
_BUFFER = 64
_SCALE = 0.2325  # factor of the published runs for the latents of KL-16
# Published name => ours; the first pattern that matches the start of a name applies.
_RULES = (
    (r"fake_latent", "null_class"),
    (r"mask_token", "mask_token"),
    (r"decoder_pos_embed_learned", "positions"),
    (r"class_emb\.", "class_embedding."),
    (r"z_proj\.", "token_embedding."),
    (r"decoder_norm\.", "transformer.norm."),
    (r"decoder_blocks\.(\d+)\.norm1\.", r"transformer.blocks.\1.attention_norm."),
    (r"decoder_blocks\.(\d+)\.attn\.qkv\.", r"transformer.blocks.\1.attention.qkv."),
    (r"decoder_blocks\.(\d+)\.attn\.proj\.", r"transformer.blocks.\1.attention.projection."),
    (r"decoder_blocks\.(\d+)\.norm2\.", r"transformer.blocks.\1.mlp_norm."),
    (r"decoder_blocks\.(\d+)\.mlp\.fc1\.", r"transformer.blocks.\1.mlp.0."),
    (r"decoder_blocks\.(\d+)\.mlp\.fc2\.", r"transformer.blocks.\1.mlp.3."),
    (r"scoreloss\.net\.noise_embed\.", "score.noise_embedding."),
    (r"scoreloss\.net\.input_proj\.", "score.hidden_embedding."),
    (r"scoreloss\.net\.res_blocks\.(\d+)\.in_ln\.", r"score.network.blocks.\1.norm."),
    (r"scoreloss\.net\.res_blocks\.(\d+)\.mlp\.", r"score.network.blocks.\1.mlp."),
    (r"scoreloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.", r"score.network.blocks.\1.modulation."),
    (r"scoreloss\.net\.final_layer\.adaLN_modulation\.1\.", "score.network.output_modulation."),
    (r"scoreloss\.net\.final_layer\.linear\.", "score.network.output."),
)


def published_statistics(channels: int) -> Statistics:
    """The normalisation that published models were trained with: mean 0, standard deviation 4.301 (1 / 0.2325)."""
    std = 1 / _SCALE
    return Statistics(0.0, std, (0.0,) * channels, (std,) * channels)


def our_name(published: str) -> str:
    """The name in our model of a published parameter; raises UserError for an unknown name."""
    for pattern, ours in _RULES:
        if re.match(pattern, published):
            return re.sub(f"^{pattern}", ours, published)
    raise UserError(f"{published} is no parameter of a published EAR model; give a checkpoint of EAR itself.")


def load_published(
    source: str | Path | Mapping[str, Tensor],  # a checkpoint file, or its name -> tensor dict
    *,
    weights: str = "model_ema",  # the entry of the file: model_ema (averaged) or model
    heads: int | None = None,  # attention heads; known for the published widths
    buffer_size: int = _BUFFER,
    patch_size: int = 1,
    grid: tuple[int, int] | None = None,  # tokens down and across; a square if not given
) -> AutoregressiveModel:
    """Load a published checkpoint into a model, in eval mode.

    Raises MissingFileError; UserError if the file is no such checkpoint, would run code when unpickled, or its tensors
    (named) are missing, extra or of an impossible shape.
    """
    tensors = _ours(source, weights)
    model = MaskedModel(_shape(tensors, heads=heads, buffer_size=buffer_size, patch_size=patch_size, grid=grid))
    load_weights(model, tensors, origin="the published checkpoint")
    return model.eval()


def load_into(
    model: AutoregressiveModel,  # its sizes come from elsewhere, such as params.yaml
    source: str | Path | Mapping[str, Tensor],
    *,
    weights: str = "model_ema",
) -> None:
    """Fill a model of given sizes with published weights, in place.

    Raises as `load_published`, naming what does not fit; UserError for a model that no published checkpoint can fill.
    """
    _check_published(model)
    origin = "the published checkpoint" if isinstance(source, Mapping) else str(source)
    tensors, classes = _ours(source, weights), model.shape.classes
    embedding = tensors.get("class_embedding.weight")
    if embedding is not None and len(embedding) != len(classes):
        raise UserError(
            f"{origin} knows {len(embedding)} classes, but the latents have {len(classes)} ({classes[0]!r} to "
            f"{classes[-1]!r}); use the data that the checkpoint was trained on."
        )
    load_weights(model, tensors, origin=origin)


def save_published(model: AutoregressiveModel, path: str | Path) -> None:
    """Write the weights as a published checkpoint (entries `model` and `model_ema` are equal).

    The file cannot hold the statistics that normalise latents. Published code always scales latents by 0.2325, so its
    images are right only if the model was trained with that scale (`train.weights`).
    Raises UserError for a model that such a file cannot describe: another score, noise that is not uniform, causal
    attention, or a number of heads that differs from the published model of the same width.
    """
    named = published_tensors(model)
    # The bytes of torch.save depend on the file name, unless it writes to an open file.
    with whole_file(path) as partial, partial.open("wb") as file:
        torch.save({"model": named, "model_ema": named}, file)


def published_tensors(model: AutoregressiveModel) -> dict[str, Tensor]:
    """The model's weights under the published names; raises UserError as `save_published` does."""
    _check_published(model)
    ours = model.state_dict()
    depth, head_depth = model.shape.model.depth, model.shape.model.head_depth
    return {name: ours[our_name(name)].detach().cpu() for name in published_names(depth, head_depth)}


def _check_published(model: AutoregressiveModel) -> None:
    score, attention = model.shape.score.name, model.shape.model.attention
    # Compare names: the heads of kernel and energy score have the same tensors.
    if (score, attention) != ("energy", "bidirectional"):
        raise UserError(
            f"score.name is {score!r} and model.attention is {attention!r}, but a published checkpoint is of 'energy' "
            "and 'bidirectional'; set these, or leave train.weights empty."
        )
    options = model.shape.score
    if isinstance(options, Energy) and options.noise != "uniform":
        raise UserError(
            f"score.noise is {options.noise!r}, but must be 'uniform' for a published checkpoint; set it to 'uniform'."
        )
    width, heads = model.shape.model.width, model.shape.model.heads
    if heads != _HEADS.get(width, heads):  # no tensor would show it
        raise UserError(
            f"model.heads is {heads}, but a published model of width {width} has {_HEADS[width]}; set it to that."
        )


def published_names(depth: int, head_depth: int) -> list[str]:
    """All parameter names of a published model with that many blocks, in its order."""

    def both(*stems: str) -> list[str]:
        return [f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")]

    names = ["fake_latent", "mask_token", "decoder_pos_embed_learned", "class_emb.weight", *both("z_proj")]
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names += [name for i in range(depth) for name in both(*(f"decoder_blocks.{i}.{part}" for part in parts))]
    names += both("decoder_norm", "scoreloss.net.noise_embed", "scoreloss.net.input_proj")
    for i in range(head_depth):
        head_parts = ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")
        names += both(*(f"scoreloss.net.res_blocks.{i}.{part}" for part in head_parts))
    return names + both("scoreloss.net.final_layer.linear", "scoreloss.net.final_layer.adaLN_modulation.1")


def _ours(source: str | Path | Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint (a file or a dict) under our names."""
    published = source if isinstance(source, Mapping) else _read(Path(source), weights)
    return {our_name(name): tensor for name, tensor in published.items()}


def _read(path: Path, weights: str) -> Mapping[str, Tensor]:
    content = read_pickled(path)
    if not isinstance(content, dict) or weights not in content:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has no entry {weights!r} (it holds: {found}); choose one of these with `weights`.")
    return tensors_by_name(content[weights], origin=f"the entry {weights!r} of {path}")


def _shape(
    tensors: dict[str, Tensor], *, heads: int | None, buffer_size: int, patch_size: int, grid: tuple[int, int] | None
) -> Shape:
    """Read the shape of the model off its tensors."""

    def size(name: str, dimension: int) -> int:
        if name not in tensors or tensors[name].dim() <= dimension:
            raise UserError(
                f"the published checkpoint lacks {name} (our name), or its dimension {dimension}; give a complete EAR "
                "checkpoint."
            )
        return tensors[name].shape[dimension]

    width = size("class_embedding.weight", 1)
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise UserError(f"the checkpoint's width is {width}, which no published model has; give `heads`.")
    tokens = size("positions", 1) - buffer_size
    side = round(max(tokens, 0) ** 0.5)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise UserError(
            f"the checkpoint has {tokens} image tokens beside {buffer_size} buffer tokens, which is not "
            f"{rows} x {columns}; give `grid` and `buffer_size`."
        )
    channels, rest = divmod(size("token_embedding.weight", 1), patch_size**2)
    if rest:
        raise UserError(f"patch_size is {patch_size}, whose square does not divide the token channels; give another.")
    if width % heads:
        raise UserError(f"heads is {heads}, but must divide the checkpoint's width, {width}; give a divisor.")
    if buffer_size < 1:
        raise UserError(f"buffer_size is {buffer_size}, but published models have buffer tokens; give 1 or more.")
    model = config.Model(
        patch_size=patch_size,
        blocks="vit",
        width=width,
        depth=_blocks(tensors, "transformer.blocks."),
        heads=heads,
        mlp_ratio=size("transformer.blocks.0.mlp.0.weight", 0) / width,
        buffer_size=buffer_size,
        dropout=0.1,
        label_dropout=0.1,
        attention="bidirectional",
        order="random",
        target_positions=True,
        mask_ratio_min=0.7,
        head_width=size("score.noise_embedding.weight", 0),
        head_depth=_blocks(tensors, "score.network.blocks."),
    )
    score = _SCORE.model_copy(update={"noise_channels": size("score.noise_embedding.weight", 1)})
    classes = tuple(str(i) for i in range(size("class_embedding.weight", 0)))
    return Shape((channels, rows * patch_size, columns * patch_size), classes, model, score)


def _blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix)}
    return len(numbers)
