"""Which tokens are masked in training, and the order in which sampling reveals them.

Shapes: B images, L tokens. An order is a permutation of the L positions. Its first positions are the masked ones, so
sampling reveals an order from its end to its start.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ear.errors import UserError
from ear.runtime.randomness import Stream, uniform

_RATIO = NormalDist(1.0, 0.25)  # the mask ratio's distribution before it is cut to [minimum, 1] (MAR, section 4)


def random_orders(images: int, tokens: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
    """int64 [B, L]: an independent uniform permutation per image."""
    return uniform((images, tokens), source, device).argsort(dim=1, stable=True)


def masked_count(tokens: int, minimum: float, source: Stream) -> int:
    """Number of masked tokens: ceil(L r), r ~ N(1, 0.25^2) truncated to [minimum, 1], by inverting its distribution."""
    lowest = _RATIO.cdf(minimum)
    quantile = lowest + (0.5 - lowest) * source.fraction()
    return min(max(math.ceil(tokens * _RATIO.inv_cdf(quantile)), 1), tokens)


def mask_of(positions: Tensor, tokens: int) -> Tensor:
    """Positions int64 [B, n] => bool [B, L], true at these positions."""
    mask = torch.zeros(len(positions), tokens, dtype=torch.bool, device=positions.device)
    return mask.scatter_(1, positions, True)


def mask_first(orders: Tensor, count: int) -> Tensor:
    """bool [B, L]: true at the first `count` positions of each order."""
    return mask_of(orders[:, :count], orders.shape[1])


def masked_before_known(orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Orders [B, L], mask bool [B, L] => (orders with masked positions at their start, number of masked positions).

    Raises UserError if two images have different numbers of masked tokens.
    """
    counts = mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise UserError(f"images have {counts.min()} to {counts.max()} masked tokens; batch those with equally many.")
    known = ~mask.gather(1, orders)
    return orders.gather(1, known.long().argsort(dim=1, stable=True)), int(counts[0])


def masked_after(tokens: int, steps: int) -> list[int]:
    """Tokens still masked after each step: floor(L cos(pi/2 (s+1)/S)), at least 1, less than before, finally 0.

    This is MaskGIT's cosine schedule as used by MAR and EAR. With more steps than tokens, some steps reveal nothing.
    """
    left, remaining = [], tokens
    for step in range(steps - 1):
        target = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        remaining = max(1, min(remaining - 1, target))
        left.append(remaining)
    return [*left, 0]
