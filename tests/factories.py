"""Tiny models, scores and tokenizers for tests."""

from pathlib import Path

import torch

from ear import config
from ear.config.scores import OPTIONS, ScoreOptions
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model
from ear.model.shape import Shape
from ear.runtime.randomness import generator
from ear.tokenizer.autoencoder import KL, kl_structure, new_kl

PARAMETERS = config.load(Path(__file__).parent.parent / "params.yaml")
_SMALL = {  # where params.yaml is too large for a test; any other option of a score is as there
    "samples": 2,
    "noise_channels": 8,
    "components": 4,
    "codes": 16,
}


def score_options(name: str = "energy", **options) -> ScoreOptions:
    """Options of a score in test size, some of them changed."""
    kind = OPTIONS[name]
    values = {**PARAMETERS.score.model_dump(), **_SMALL, **options, "name": name}
    return kind.model_validate({key: values[key] for key in kind.model_fields})


def model_options(**changes) -> config.Model:
    """Options of a tiny transformer, some of them changed."""
    sizes = {
        "patch_size": 1,
        "blocks": "vit",
        "width": 32,
        "depth": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
        "buffer_size": 2,
        "dropout": 0.1,
        "label_dropout": 0.1,
        "attention": "bidirectional",
        "order": "random",
        "target_positions": True,
        "mask_ratio_min": 0.5,
        "head_width": 24,
        "head_depth": 2,
    }
    return config.Model.model_validate({**sizes, **changes})


def section(name: str, **changes):
    """A section of params.yaml with some values changed."""
    values = getattr(PARAMETERS, name)
    return type(values).model_validate({**values.model_dump(), **changes})


def tiny_model(
    *,
    latent=(3, 4, 4),
    classes=("a", "b", "c"),
    patch_size=1,
    attention="bidirectional",
    order="random",
    target_positions=True,
    blocks="vit",
    seed=0,
    trained=True,
    name="energy",
    **score,
) -> AutoregressiveModel:
    """A model of a few thousand weights; `trained` moves what is zero-initialised away from zero."""
    options = model_options(
        patch_size=patch_size, attention=attention, order=order, target_positions=target_positions, blocks=blocks
    )
    shape = Shape(latent, classes, options, score_options(name, **score))
    model = build_model(shape).initialise(generator(seed, "weights"))
    if trained:
        source = generator(seed, "head")
        for parameter in model.score.parameters():
            parameter.data += 0.3 * parameter.data.new_empty(parameter.shape).normal_(generator=source)
        if attention == "causal" and target_positions:
            model.target_positions.data.normal_(std=0.02, generator=source)
    return model.eval()


def tiny_autoencoder() -> KL:
    """One of 8 x 8 pixels and 3 channels whose posteriors have standard deviations around 0.6, in eval mode."""
    tokenizer = new_kl(seed=0, image_size=8, structure=kl_structure(channels=3, block_channels=[8, 16], layers=1))
    with torch.no_grad():
        tokenizer.network.quant_conv.bias[3:] -= 1
    return tokenizer.eval().requires_grad_(False)
