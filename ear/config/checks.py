"""Checks of parameters that must agree with each other. Each raises UserError naming the keys, values and fix."""

import math

from ear.config.sections import Data, Evaluate, Model, Reference, Runtime, Sample, Tokenizer, Train
from ear.errors import UserError

_INCEPTION_SPLITS = 10  # ear.evaluation.metrics.INCEPTION_SPLITS, which cannot be imported without torch
# Smallest image side, in pixels, that the networks of these losses accept.
_SMALLEST_SIDE = {"perceptual_weight": 16, "adversarial_weight": 24}


def check_data(data: Data) -> None:
    """A source other than the built-in digits needs a path."""
    if data.source != "digits" and not data.path:
        raise UserError(f"data.path is empty, but data.source is {data.source}; name the folder or file of the images.")


def check_tokenizer(data: Data, tokenizer: Tokenizer) -> None:
    """The tokenizer must fit the image size, and a KL autoencoder's sizes each other."""
    levels = int(math.log2(tokenizer.downsample))
    if 2**levels != tokenizer.downsample:
        raise UserError(f"tokenizer.downsample is {tokenizer.downsample}, but must be a power of two, such as 4 or 16.")
    if data.image_size % tokenizer.downsample:
        raise UserError(
            f"data.image_size is {data.image_size}, but must be a multiple of tokenizer.downsample, "
            f"{tokenizer.downsample}; change one of them."
        )
    if tokenizer.name in ("published", "diffusers") and not tokenizer.weights:
        raise UserError(
            f"tokenizer.weights is empty, but tokenizer.name is {tokenizer.name}; name the file or folder to import."
        )
    largest = 3 * tokenizer.downsample**2
    if tokenizer.name == "pca" and tokenizer.channels > largest:
        raise UserError(
            f"tokenizer.channels is {tokenizer.channels}, but patches of {tokenizer.downsample} pixels a side have at "
            f"most {largest} components (grey ones {tokenizer.downsample**2}); lower it."
        )
    if tokenizer.name == "kl":
        _check_autoencoder(data, tokenizer, levels)


def _check_autoencoder(data: Data, tokenizer: Tokenizer, levels: int) -> None:
    if len(tokenizer.block_channels) != levels + 1:
        raise UserError(
            f"tokenizer.block_channels has {len(tokenizer.block_channels)} entries, but tokenizer.downsample "
            f"{tokenizer.downsample} needs {levels + 1}; give one number of channels per level."
        )
    if tokenizer.batch_size % tokenizer.micro_batch_size:
        raise UserError(
            f"tokenizer.micro_batch_size is {tokenizer.micro_batch_size}, but must divide tokenizer.batch_size, "
            f"{tokenizer.batch_size}; choose a divisor."
        )
    for key, smallest in _SMALLEST_SIDE.items():
        if getattr(tokenizer, key) and data.image_size < smallest:
            raise UserError(
                f"tokenizer.{key} is {getattr(tokenizer, key)}, but its network needs images of at least {smallest} "
                f"pixels a side and data.image_size is {data.image_size}; set tokenizer.{key} to 0."
            )


