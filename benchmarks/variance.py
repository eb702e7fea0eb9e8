"""Variance of the gradient with all pairs of m samples, and with antithetic noise, relative to disjoint pairs.

    python -m benchmarks.variance [--save]

All are unbiased estimates of the energy score from equally many head evaluations. Two settings: gradients with respect
to location and scale of a perfect forecast, N(0, I) in 16 dimensions, over draws of noise and target; and gradients
with respect to all weights of a briefly trained head of the digits preset, for one batch and many draws of noise.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks import measure
from ear import scores
from ear.config import Parameters
from ear.config.compose import compose
from ear.config.scores import Energy
from ear.runtime.randomness import generator, stream
from ear.scores.energy import EnergyScore, energy_loss

_DIMENSIONS = 16
_TARGETS = 400  # in the analytic setting
_BATCH = 256  # tokens of one batch
_STEPS = 300  # of training the head
_DRAWS = 100  # of noise


# [m, N, D], [k, N, D] => loss [N]
ESTIMATES = {pairs: partial(energy_loss, alpha=1.0, pairs=pairs) for pairs in ("disjoint", "all", "antithetic")}


def mirrored(noise: Tensor, pairs: str) -> Tensor:
    """The noise [m, ...]; for antithetic pairs, its first half, and that with opposite sign."""
    half = noise[: len(noise) // 2]
    return torch.cat([half, -half]) if pairs == "antithetic" else noise


def of_location_and_scale(m: int) -> dict[str, dict[str, float]]:
    """Variance of a token's gradient with respect to location (one coordinate) and scale, for a perfect forecast."""
    source = generator(0, "analytic", m)
    target = torch.randn(1, _TARGETS, 1, _DIMENSIONS, generator=source, dtype=torch.float64)
    noise = torch.randn(m, _TARGETS, _DRAWS, _DIMENSIONS, generator=source, dtype=torch.float64)
    variances = {}
    for name, estimate in ESTIMATES.items():
        location = torch.zeros(_TARGETS, _DRAWS, _DIMENSIONS, dtype=torch.float64, requires_grad=True)
        scale = torch.ones(_TARGETS, _DRAWS, 1, dtype=torch.float64, requires_grad=True)
        loss = estimate(location + scale * mirrored(noise, name), target).sum()
        by_location, by_scale = torch.autograd.grad(loss, (location, scale))
        variances[name] = {
            "location": float(by_location.flatten(0, 1).var(dim=0).mean()),
            "scale": float(by_scale.var()),
            "scale_given_target": float(by_scale.var(dim=1).mean()),
        }
    return variances


def trained_head(parameters: Parameters, m: int) -> tuple[EnergyScore, Tensor, Tensor]:
    """(a briefly trained head, hidden states [N, W], targets [N, D]); the target is a noisy linear map of the state."""
    model, source, noise = parameters.model, generator(0, "head", m), stream(0, "head", m)
    channels = parameters.tokenizer.channels
    section = parameters.score.model_copy(update={"samples": m})
    options = Energy(**{key: getattr(section, key) for key in Energy.model_fields})
    size = scores.HeadSize(
        hidden_width=model.width, token_channels=channels, width=model.head_width, depth=model.head_depth
    )
    torch.manual_seed(0)  # layers draw initial weights from the global random state
    score = EnergyScore(options, size)
    score.initialise(source)
    mapping = torch.randn(model.width, channels, generator=source) / model.width**0.5
    optimizer = torch.optim.AdamW(score.parameters(), lr=1e-3)
    for _ in range(_STEPS):
        hidden = torch.randn(_BATCH, model.width, generator=source)
        target = hidden @ mapping + 0.5 * torch.randn(_BATCH, channels, generator=source)
        optimizer.zero_grad()
        score.loss(hidden, target, temperature=1.0, source=noise).value.mean().backward()
        optimizer.step()
    return score, hidden, target


def of_weights(parameters: Parameters, m: int) -> dict[str, float]:
    """Total variance of the gradient with respect to all weights of the head, for one batch, over draws of noise."""
    score, hidden, target = trained_head(parameters, m)
    weights = list(score.parameters())
    sums = {name: [torch.zeros_like(w) for w in weights] for name in ESTIMATES}
    squares = dict.fromkeys(ESTIMATES, 0.0)
    for draw in range(_DRAWS):
        noise = score.draw_noise((m, _BATCH), stream(draw, "noise"), hidden.device)
        for name, estimate in ESTIMATES.items():
            loss = estimate(score.generate(hidden, mirrored(noise, name)), target[None]).mean()
            gradients = torch.autograd.grad(loss, weights)
            squares[name] += sum(float(g.square().sum()) for g in gradients)
            sums[name] = [total + g for total, g in zip(sums[name], gradients, strict=True)]
    return {
        name: (squares[name] - sum(float(s.square().sum()) for s in sums[name]) / _DRAWS) / (_DRAWS - 1)
        for name in ESTIMATES
    }


def main() -> None:
    """Measure for the number of samples of the default parameters and for twice as many."""
    arguments = measure.arguments(__doc__).parse_args()
    parameters = compose([])
    torch.set_num_threads(parameters.compute.threads)
    counts = (parameters.score.samples, 2 * parameters.score.samples)
    figures = {
        f"m={m}": {"perfect_forecast": of_location_and_scale(m), "head_weights": of_weights(parameters, m)}
        for m in counts
    }
    measure.report("variance", figures, arguments)


if __name__ == "__main__":
    main()
