"""AdamW and Muon over parameter groups, and learning rates as functions of images seen."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ear.errors import UserError

# Of Muon, as its authors use it.
_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_SMALLEST_NORM = 1e-7


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
    """Names of the state that `adamw` or MuonAdamW keeps for a parameter, such as exp_avg."""
    if isinstance(optimizer, MuonAdamW) and id(parameter) in optimizer.matrices:
        return {"momentum_buffer"}
    return {"step", "exp_avg", "exp_avg_sq"}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and fused AdamW for all other parameters, as one optimiser.

    Muon (Jordan et al. 2024) replaces the momentum update of a matrix, an average of its gradients, by an orthogonal
    matrix near it. Updates are scaled to the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982), so both can use the
    same learning rates and weight decays. Matrices must not be sharded. On GPUs, orthogonalisation rounds to bfloat16,
    so all ranks need the same kind of device to keep the same weights.
    """

    found_inf: Tensor  # [], 1 if this step must not change anything; set before each step
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
        self._muon = _declared(inside, learning_rate)
        super().__init__([*self._adamw.param_groups, *self._muon], {})  # the same dicts
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters, or none if `found_inf` is 1; the host does not wait for it. No closure is called."""
        self._adamw.found_inf, self._adamw.grad_scale = self.found_inf, None  # type: ignore[attr-defined]
        self._adamw.step()
        kept, broken = 1 - self.found_inf, self.found_inf > 0
        for group in self._muon:
            rate, decay = group["lr"], group["weight_decay"]
            for matrix in group["params"]:
                gradient = matrix.grad.masked_fill(broken, 0.0)
                average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                average.lerp_(gradient, (1 - _MOMENTUM) * kept)
                length = 0.2 * math.sqrt(max(matrix.shape))  # of AdamW's updates, root mean square
                update = orthogonalised(gradient.lerp(average, _MOMENTUM))
                matrix.mul_(1 - rate * decay * kept).add_(update * (-rate * length * kept))


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with all singular values near 1 (0.68 to 1.13), except those that are close to 0.

    Five Newton-Schulz iterations with the coefficients of Jordan et al. (2024): in bfloat16 on GPUs, as theirs, and in
    float32 on CPUs, where bfloat16 takes 20 times as long without hardware support.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)


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