def check_model(data: Data, tokenizer: Tokenizer, model: Model) -> None:
    """Patches must tile the latent grid, heads divide the width, and the order suit the attention."""
    side = data.image_size // tokenizer.downsample
    if side % model.patch_size:
        raise UserError(
            f"model.patch_size is {model.patch_size}, but must divide the latent side, {side} "
            f"(data.image_size / tokenizer.downsample); choose a divisor of {side}."
        )
    if model.width % model.heads:
        raise UserError(f"model.heads is {model.heads}, but must divide model.width, {model.width}; choose a divisor.")
    if model.blocks == "modern" and (model.width // model.heads) % 4:
        raise UserError(
            f"model.width / model.heads is {model.width // model.heads}, but rotary positions need a multiple of 4; "
            "change either, or set model.blocks to vit."
        )
    if model.attention == "bidirectional" and model.order == "raster":
        raise UserError(
            "model.order is 'raster', but bidirectional attention predicts any tokens from any others; set it to "
            "random, or model.attention to causal."
        )
    if model.attention == "causal" and model.order == "random" and not model.target_positions:
        raise UserError(
            "model.target_positions is false, but causal attention in random order cannot know which position a slot "
            "predicts; set it to true, or model.order to raster."
        )


def check_train(train: Train, runtime: Runtime) -> None:
    """Batches and warm-up must fit, there must be weights or a training, and Muon needs whole matrices."""
    if train.global_batch_size % train.micro_batch_size:
        raise UserError(
            f"train.micro_batch_size is {train.micro_batch_size}, but must divide train.global_batch_size, "
            f"{train.global_batch_size}; choose a divisor."
        )
    if train.warmup_images > train.images > 0:
        raise UserError(
            f"train.warmup_images is {train.warmup_images}, but must be at most train.images, {train.images}; lower it."
        )
    if not train.images and not train.weights:
        raise UserError(
            "train.images is 0 and train.weights is empty, so there would be no model; raise train.images, or name a "
            "published checkpoint in train.weights."
        )
    if train.optimizer == "muon" and runtime.sharded:
        raise UserError(
            "train.optimizer is muon, which needs whole matrices, but runtime.sharded divides them among processes; "
            "set train.optimizer to adamw, or runtime.sharded to false."
        )


def check_shares(
    global_batch_size: int,
    micro_batch_size: int,
    processes: int,
    keys: tuple[str, str] = ("global_batch_size", "micro_batch_size"),  # what the user calls them
) -> None:
    """Raise UserError, with a fix, if processes cannot share the micro-batches of a global batch evenly."""
    batch, micro = keys
    each, rest = divmod(global_batch_size, processes)
    if rest:
        raise UserError(
            f"{batch} is {global_batch_size}, but must be a multiple of {processes}, the number of processes; change "
            "one of them."
        )
    if each % micro_batch_size:
        fitting = max(size for size in range(1, min(micro_batch_size, each) + 1) if each % size == 0)
        raise UserError(
            f"{micro} is {micro_batch_size}, but must divide {each}, the images per process of a global batch of "
            f"{global_batch_size} on {processes} process(es); set it to {fitting} or another divisor of {each}."
        )


def check_guidance(model: Model, sample: Sample) -> None:
    """Guidance needs a null class that a training has seen."""
    if sample.guidance != 1 and not model.label_dropout:
        raise UserError(
            f"sample.guidance is {sample.guidance:g}, but model.label_dropout is 0, so no training would see the null "
            "class; set sample.guidance to 1, or model.label_dropout above 0 (as published weights were trained: 0.1)."
        )


def check_interval(sample: Sample) -> None:
    """The interval of guidance must not be empty."""
    if sample.guidance_from >= sample.guidance_to:
        raise UserError(
            f"sample.guidance_from is {sample.guidance_from:g}, but must be below sample.guidance_to, "
            f"{sample.guidance_to:g}; lower it."
        )


def check_evaluation(sample: Sample, reference: Reference, evaluate: Evaluate) -> None:
    """Blocks must be equally large and hold enough images for every metric, and statistics suit their extractor."""
    if sample.count % evaluate.repeats:
        raise UserError(
            f"evaluate.repeats is {evaluate.repeats}, but must divide sample.count, {sample.count}; published metrics "
            "have 50,000 images per repeat."
        )
    block = sample.count // evaluate.repeats
    generated = f"sample.count / evaluate.repeats is {block}"
    if block < _INCEPTION_SPLITS:
        raise UserError(
            f"{generated}, but the Inception score averages over {_INCEPTION_SPLITS} splits; raise sample.count, or "
            "lower evaluate.repeats."
        )
    if evaluate.kid_subset_size > block:
        raise UserError(
            f"evaluate.kid_subset_size is {evaluate.kid_subset_size}, but {generated}; set it to {block} or less."
        )
    if evaluate.neighborhood >= block:
        raise UserError(f"evaluate.neighborhood is {evaluate.neighborhood}, but {generated}; set it below {block}.")
    if reference.extractor == "classifier" and reference.statistics:
        raise UserError(
            f"reference.statistics is {reference.statistics!r}, but a classifier trained here has no published "
            "statistics; set reference.extractor to inception, or reference.statistics to ''."
        )
