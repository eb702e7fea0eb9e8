"""Variance of the gradient with all pairs of m samples, and with antithetic noise, relative to disjoint pairs.

    python -m benchmarks.variance [--save]

All are unbiased estimates of the energy score from equally many head evaluations. Two settings: gradients with respect
to location and scale of a perfect forecast, N(0, I) in 16 dimensions, over draws of noise and target; and gradients
with respect to all weights of the head of models/digits.safetensors, for one batch of digits and many draws of noise.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import measure
from ear.config.compose import compose
from ear.config.scores import Pairs
from ear.data.images import to_signed
from ear.latents.statistics import normalised
from ear.model.tokens import patchify, pick
from ear.runtime.randomness import generator, normal, stream
from ear.sampling.portable import load_pipeline
from ear.scores.energy import energy_loss
from ear.scores.sample_based import SampleBasedScore

MODEL = Path(__file__).parents[1] / "models/digits.safetensors"
PAIRS: tuple[Pairs, ...] = ("disjoint", "all", "antithetic")

_DIMENSIONS = 16
_TARGETS = 400  # in the analytic setting
_IMAGES = 64  # of the batch of digits
_DRAWS = 100  # of noise


def mirrored(noise: Tensor, pairs: Pairs) -> Tensor:
    """The noise [m, ...]; for antithetic pairs, its first half, and that with opposite sign."""
    half = noise[: len(noise) // 2]
    return torch.cat([half, -half]) if pairs == "antithetic" else noise


def of_location_and_scale(m: int) -> dict[str, dict[str, float]]:
    """Variance of a token's gradient with respect to location (one coordinate) and scale, for a perfect forecast."""
    source = generator(0, "analytic", m)
    target = torch.randn(1, _TARGETS, 1, _DIMENSIONS, generator=source, dtype=torch.float64)
    noise = torch.randn(m, _TARGETS, _DRAWS, _DIMENSIONS, generator=source, dtype=torch.float64)
    variances: dict[str, dict[str, float]] = {}
    for pairs in PAIRS:
        location = torch.zeros(_TARGETS, _DRAWS, _DIMENSIONS, dtype=torch.float64, requires_grad=True)
        scale = torch.ones(_TARGETS, _DRAWS, 1, dtype=torch.float64, requires_grad=True)
        samples = location + scale * mirrored(noise, pairs)
        loss = energy_loss(samples, target, alpha=1.0, pairs=pairs).sum()
        by_location, by_scale = torch.autograd.grad(loss, (location, scale))
        variances[pairs] = {
            "location": float(by_location.flatten(0, 1).var(dim=0).mean()),
            "scale": float(by_scale.var()),
            "scale_given_target": float(by_scale.var(dim=1).mean()),
        }
    return variances


def digits_batch() -> tuple[SampleBasedScore, Tensor, Tensor]:
    """(the shipped model's head, hidden states [N, W], targets [N, D]) of digits with some tokens masked."""
    sampler = load_pipeline(MODEL).sampler
    model, drawn = sampler.model, stream(0, "batch")
    assert isinstance(model.score, SampleBasedScore)
    source = load_digits()
    grey = np.rint(source.images[:_IMAGES] * (255 / 16)).astype(np.uint8)
    with torch.no_grad():
        moments = sampler.tokenizer.encode(to_signed(grey[..., None].repeat(3, axis=-1)))
        noise = normal((_IMAGES, *model.shape.latent), drawn)
        tokens = patchify(normalised(moments, noise, sampler.statistics), model.patch)
        positions = model.training_positions(_IMAGES, drawn)
        hidden = model.predict(tokens, positions, torch.from_numpy(source.target[:_IMAGES]))
    return model.score.requires_grad_(), hidden.flatten(0, 1), pick(tokens, positions).flatten(0, 1)


def of_weights(m: int) -> dict[str, float]:
    """Total variance of the gradient with respect to all weights of the head, for one batch, over draws of noise."""
    score, hidden, target = digits_batch()
    weights, variances = list(score.parameters()), dict[str, float]()
    for pairs in PAIRS:
        score.samples, score.pairs = m, pairs
        total, squares = [torch.zeros_like(w) for w in weights], 0.0
        for draw in range(_DRAWS):
            loss = score.loss(hidden, target, temperature=1.0, source=stream(draw, "noise")).value.mean()
            gradients = torch.autograd.grad(loss, weights)
            squares += sum(float(g.square().sum()) for g in gradients)
            total = [s + g for s, g in zip(total, gradients, strict=True)]
        variances[pairs] = (squares - sum(float(s.square().sum()) for s in total) / _DRAWS) / (_DRAWS - 1)
    return variances


def main() -> None:
    """Measure for the number of samples of the default parameters and for twice as many."""
    arguments = measure.arguments(__doc__).parse_args()
    parameters = compose([])
    torch.set_num_threads(parameters.compute.threads)
    counts = (parameters.score.samples, 2 * parameters.score.samples)
    figures = {f"m={m}": {"perfect_forecast": of_location_and_scale(m), "head_weights": of_weights(m)} for m in counts}
    measure.report("variance", figures, arguments)


if __name__ == "__main__":
    main()
