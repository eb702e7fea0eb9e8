"""Exponential moving average (EMA) of weights, as a module of its own."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def decay_at(step: int, decay: float) -> float:
    """Decay of optimiser step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The warm-up lets the early EMA follow the weights; a constant 0.9999 would stay near the initial weights for 10,000
    steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Average(nn.Module, Generic[Network]):
    """The EMA of a module: `module` is a frozen copy in eval mode that holds the averaged weights.

    decay: per step, reached after a warm-up (`decay_at`).
    """

    module: Network

    def __init__(self, module: Network, decay: float):
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """EMA <- d * EMA + (1 - d) * source with d = decay_at(step, decay); integer buffers are copied."""
        ours, theirs = self.module.state_dict(), source.state_dict()
        names = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([ours[n] for n in names], [theirs[n] for n in names], 1.0 - decay_at(step, self.decay))
        for name in ours.keys() - set(names):
            ours[name].copy_(theirs[name])
