"""Tiny models for tests."""

import torch

from ear import model as models
from ear import scores
from ear.autoencoder import KL, kl_structure, new_kl
from ear.model import Model, Shape
from ear.randomness import generator

SCORE = {
    "name": "energy",
    "alpha": 1.0,
    "samples": 2,
    "pairs": "all",
    "targets": 1,
    "smoothing": 1e-6,
    "noise": "uniform",
    "noise_channels": 8,
    "bandwidths": (0.25, 0.5, 1.0, 2.0),
    "components": 4,
    "covariance": "diagonal",
    "scale_floor": 1e-3,
    "sampling_steps": 20,
    "denoised_limit": 3.0,
    "codes": 16,
}


def tiny_model(
    *,
    latent=(3, 4, 4),
    classes=("a", "b", "c"),
    patch_size=1,
    attention="bidirectional",
    order="random",
    target_positions=True,
    seed=0,
    trained=True,
    **score,
) -> Model:
    """A model of a few thousand weights; `trained` moves what is zero-initialised away from zero."""
    sizes = {
        "patch_size": patch_size,
        "width": 32,
        "depth": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
        "buffer_size": 2,
        "dropout": 0.1,
        "label_dropout": 0.1,
        "attention": attention,
        "order": order,
        "target_positions": target_positions,
        "mask_ratio_min": 0.5,
        "head_width": 24,
        "head_depth": 2,
    }
    shape = Shape(latent, classes, sizes, scores.chosen({**SCORE, **score}))
    model = models.build(shape).initialise(generator(seed, "weights"))
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
