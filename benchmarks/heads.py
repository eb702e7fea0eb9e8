"""Cost of drawing a token in the head of each score, measured by turns.

    python -m benchmarks.heads [--save]

Untrained heads at the sizes of the digits preset and of the published base model, without guidance. The energy score
takes one evaluation per token, the diffusion loss `sample.denoising_steps`.
"""

import functools
import statistics

import torch

from benchmarks import measure
from benchmarks.models import INPUTS
from ear import scores
from ear.config import Parameters
from ear.config.compose import compose
from ear.runtime.randomness import generator, stream
from ear.scores import Score
from ear.scores.score import Denoising

_NAMES = ("energy", "logarithmic", "hyvarinen")

SIZES = {  # name: overrides, tokens drawn at once
    "digits": (["preset=digits"], 256),
    "base": (["preset=imagenet256_base", *INPUTS], 32),
}


def head(name: str, parameters: Parameters) -> Score:
    """An untrained head of that score in a preset's size, in eval mode."""
    model = parameters.model
    size = scores.HeadSize(
        hidden_width=model.width,
        token_channels=parameters.tokenizer.channels * model.patch_size**2,
        width=model.head_width,
        depth=model.head_depth,
    )
    return scores.build(parameters.score.model_copy(update={"name": name}).chosen, size).eval()


@torch.inference_mode()
def costs(overrides: list[str], tokens: int, steps: int, rounds: int) -> dict:
    """Median microseconds and evaluations per token of each score, and the ratio of hyvarinen to energy."""
    parameters, denoising = compose(overrides), Denoising(steps)
    hidden = torch.randn(tokens, parameters.model.width, generator=generator(0, "hidden"))
    heads = {name: head(name, parameters) for name in _NAMES}

    def draw(score: scores.Score) -> None:
        score.sample(hidden, source=stream(0, "noise"), denoising=denoising)

    ways = {name: functools.partial(draw, score) for name, score in heads.items()}
    seconds = measure.turns(ways, rounds=rounds)
    ratio = measure.speedup(seconds["energy"], seconds["hyvarinen"])
    return {
        "preset": overrides[0],
        "tokens": tokens,
        "parameters": {name: sum(p.numel() for p in score.parameters()) for name, score in heads.items()},
        "evaluations_per_token": {name: score.evaluations_per_token(denoising) for name, score in heads.items()},
        "microseconds_per_token": {name: statistics.median(each) * 1e6 / tokens for name, each in seconds.items()},
        "hyvarinen_over_energy": ratio["speedup"],
        "hyvarinen_over_energy_range": ratio["speedup_range"],
    }


def main() -> None:
    """Measure all sizes."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="sampling steps of the diffusion loss (default: 100)")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median is reported (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(compose([]).compute.threads)
    figures = {name: costs(*size, arguments.steps, arguments.rounds) for name, size in SIZES.items()}
    measure.report("heads", figures, arguments)


if __name__ == "__main__":
    main()
