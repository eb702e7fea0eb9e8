"""The transformer: pre-norm blocks of self-attention and MLP, as in ViT (Dosovitskiy et al., 2021), or modern ones.

Modern blocks have RMSNorm, also of queries and keys (QK-norm), SwiGLU, and rotary position embeddings.
Attention is bidirectional, or causal with a cache of keys and values for generation.
Shapes: B images, T sequence positions, W width, H heads.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ear import config
from ear.model.rotary import Rotation, rotate
from ear.model.tokens import pick

_NORM_EPS = 1e-6  # of every norm


class Cache:
    """Keys and values of the positions that an attention layer has seen, in buffers for all positions."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._buffers: list[Tensor] = []  # keys and values, [B, H, capacity, W/H] each, from the first call on

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of t new positions, [B, H, t, W/H] each => those of all positions so far."""
        if not self._buffers:
            b, h, _, channels = keys.shape
            self._buffers = [new.new_empty(b, h, self.capacity, channels) for new in (keys, values)]
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.capacity, f"{self.length} positions in a cache for {self.capacity}"
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start : self.length] = new
        keys, values = (buffer[:, :, : self.length] for buffer in self._buffers)
        return keys, values


def mlp_width(options: config.Model) -> int:
    """Width of the MLP between its matrices: `mlp_ratio` times the transformer's.

    Of modern blocks, which have three matrices instead of two, two thirds of that, rounded up to a multiple of 8.
    """
    width = options.width * options.mlp_ratio
    return -(-round(width * 2 / 3) // 8) * 8 if options.blocks == "modern" else round(width)


def _norm(channels: int, options: config.Model) -> nn.Module:
    kind = nn.RMSNorm if options.blocks == "modern" else nn.LayerNorm
    return kind(channels, eps=_NORM_EPS)


class Attention(nn.Module):
    """Multi-head self-attention; one fused projection to queries, keys and values."""

    def __init__(self, options: config.Model):
        super().__init__()
        self.heads, self.dropout, self.causal = options.heads, options.dropout, options.attention == "causal"
        self.qkv = nn.Linear(options.width, 3 * options.width)
        self.projection = nn.Linear(options.width, options.width)
        self.normed = options.blocks == "modern"
        if self.normed:
            self.query_norm, self.key_norm = (_norm(options.width // options.heads, options) for _ in range(2))

    def forward(
        self, x: Tensor, cache: Cache | None = None, wanted: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """[B, T, W] => [B, T, W]; with a cache, the T positions follow those that it holds.

        wanted: int64 [B, n]; the result is computed at these positions only, [B, n, W]. rotation: of the queries (n of
        them if `wanted`) and of the T keys.
        """
        if wanted is None:
            q, k, v = self._split(self.qkv(x), 3)
        else:
            weights, biases = (part.split((x.shape[-1], 2 * x.shape[-1])) for part in (self.qkv.weight, self.qkv.bias))
            (q,) = self._split(F.linear(pick(x, wanted), weights[0], biases[0]), 1)
            k, v = self._split(F.linear(x, weights[1], biases[1]), 2)
        assert wanted is None or not self.causal  # the mask of causal attention is of all positions
        if self.normed:
            q, k = self.query_norm(q.float()), self.key_norm(k.float())
        if rotation is not None:
            q, k = rotate(q, rotation.queries), rotate(k, rotation.keys)
        q, k = q.type_as(v), k.type_as(v)  # norms and rotations are float32, also under autocast
        if cache is not None:
            # A single new position attends to all earlier ones and needs no mask; several must be the first positions.
            assert self.causal
            assert cache.length == 0 or x.shape[1] == 1
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, W]
        return F.dropout(self.projection(mixed), self.dropout, self.training)

    def _split(self, x: Tensor, parts: int) -> Iterable[Tensor]:
        """[B, T, parts W] => `parts` tensors [B, H, T, W/H]."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class SwiGLU(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, options: config.Model):
        super().__init__()
        hidden = mlp_width(options)
        self.gate, self.up = nn.Linear(options.width, hidden), nn.Linear(options.width, hidden)
        self.down = nn.Linear(hidden, options.width)
        self.dropout = options.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] => [..., W]."""
        hidden = F.dropout(F.silu(self.gate(x)) * self.up(x), self.dropout, self.training)
        return F.dropout(self.down(hidden), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    Dropout acts on the weights of attention, after its projection, after the GELU or the gate, and after the MLP's last
    layer.
    """

    def __init__(self, options: config.Model):
        super().__init__()
        width, dropout = options.width, options.dropout
        hidden = mlp_width(options)
        self.attention_norm = _norm(width, options)
        self.attention = Attention(options)
        self.mlp_norm = _norm(width, options)
        self.mlp: nn.Module = (
            SwiGLU(options)
            if options.blocks == "modern"
            else nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
            )
        )

    def forward(
        self, x: Tensor, cache: Cache | None = None, wanted: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """[B, T, W] => [B, T, W], or [B, n, W] at the positions `wanted`, int64 [B, n]."""
        mixed = self.attention(self.attention_norm(x), cache, wanted, rotation)
        x = (x if wanted is None else pick(x, wanted)) + mixed
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm."""

    def __init__(self, options: config.Model):
        super().__init__()
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.norm = _norm(options.width, options)
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations

    def caches(self, capacity: int) -> list[Cache]:
        """Empty caches for a sequence of up to `capacity` positions, one per block."""
        return [Cache(capacity) for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        caches: list[Cache] | None = None,
        wanted: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """[B, T, W] => [B, T, W]; with `caches`, the T positions follow those of earlier calls.

        wanted: int64 [B, n]; the last block computes these positions only, and the result is [B, n, W]. rotation: of
        the T positions, for modern blocks.
        """
        recompute = self.checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            cache = None if caches is None else caches[number]
            rows = wanted if number == len(self.blocks) - 1 else None
            turn = rotation if rows is None or rotation is None else rotation.of_queries(rows)
            inputs = (x, cache, rows, turn)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return self.norm(x)
