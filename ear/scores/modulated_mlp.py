"""The residual MLP with adaptive layer norm that heads are made of (DiT's modulation on MAR's per-token MLP).

One vector is the residual stream, another modulates it: for the energy score the hidden state is the stream and the
noise modulates; for the diffusion loss the noised token is the stream and hidden state and time modulate.
Shapes: N rows, h width, D output channels; leading dimensions are free.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of every layer norm in heads and transformer


class ModulatedBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), all three modulations linear in SiLU(condition)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor, temperature: float) -> Tensor:
        """x, condition [..., N, h] => [..., N, h]; `temperature` multiplies the shift."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift * temperature)


class ModulatedMLP(nn.Module):
    """Blocks and a modulated linear output that starts at zero."""

    def __init__(self, *, width: int, depth: int, out_channels: int):
        super().__init__()
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, out_channels)

    def zero_initialise(self) -> None:
        """Zero every modulation and the output: each block starts as the identity and the output as 0."""
        for layer in [*(block.modulation for block in self.blocks), self.output_modulation, self.output]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, stream: Tensor, condition: Tensor, temperature: float = 1.0) -> Tensor:
        """stream, condition [..., N, h] => float32 [..., N, D]; the inference temperature never touches the output."""
        condition = F.silu(condition)
        for block in self.blocks:
            stream = block(stream, condition, temperature)
        shift, scale = self.output_modulation(condition).chunk(2, dim=-1)
        normed = F.layer_norm(stream, stream.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
        # Distances between samples lose their direction in bfloat16, so the last layer computes in float32.
        with torch.autocast(normed.device.type, enabled=False):
            return self.output(normed.float())
