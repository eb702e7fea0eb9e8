"""Strictly proper scores, each with the head that it trains, behind one interface (ear.scores.score).

A new score is one file with a subclass of Score, one entry here and its options in ear.config.Score.
"""

from ear.scores.categorical import CategoricalScore
from ear.scores.energy import EnergyScore
from ear.scores.hyvarinen import HyvarinenScore
from ear.scores.kernel import KernelScore
from ear.scores.logarithmic import LogarithmicScore
from ear.scores.score import Score

SCORES: dict[str, type[Score]] = {
    "energy": EnergyScore,
    "kernel": KernelScore,
    "logarithmic": LogarithmicScore,
    "hyvarinen": HyvarinenScore,
    "categorical": CategoricalScore,
}


def build(options: dict, *, hidden_width: int, token_channels: int, width: int, depth: int) -> Score:
    """The score that `options` (the score section of params.yaml) names, with a head of that width and depth.

    Raises ValueError for an unknown name.
    """
    kind = _kind(options["name"])
    sizes = {"hidden_width": hidden_width, "token_channels": token_channels, "width": width, "depth": depth}
    return kind(**sizes, **{key: options[key] for key in kind.options})


def chosen(options: dict) -> dict:
    """Of the score section, the name and what that score takes; raises ValueError for an unknown name."""
    return {key: _plain(options[key]) for key in ("name", *_kind(options["name"]).options)}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _kind(name: str) -> type[Score]:
    if name not in SCORES:
        raise ValueError(f"score.name is {name!r}; it must be one of {', '.join(SCORES)}.")
    return SCORES[name]
