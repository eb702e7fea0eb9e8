"""AdamW and Muon over parameter groups, and learning rates as functions of images seen."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ear.errors import UserError

_MOMENTUM = 0.95  # of Muon, as its authors use it


@dataclass(frozen=True)
class Group:
    """Parameters that share a weight decay and a rate relative to the base rate."""

    parameters: list[nn.Parameter]
    weight_decay: float
    rate: float = 1.0


def adamw(groups: list[Group], *, learning_rate: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """Fused AdamW; each group keeps its own base rate in "base", which `set_rate` multiplies."""
    return torch.optim.AdamW(_declared(groups, learning_rate), betas=(beta1, beta2), fused=True)


def moment_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> set[str]:
    """The names under which `adamw` or MuonAdamW keeps what it needs of the past gradients of a parameter."""
    if isinstance(optimizer, MuonAdamW) and id(parameter) in optimizer.matrices:
        return {"momentum_buffer"}
    return {"step", "exp_avg", "exp_avg_sq"}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and fused AdamW for all other parameters, as one optimiser.

    Muon (Jordan et al. 2024) replaces the update of a matrix, an average of its gradients, by an orthogonal matrix near
    it. Updates are scaled to the length of AdamW's (Liu et al. 2025, arXiv:2502.16982), so rates and weight decays mean
    the same for both. Matrices must be whole: no sharding. Orthogonalisation rounds to bfloat16, so ranks need the same
    kind of device to keep the same weights.
    """

    found_inf: Tensor  # [], 1 if this step must not change the parameters; set before each step
    grad_scale: None  # no loss is scaled

    def __init__(
        self,
        groups: list[Group],
        matrices: Collection[nn.Parameter],  # parameters of the groups that Muon trains
        *,
        learning_rate: float,
        beta1: float,  # of AdamW
        beta2: float,
    ):
        self.matrices = chosen = {id(matrix) for matrix in matrices}
        inside, outside = (
            [replace(g, parameters=[p for p in g.parameters if (id(p) in chosen) == wanted]) for g in groups]
            for wanted in (True, False)
        )
        self._adamw = adamw(outside, learning_rate=learning_rate, beta1=beta1, beta2=beta2)
        declared = _declared(inside, learning_rate)
        for group in declared:
            group["decay"] = group.pop("weight_decay")  # done here, so that it can be skipped
        self._muon = torch.optim.Muon(
            declared, lr=learning_rate, weight_decay=0.0, momentum=_MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})  # the same dicts
        self._adamw.state = self._muon.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters, or none if `found_inf` is 1; the host does not wait for it. No closure is called.

        With `found_inf`, Muon's averages become 0: the training is expected to end.
        """
        self._adamw.found_inf, self._adamw.grad_scale = self.found_inf, None  # type: ignore[attr-defined]
        self._adamw.step()
        kept = 1 - self.found_inf
        for group in self._muon.param_groups:
            matrices: list[Tensor] = group["params"]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["decay"] * kept)
            for matrix in matrices:  # gradient and average 0 make an update of 0
                assert matrix.grad is not None
                matrix.grad.masked_fill_(self.found_inf > 0, 0.0)
                for moment in self.state[matrix].values():
                    moment.mul_(kept)
        self._muon.step()


def _declared(groups: Sequence[Group], learning_rate: float) -> list[dict[str, Any]]:
    """The groups as torch's optimisers take them; their own base rate is kept in "base"."""
    return [
        {
            "params": g.parameters,
            "weight_decay": g.weight_decay,
            "lr": learning_rate * g.rate,
            "base": learning_rate * g.rate,
        }
        for g in groups
        if g.parameters
    ]


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
