"""AdamW over parameter groups, and learning rates as functions of images seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ear.errors import UserError


@dataclass(frozen=True)
class Group:
    """Parameters that share a weight decay and a rate relative to the base rate."""

    parameters: list[nn.Parameter]
    weight_decay: float
    rate: float = 1.0


def adamw(groups: list[Group], *, learning_rate: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """Fused AdamW; each group keeps its own base rate in "base", which `set_rate` multiplies."""
    declared = [
        {
            "params": g.parameters,
            "weight_decay": g.weight_decay,
            "lr": learning_rate * g.rate,
            "base": learning_rate * g.rate,
        }
        for g in groups
        if g.parameters
    ]
    return torch.optim.AdamW(declared, betas=(beta1, beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def schedule(name: str, *, total_images: int, warmup_images: int) -> Callable[[int], float]:
    """Images seen => factor of the base rate: linear warm-up from 0, then constant, or cosine to 0 at the end.

    Raises UserError if the warm-up is longer than the training.
    """
    if warmup_images > total_images > 0:
        raise UserError(
            f"warmup_images is {warmup_images}, more than the {total_images} images of the training; lower it."
        )

    def factor(images: int) -> float:
        if images < warmup_images:
            return images / warmup_images
        if name == "constant":
            return 1.0
        span = max(total_images - warmup_images, 1)
        return 0.5 * (1 + math.cos(math.pi * min((images - warmup_images) / span, 1.0)))

    assert name in ("constant", "cosine"), name
    return factor
