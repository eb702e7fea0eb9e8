"""What a pipeline costs: parameters, memory of a training process, compute per image, disk.

Torch itself counts them, on the real model with tensors that have shapes and types but no data, so that even the
largest model is measured in seconds on a laptop. Floating-point operations are two per multiplication and addition.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ear import config, randomness, scores
from ear import model as models
from ear.autoencoder import KL, Identity, Tokenizer, kl_structure
from ear.autoencoder_import import import_tokenizer
from ear.autoencoder_loss import AutoencoderLoss
from ear.causal import CausalModel
from ear.critic import PatchCritic
from ear.masking import masked_count
from ear.model import Model, Shape, pick
from ear.perceptual import Perceptual
from ear.sampling import sample

_FLOAT = 4  # bytes
_HALF = 2
_AVERAGES = 2  # of the weights, at two rates
_MASK_DRAWS = 4096  # of which the mean number of masked tokens is computed


@dataclass(frozen=True)
class Costs:
    """Of a pipeline, by part; memory and disk in bytes."""

    shape: Shape
    images: int  # of the data set
    parameters: dict[str, int]
    memory: dict[str, int]  # of one training process
    tokenizer_memory: dict[str, int]  # of the tokenizer's training; empty where it is not trained
    checkpointed_activations: int  # what `activations` of memory would be with runtime.checkpointing
    training_flops: dict[str, int]  # per image
    sampling_flops: dict[str, int]  # per image
    encoding_flops: int  # per image and its mirror image
    tokenizer_flops: int  # per training image of the tokenizer: encoded, decoded, and back
    disk: dict[str, int]

    @property
    def tokens(self) -> int:
        """L."""
        return count_tokens(self.shape)

    @property
    def token_channels(self) -> int:
        """D."""
        return self.shape.latent[0] * self.shape.model["patch_size"] ** 2


def count_tokens(shape: Shape) -> int:
    """L, the tokens of an image."""
    _, h, w = shape.latent
    return h * w // shape.model["patch_size"] ** 2


def of_pipeline(parameters: config.Parameters, *, classes: int, images: int) -> Costs:
    """The costs with these parameters on a data set of that many classes and images."""
    tokenizer = build_tokenizer(parameters)
    shape = model_shape(parameters, tokenizer, classes=classes)
    counts = count_parameters(shape)
    plain, checkpointed = activation_bytes(
        shape, images=parameters.train.micro_batch_size, precision=parameters.train.precision
    )
    weights = counts["all"] * _FLOAT
    encode, decode = tokenizer_flops(tokenizer)
    return Costs(
        shape=shape,
        images=images,
        parameters=counts | {"tokenizer": _elements(tokenizer)},
        memory={
            "weights": weights,
            "gradients": weights,
            "AdamW moments": 2 * weights,
            "averaged weights": _AVERAGES * weights,
            "activations": plain,
        },
        tokenizer_memory=tokenizer_memory(tokenizer, parameters.tokenizer) if parameters.tokenizer.name == "kl" else {},
        checkpointed_activations=checkpointed,
        training_flops=training_flops(shape),
        sampling_flops=sampling_flops(shape, parameters.sample) | {"decoder": decode},
        encoding_flops=2 * encode,
        tokenizer_flops=3 * (encode + decode),
        disk=disk_bytes(parameters, shape, images=images, weights=weights),
    )


def build_tokenizer(parameters: config.Parameters) -> Tokenizer:
    """The tokenizer; an imported one that is not there yet is taken to have the structure of the parameters.

    Raises ValueError for an imported one that does not fit the parameters.
    """
    side, options = parameters.data.image_size, parameters.tokenizer
    if options.name == "identity":
        return Identity(image_size=side, downsample=options.downsample)
    if options.name != "kl" and Path(options.weights).exists():
        sizes = {"downsample": options.downsample, "channels": options.channels}
        return import_tokenizer(options.weights, kind=options.name, image_size=side, **sizes).tokenizer
    sizes = {"channels": options.channels, "block_channels": options.block_channels, "layers": options.layers}
    with FakeTensorMode():
        return KL(image_size=side, structure=kl_structure(**sizes))


def model_shape(parameters: config.Parameters, tokenizer: Tokenizer, *, classes: int) -> Shape:
    """The shape that the train stage reads off the latents, before there are any."""
    side = tokenizer.image_size // tokenizer.downsample
    latent = (tokenizer.latent_channels, side, side)
    names = tuple(map(str, range(classes)))
    return Shape(latent, names, asdict(parameters.model), scores.chosen(asdict(parameters.score)))


def count_parameters(shape: Shape) -> dict[str, int]:
    """Of the transformer, the head, the embeddings, and all."""
    with FakeTensorMode():
        model = models.build(shape)
    transformer, head, every = _elements(model.transformer), _elements(model.score), _elements(model)
    return {"transformer": transformer, "head": head, "embeddings": every - transformer - head, "all": every}


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def activation_bytes(shape: Shape, *, images: int, precision: str) -> tuple[int, int]:
    """What autograd keeps of a micro-batch for the backward pass: (plain, with every block checkpointed).

    Counted where all tokens are predicted, which happens in training and costs most. Attention keeps no matrix of
    weights, as in the fused kernels of CUDA. With checkpointing, the inputs of all blocks and one block's own.
    """
    one, two = (_kept_for_backward(_with(shape, depth=depth), images=images, precision=precision) for depth in (1, 2))
    outside, block = 2 * one - two, two - one
    positions = images * (shape.model["buffer_size"] + count_tokens(shape))
    width, depth = shape.model["width"], shape.model["depth"]
    if shape.model["dropout"] > 0:  # a byte per element behind attention, in the MLP and behind it
        block += int(positions * width * (2 + shape.model["mlp_ratio"]))
    return outside + depth * block, outside + depth * positions * width * _FLOAT + block


def _with(shape: Shape, **model) -> Shape:
    """The shape with other model options."""
    return dataclasses.replace(shape, model=shape.model | model)


def _kept_for_backward(shape: Shape, *, images: int, precision: str) -> int:
    """Bytes of the tensors that autograd saves in a training forward pass without dropout, but for the weights."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with FakeTensorMode():
        # The CPU's fused attention, like CUDA's, keeps no matrix of weights, but only without dropout.
        model = models.build(_with(shape, dropout=0.0)).train()
        with half:
            return _saved(lambda: _loss(model, images=images, masked=model.tokens), model)


