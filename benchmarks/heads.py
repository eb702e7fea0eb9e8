"""What does it cost to draw a token in the head of each score?

    python -m benchmarks.heads [--save]

Untrained heads at the size of the digits preset and of the published base model, without guidance: the energy score
takes one evaluation per token, the diffusion loss `score.sampling_steps`.
"""

from dataclasses import asdict, dataclass

import torch

from benchmarks import measure
from ear import scores
from ear.configure import compose
from ear.randomness import generator
from ear.scores import Score

_NAMES = ("energy", "logarithmic", "hyvarinen")


@dataclass(frozen=True)
class Size:
    """Of a head and what it is asked for."""

    hidden_width: int
    token_channels: int
    width: int
    depth: int
    noise_channels: int
    tokens: int  # drawn at once


SIZES = {
    "digits": Size(hidden_width=128, token_channels=4, width=128, depth=3, noise_channels=32, tokens=256),
    "base": Size(hidden_width=768, token_channels=16, width=1024, depth=6, noise_channels=64, tokens=32),
}


def head(name: str, size: Size, sampling_steps: int) -> Score:
    """An untrained head of that score and size, in eval mode."""
    options = {**asdict(compose([]).score), "name": name}
    options |= {"noise_channels": size.noise_channels, "sampling_steps": sampling_steps}
    sizes = {key: getattr(size, key) for key in ("hidden_width", "token_channels", "width", "depth")}
    return scores.build(options, **sizes).eval()


@torch.inference_mode()
def costs(size: Size, sampling_steps: int, repeats: int) -> dict:
    """Microseconds and evaluations per token of each score, and how much faster energy is than hyvarinen."""
    hidden = torch.randn(size.tokens, size.hidden_width, generator=generator(0, "hidden"))
    heads = {name: head(name, size, sampling_steps) for name in _NAMES}
    microseconds = {}
    for name, score in heads.items():
        seconds = measure.median_seconds(lambda s=score: s.sample(hidden, source=generator(0, "noise")), repeats)
        microseconds[name] = seconds * 1e6 / size.tokens
    return {
        "size": asdict(size),
        "evaluations_per_token": {name: score.evaluations_per_token for name, score in heads.items()},
        "microseconds_per_token": microseconds,
        "hyvarinen_over_energy": microseconds["hyvarinen"] / microseconds["energy"],
    }


def main() -> None:
    """Measure all sizes."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="sampling steps of the diffusion loss (default: 100)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median counts (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(compose([]).compute.threads)
    figures = {name: costs(size, arguments.steps, arguments.repeats) for name, size in SIZES.items()}
    measure.report("heads", figures, save=arguments.save)


if __name__ == "__main__":
    main()
