"""A residual MLP with adaptive layer norm, used by the heads (DiT's modulation on MAR's per-token MLP).

One input is the residual stream, the other modulates it. Energy score: the hidden state is the stream, the noise
modulates. Diffusion loss: the noised token is the stream, hidden state and time modulate. Shapes: N rows, h width, D
output channels; leading dimensions are free.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-6  # of every layer norm


class ModulatedBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), all three modulations linear in SiLU(condition)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulations: Tensor, temperature: float) -> Tensor:
        """x [..., N, h], modulations [..., N, 3 h] => [..., N, h]; `temperature` multiplies the shift."""
        shift, scale, gate = modulations.chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift * temperature)


class ModulatedMLP(nn.Module):
    """Modulated blocks and a modulated linear output that is initialised to zero."""

    def __init__(self, *, width: int, depth: int, out_channels: int):
        super().__init__()
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, out_channels)

    def zero_initialise(self) -> None:
        """Zero all modulations and the output layer: each block starts as the identity, the output as 0."""
        for layer in (*self._modulation_layers(), self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _modulation_layers(self) -> list[nn.Linear]:
        """The modulation layers of the blocks, then that of the output."""
        return [block.modulation for block in self.blocks if isinstance(block, ModulatedBlock)] + [
            self.output_modulation
        ]

    def _modulations(self, condition: Tensor) -> Sequence[Tensor]:
        """Condition [..., N, h] => the result of every modulation layer, from one matrix product."""
        layers = self._modulation_layers()
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(condition, weight, bias).split([layer.out_features for layer in layers], dim=-1)

    def forward(self, stream: Tensor, condition: Tensor, temperature: float = 1.0) -> Tensor:
        """Stream, condition [..., N, h] => float32 [..., N, D]; the temperature does not affect the output layer."""
        *modulations, last = self._modulations(F.silu(condition))
        for block, modulation in zip(self.blocks, modulations, strict=True):
            stream = block(stream, modulation, temperature)
        shift, scale = last.chunk(2, dim=-1)
        normed = F.layer_norm(stream, stream.shape[-1:], eps=_NORM_EPS) * (1 + scale) + shift
        # In bfloat16, differences between nearby samples lose their direction. The blocks lose some of it already; the
        # last layer computes in float32, so that the samples are not rounded once more.
        with torch.autocast(normed.device.type, enabled=False):
            return self.output(normed.float())
