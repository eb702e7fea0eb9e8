"""Strictly proper scores, each with the head that it trains, behind one interface.

A score is a module with
    loss(hidden [N, W], target [N, D], *, temperature, generator) => [N]
    sample(hidden [N, W], *, source, temperature, unconditional, guidance) => [N, D]
    evaluations_per_token, the network evaluations that drawing one token takes
so that the transformer never knows which score it serves.
"""

from torch import nn

from ear.scores.energy import EnergyScore

SCORES = {"energy": EnergyScore}


def build(name: str, *, hidden_width: int, token_channels: int, width: int, depth: int, **options) -> nn.Module:
    """The score `name` with its head: `width` and `depth` of the head, `options` as in the score's section.

    Raises ValueError for an unknown name.
    """
    if name not in SCORES:
        raise ValueError(f"score.name is {name!r}; it must be one of {', '.join(SCORES)}.")
    sizes = {"hidden_width": hidden_width, "token_channels": token_channels, "width": width, "depth": depth}
    return SCORES[name](**sizes, **options)