def _saved(forward: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes of the tensors that autograd saves in `forward`, but for the weights of the modules."""
    kept, weights = {}, {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def tokenizer_memory(tokenizer: KL, options: config.Tokenizer) -> dict[str, int]:
    """Bytes of the training of an autoencoder in float32; beside them, its two judges have small weights."""
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
        "AdamW moments": 2 * weights,
        "averaged weights": weights,
        "activations": activations,
    }


def _loss(model: Model, *, images: int, masked: int) -> torch.Tensor:
    """`Model.loss` for a given number of masked tokens: it draws the number, and tensors without data hold none."""
    generator = torch.Generator()
    tokens = torch.empty(images, model.tokens, model.token_embedding.in_features)
    labels, null = torch.empty(images, dtype=torch.long), torch.empty(images, dtype=torch.bool)
    if isinstance(model, CausalModel):
        hidden, positions = model.predictions(tokens, labels, null, generator)
    else:
        mask, positions = torch.empty(images, model.tokens, dtype=torch.bool), torch.empty(images, masked).long()
        hidden = pick(model.hidden(tokens, mask, labels, null), positions)
    draws = [model.score.represent(tokens) for _ in range(model.score.targets)]
    target = torch.stack([pick(draw, positions).flatten(0, 1) for draw in draws]).squeeze(0)
    return model.score.loss(hidden.flatten(0, 1), target, temperature=1.0, generator=generator).mean()


def mean_masked(shape: Shape) -> int:
    """Tokens predicted per training image, on average (all of them by a causal model)."""
    tokens = count_tokens(shape)
    if shape.model["attention"] == "causal":
        return tokens
    generator = randomness.generator(0, "masks")
    draws = [masked_count(tokens, shape.model["mask_ratio_min"], generator) for _ in range(_MASK_DRAWS)]
    return round(sum(draws) / len(draws))


def training_flops(shape: Shape) -> dict[str, int]:
    """Forward and backward pass of one image: transformer, head (with embeddings), both passes of both."""
    masked = mean_masked(shape)

    def count(model: Model) -> dict[str, int]:
        forward = _flops(lambda: _loss(model, images=1, masked=masked))
        both = _flops(lambda: _loss(model, images=1, masked=masked).backward())
        return {"forward, transformer": forward[0], "forward, head": forward[1], "forward and backward": sum(both)}

    return _at_depth(shape, lambda model: count(model.train()))


def sampling_flops(shape: Shape, options: config.Sample) -> dict[str, int]:
    """One image, as `ear.sampling.sample` draws it: transformer and head."""

    def count(model: Model) -> dict[str, int]:
        draw = {"steps": options.steps, "guidance": options.guidance, "source": torch.Generator()}
        labels = torch.empty(1, dtype=torch.long)
        return dict(zip(("transformer", "head"), _flops(lambda: sample(model, labels, **draw)), strict=True))

    return _at_depth(shape, lambda model: count(model.eval()))


def _at_depth(shape: Shape, count: Callable[[Model], dict[str, int]]) -> dict[str, int]:
    """Counts of a model, from two shallow ones: all blocks cost the same."""
    with FakeTensorMode():
        one, two = (count(models.build(_with(shape, depth=depth))) for depth in (1, 2))
    return {name: one[name] + (shape.model["depth"] - 1) * (two[name] - one[name]) for name in one}


def _flops(work: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of `work`: in transformers, elsewhere."""
    with FlopCounterMode(display=False) as counter:
        work()
    inside = sum(counter.get_flop_counts().get("Transformer", {}).values())
    return inside, counter.get_total_flops() - inside


def tokenizer_flops(tokenizer: Tokenizer) -> tuple[int, int]:
    """(encode, decode) of one image."""
    side = tokenizer.image_size // tokenizer.downsample
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        image = torch.empty(1, 3, tokenizer.image_size, tokenizer.image_size)
        latent = torch.empty(1, tokenizer.latent_channels, side, side)
        return sum(_flops(lambda: tokenizer.encode(image))), sum(_flops(lambda: tokenizer.decode(latent)))


def disk_bytes(parameters: config.Parameters, shape: Shape, *, images: int, weights: int) -> dict[str, int]:
    """What the stages write. Compressed images are counted as if they were not: the saving depends on them."""
    channels, h, w = shape.latent
    side = parameters.data.image_size
    state = (1 + 2 + _AVERAGES) * weights  # weights, moments, averages
    return {
        "data/prepared": images * (3 * side**2 + _FLOAT),
        "data/latents": images * (2 * 2 * channels * h * w * _HALF + _FLOAT),
        "data/model": weights + state,  # the state is where finetune starts
        "data/finetuned": weights,
        "work, while a phase trains": 3 * state,  # two checkpoints and the one being written
        "data/samples": parameters.sample.count * 3 * side**2,
    }
