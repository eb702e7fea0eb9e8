"""What a pipeline costs: parameters, memory of a training process, compute per image, disk.

Torch counts them on the real model, with tensors that have shapes and types but no data, so even the largest model
takes seconds on a laptop. Floating-point operations are two per multiplication and addition.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ear import config
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model
from ear.model.flops import at_depth, count, loss_without_data, training_flops, with_options
from ear.model.masking import masked_after
from ear.model.shape import Shape
from ear.model.training import optimizer_numbers
from ear.model.transformer import mlp_width
from ear.runtime import randomness
from ear.sampling.sampler import sample
from ear.sampling.settings import SamplingSettings
from ear.tokenizer.autoencoder import KL, PCA, Identity, Tokenizer, kl_structure
from ear.tokenizer.critic import PatchCritic
from ear.tokenizer.importing import import_tokenizer
from ear.tokenizer.loss import AutoencoderLoss
from ear.tokenizer.perceptual import Perceptual

_FLOAT = 4  # bytes
_HALF = 2
_LINK = 100  # of a linked image: path, place, digest
_AVERAGES = 2  # EMAs of the weights


@dataclass(frozen=True)
class Costs:
    """Cost of each part of the pipeline; memory and disk in bytes."""

    shape: Shape
    images: int  # of the data set
    parameters: dict[str, int]
    memory: dict[str, int]  # of one training process
    tokenizer_memory: dict[str, int]  # of the tokenizer's training; empty if it is not trained
    checkpointed_activations: int  # what `memory["activations"]` would be with runtime.checkpointing
    training_flops: dict[str, int]  # per image
    sampling_flops: dict[str, int]  # per image
    encoding_flops: int  # per image and its mirror image
    tokenizer_flops: int  # per training image of the tokenizer: encoder and decoder, forward and backward
    disk: dict[str, int]


def pipeline_costs(parameters: config.Parameters, *, classes: int, images: int) -> Costs:
    """The costs with these parameters on a data set of that many classes and images."""
    tokenizer = build_tokenizer(parameters)
    shape = model_shape(parameters, tokenizer, classes=classes)
    counts = count_parameters(shape)
    memory, checkpointed = training_memory(parameters, shape)
    encode, decode = tokenizer_flops(tokenizer)
    trained = tokenizer if isinstance(tokenizer, KL) and parameters.tokenizer.name == "kl" else None
    return Costs(
        shape=shape,
        images=images,
        parameters=counts | {"tokenizer": _elements(tokenizer)},
        memory=memory,
        tokenizer_memory=tokenizer_memory(trained, parameters.tokenizer) if trained else {},
        checkpointed_activations=checkpointed,
        training_flops=training_flops(shape),
        sampling_flops=sampling_flops(shape, SamplingSettings.of(parameters.sample)) | {"decoder": decode},
        encoding_flops=2 * encode,
        tokenizer_flops=3 * (encode + decode),
        disk=disk_bytes(parameters, shape, images=images, weights=counts["all"] * _FLOAT),
    )


def training_memory(parameters: config.Parameters, shape: Shape) -> tuple[dict[str, int], int]:
    """(bytes of one process of the model's training by part, bytes of activations with every block checkpointed)."""
    plain, checkpointed = activation_bytes(
        shape, images=parameters.train.micro_batch_size, precision=parameters.train.precision
    )
    weights = count_parameters(shape)["all"] * _FLOAT
    ranks = parameters.runtime.processes if parameters.runtime.sharded else 1
    parts = {
        "weights": weights // ranks,
        "gradients": weights // ranks,
        "optimizer moments": moments_bytes(shape, parameters.train.optimizer) // ranks,
        "averaged weights": _AVERAGES * weights // ranks,
        "activations": plain,
    }
    return parts, checkpointed


def moments_bytes(shape: Shape, optimizer: str) -> int:
    """Bytes of what the optimiser keeps of past gradients."""
    with FakeTensorMode():
        return optimizer_numbers(build_model(shape), optimizer) * _FLOAT


def build_tokenizer(parameters: config.Parameters) -> Tokenizer:
    """The tokenizer; an imported one whose file is absent is assumed to have the structure that the parameters give.

    Raises UserError if an imported one does not fit the parameters.
    """
    side, options = parameters.data.image_size, parameters.tokenizer
    if options.name == "identity":
        return Identity(image_size=side, downsample=options.downsample)
    if options.name == "pca":
        return PCA(image_size=side, downsample=options.downsample, channels=options.channels)
    if options.name != "kl" and Path(options.weights).exists():
        return import_tokenizer(options, image_size=side)
    structure = kl_structure(channels=options.channels, block_channels=options.block_channels, layers=options.layers)
    with FakeTensorMode():
        return KL(image_size=side, structure=structure)


def model_shape(parameters: config.Parameters, tokenizer: Tokenizer, *, classes: int) -> Shape:
    """The shape that the train stage will read off the latents."""
    side = tokenizer.image_size // tokenizer.downsample
    latent = (tokenizer.latent_channels, side, side)
    return Shape(latent, tuple(map(str, range(classes))), parameters.model, parameters.score.chosen)


def count_parameters(shape: Shape) -> dict[str, int]:
    """Numbers of parameters: transformer, head, embeddings, all."""
    with FakeTensorMode():
        model = build_model(shape)
    transformer, head, total = _elements(model.transformer), _elements(model.score), _elements(model)
    return {"transformer": transformer, "head": head, "embeddings": total - transformer - head, "all": total}


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def activation_bytes(shape: Shape, *, images: int, precision: str) -> tuple[int, int]:
    """Bytes that autograd keeps of a micro-batch for the backward pass: (plain, with every block checkpointed).

    Counted with all tokens predicted, the most expensive case that occurs in training. Attention keeps no matrix of
    weights, as in the fused kernels of CUDA. With checkpointing: the inputs of all blocks, and one block's activations.
    """
    one, two = (
        _kept_for_backward(with_options(shape, depth=depth), images=images, precision=precision) for depth in (1, 2)
    )
    outside, block = 2 * one - two, two - one
    options = shape.model
    positions = images * (options.buffer_size + shape.tokens)
    if options.dropout > 0:  # one byte per element after attention, inside the MLP and after it
        block += positions * (2 * options.width + mlp_width(options))
    checkpointed = outside + options.depth * positions * options.width * _FLOAT + block
    return outside + options.depth * block, checkpointed


def _kept_for_backward(shape: Shape, *, images: int, precision: str) -> int:
    """Bytes of the tensors that autograd saves in a training forward pass without dropout, weights excluded."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with FakeTensorMode():
        # The CPU's fused attention, like CUDA's, keeps no matrix of weights, but only without dropout.
        model = build_model(with_options(shape, dropout=0.0)).train()
        with half:
            return _saved(lambda: loss_without_data(model, images=images, predicted=model.tokens), model)


def _saved(forward: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes of the tensors that autograd saves in `forward`, the modules' weights excluded."""
    kept, weights = {}, {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def tokenizer_memory(tokenizer: KL, options: config.Tokenizer) -> dict[str, int]:
    """Bytes of an autoencoder's training in float32, by part; the weights of its loss networks are negligible."""
    side, count = tokenizer.image_size // tokenizer.downsample, options.micro_batch_size
    with FakeTensorMode():
        trained = KL(image_size=tokenizer.image_size, structure=tokenizer.structure)
        perceptual, critic = Perceptual() if options.perceptual_weight else None, PatchCritic().requires_grad_(False)
        images = torch.empty(count, 3, tokenizer.image_size, tokenizer.image_size)
        noise = torch.empty(count, tokenizer.latent_channels, side, side)
        loss = AutoencoderLoss(options.kl_weight, perceptual, options.perceptual_weight)

        def forward() -> None:
            decoded = loss(trained, images, noise).decoded
            if options.adversarial_weight:
                critic(decoded)

        activations = _saved(forward, trained, critic, *([perceptual] if perceptual else []))
    weights = _elements(tokenizer) * _FLOAT
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer moments": 2 * weights,
        "averaged weights": weights,
        "activations": activations,
    }


def sampling_flops(shape: Shape, settings: SamplingSettings) -> dict[str, int]:
    """Operations per generated image, by `ear.sampling.sampler.sample`: transformer, head."""

    def costs(model: AutoregressiveModel, steps: int) -> dict[str, int]:
        chosen = dataclasses.replace(settings, steps=steps)
        flops = count(lambda: sample(model, [0], chosen, source=randomness.stream(0)))
        return dict(zip(("transformer", "head"), flops, strict=True))

    def at(steps: int) -> dict[str, int]:
        return at_depth(shape, lambda model: costs(model.eval(), steps))

    sometimes_guided = (settings.guidance_from, settings.guidance_to) != (0, 1)
    if shape.model.attention == "causal" or sometimes_guided or shape.tokens < 3:
        return at(settings.steps)
    one, two, three = at(1), at(2), at(3)
    return {name: _at_steps(settings.steps, shape.tokens, one[name], two[name], three[name]) for name in one}


def _at_steps(steps: int, tokens: int, one: int, two: int, three: int) -> int:
    """Extrapolate a masked model's operations to `steps` steps from those of 1, 2 and 3 steps; needs 3 tokens or more.

    Either all steps use guidance, or none. The first step costs the same however many tokens it reveals. Each further
    step adds a fixed cost, and a cost per token that it reveals.
    """

    def later(steps: int) -> tuple[int, int]:
        """Further steps that reveal tokens, and the tokens that they reveal."""
        left = {count for count in masked_after(tokens, steps) if count < tokens}  # some steps may reveal nothing
        return len(left) - 1, max(left)

    (_, in_two), (_, in_three) = later(2), later(3)
    per_token = (three - one - 2 * (two - one)) // (in_three - 2 * in_two)
    per_step = two - one - per_token * in_two
    passes, revealed = later(steps)
    return one + passes * per_step + revealed * per_token


def tokenizer_flops(tokenizer: Tokenizer) -> tuple[int, int]:
    """(encode, decode) of one image."""
    side = tokenizer.image_size // tokenizer.downsample
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        image = torch.empty(1, 3, tokenizer.image_size, tokenizer.image_size)
        latent = torch.empty(1, tokenizer.latent_channels, side, side)
        return sum(count(lambda: tokenizer.encode(image))), sum(count(lambda: tokenizer.decode(latent)))


def disk_bytes(parameters: config.Parameters, shape: Shape, *, images: int, weights: int) -> dict[str, int]:
    """Bytes that the stages write, by folder. Ignores the saving by gzip, which depends on the images."""
    channels, h, w = shape.latent
    side = parameters.data.image_size
    pixels = 3 * side**2 if parameters.prepare.compression != "links" else _LINK
    state = (1 + _AVERAGES) * weights + moments_bytes(shape, parameters.train.optimizer)
    # The arrays' own size is not known here; grey images need a third.
    arrays = {"data/raw": images * 3 * side**2} if parameters.data.source in ("idx", "npz") else {}
    return {
        **arrays,
        "data/prepared": images * (pixels + _FLOAT),
        "data/latents": images * (2 * 2 * channels * h * w * _HALF + _FLOAT),
        "data/model": weights + state,  # finetune starts from the state
        "data/finetuned": weights,
        "work, while a phase trains": 3 * state,  # two checkpoints and the one being written
        "data/samples": parameters.sample.count * 3 * side**2,
    }
