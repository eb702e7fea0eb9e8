"""Latents as sequences of tokens, and selecting tokens by position.

Shapes: B images, C latent channels, (h, w) latent grid, L tokens of D = C p^2 channels (patch side p).
"""

import torch
from torch import Tensor


def patchify(latents: Tensor, p: int) -> Tensor:
    """[B, C, h, w] => tokens [B, L, D]: patches row by row; within a token, channel first, then row, then column."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, p: int, latent: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`: tokens [B, L, D] => latents [B, C, h, w]."""
    c, h, w = latent
    patches = tokens.reshape(-1, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, c, h, w)


def pick(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows [B, L, X] at positions [B, n] => [B, n, X]."""
    first = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    # As one list of rows: the backward pass of `gather` would sort every coordinate to be deterministic on a GPU.
    return rows.flatten(0, 1).index_select(0, (positions + first).flatten()).unflatten(0, positions.shape)
