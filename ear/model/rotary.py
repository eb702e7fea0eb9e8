"""Rotary position embeddings (Su et al., 2021) on a grid, with axial frequencies (Heo et al., 2024).

One half of a query or key is rotated by angles proportional to its row, the other half by its column. So the product of
a query and a key depends on the offset between their positions. Buffer tokens, which have none, are not rotated.
Shapes: T sequence positions, d channels of an attention head; b images, or 1 if all images share the positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

_BASE = 100.0  # the slowest frequency is about 1/_BASE radians per row or column; grids here have at most 64 of them


class Rotation(NamedTuple):
    """Cosines and sines of the angles of queries and of keys, [2, b, T, d/2] each."""

    queries: Tensor
    keys: Tensor

    def of_queries(self, wanted: Tensor) -> "Rotation":
        """For queries at the positions `wanted` only, int64 [B, n]; all images must share the T positions."""
        return Rotation(self.queries[:, 0, wanted], self.keys)


class RotaryTable(nn.Module):
    """The angles of all positions of a sequence: first `buffer` positions without a place, then the grid, row by row.

    grid: rows and columns. channels: d, a multiple of 4.
    """

    table: Tensor  # [2, P + L, d/2]

    def __init__(self, grid: tuple[int, int], *, buffer: int, channels: int):
        super().__init__()
        frequencies = _BASE ** -torch.linspace(0, 1, channels // 4 + 1)[:-1]
        rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (rows, columns)], dim=1)  # [L, d/2]
        angles = torch.cat([torch.zeros(buffer, channels // 2), angles])
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Rotation:
        """Positions int64 [b, T] in the sequence, of queries and of keys."""
        of_keys = self.table[:, keys]
        return Rotation(of_keys if queries is keys else self.table[:, queries], of_keys)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys [B, H, T, d], cosines and sines [2, b, T, d/2] => [B, H, T, d] in the type of `angles`."""
    cos, sin = angles[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
