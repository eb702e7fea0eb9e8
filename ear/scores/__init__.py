"""Strictly proper scores, each with the head that it trains, behind one interface (`score`).

To add one: its file here and its entry in `SCORES`, its options in ear.config.scores, its defaults in conf/config.yaml.
"""

from ear.config.scores import ScoreOptions
from ear.scores.categorical import CategoricalScore
from ear.scores.energy import EnergyScore
from ear.scores.hyvarinen import HyvarinenScore
from ear.scores.kernel import KernelScore
from ear.scores.logarithmic import LogarithmicScore
from ear.scores.score import HeadSize, Score

__all__ = ["SCORES", "HeadSize", "Score", "build"]

SCORES: dict[str, type[Score]] = {
    "energy": EnergyScore,
    "kernel": KernelScore,
    "logarithmic": LogarithmicScore,
    "hyvarinen": HyvarinenScore,
    "categorical": CategoricalScore,
}


def build(options: ScoreOptions, size: HeadSize) -> Score:
    """The score that `options` belong to, with a head of that size."""
    return SCORES[options.name](options, size)
