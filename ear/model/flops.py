"""Floating-point operations of training a model; a multiply-add counts as two.

Torch counts them on the real model, with fake tensors (shapes and types, but no data).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ear.model.autoregressive import AutoregressiveModel, MeanLoss
from ear.model.files import build_model
from ear.model.masking import masked_count
from ear.model.shape import Shape
from ear.runtime import randomness

_MASK_DRAWS = 4096  # for the mean number of masked tokens


def training_flops(shape: Shape) -> dict[str, int]:
    """Operations per training image: forward pass (transformer; all else), and forward plus backward pass (total)."""
    predicted = mean_predicted(shape)

    def costs(model: AutoregressiveModel) -> dict[str, int]:
        forward = count(lambda: loss_without_data(model, images=1, predicted=predicted))
        both = count(lambda: loss_without_data(model, images=1, predicted=predicted).value.backward())
        return {"forward, transformer": forward[0], "forward, head": forward[1], "forward and backward": sum(both)}

    return at_depth(shape, lambda model: costs(model.train()))


def mean_predicted(shape: Shape) -> int:
    """Tokens predicted per training image, on average (all of them by a causal model)."""
    if shape.model.attention == "causal":
        return shape.tokens
    source = randomness.stream(0, "masks")
    draws = [masked_count(shape.tokens, shape.model.mask_ratio_min, source) for _ in range(_MASK_DRAWS)]
    return round(sum(draws) / len(draws))


def at_depth(shape: Shape, costs: Callable[[AutoregressiveModel], dict[str, int]]) -> dict[str, int]:
    """Counts of a model extrapolated from depths 1 and 2: all blocks cost the same."""
    with FakeTensorMode():
        one, two = (costs(build_model(with_options(shape, depth=depth))) for depth in (1, 2))
    return {name: one[name] + (shape.model.depth - 1) * (two[name] - one[name]) for name in one}


def with_options(shape: Shape, **changes) -> Shape:
    """The shape with some model options changed."""
    return dataclasses.replace(shape, model=shape.model.model_copy(update=changes))


def loss_without_data(model: AutoregressiveModel, *, images: int, predicted: int) -> MeanLoss:
    """The training loss on fake tensors, with `predicted` positions per image (fake tensors cannot draw the number)."""
    tokens = torch.empty(model.score.targets, images, model.tokens, model.shape.token_channels)
    labels, null = torch.empty(images, dtype=torch.long), torch.empty(images, dtype=torch.bool)
    positions = torch.empty(images, predicted).long()
    represented = torch.stack([model.score.represent(draw) for draw in tokens])
    return model.loss_at(positions, represented, labels, null, temperature=1.0, source=randomness.stream(0))


def count(work: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of `work`: in transformers, elsewhere."""
    with FlopCounterMode(display=False) as counter:
        work()
    inside = sum(counter.get_flop_counts().get("Transformer", {}).values())
    return inside, counter.get_total_flops() - inside
