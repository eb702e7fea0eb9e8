"""A conditional mixture that a head alone must learn, in seconds on one thread."""

import math
from typing import NamedTuple

import torch
from factories import score_options

from ear import scores
from ear.runtime.randomness import generator, stream
from ear.scores.score import Denoising, Score
from ear.training.ema import Average

_DENOISING = Denoising(steps=20, limit=3.0)
HIDDEN = 8  # width of the hidden state that carries the condition
_DIRECTION = torch.randn(HIDDEN, generator=generator(0, "direction"))


class Figures(NamedTuple):
    """How a head's samples at one condition compare with the truth."""

    squared_energy_distance: float
    weight_error: float  # of the mode of weight 0.3
    spread: float  # standard deviation within a mode over the true one


def hidden(condition: torch.Tensor) -> torch.Tensor:
    """condition [N] => hidden states [N, 8]."""
    return condition[:, None] * _DIRECTION


def mixture(condition: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """[N, 2]: two Gaussians (sd 0.3, weights 0.3 and 0.7) at +-(cos, sin)(condition pi/4)."""
    sign = torch.where(torch.rand(len(condition), 1, generator=source) < 0.3, 1.0, -1.0)
    return sign * _centre(condition) + 0.3 * torch.randn(len(condition), 2, generator=source)


def _centre(condition: torch.Tensor) -> torch.Tensor:
    angle = condition * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def head(name: str, *, token_channels=2, width=32, seed=0, **options) -> Score:
    """An untrained head for the toy problem."""
    size = scores.HeadSize(hidden_width=HIDDEN, token_channels=token_channels, width=width, depth=2)
    # Copied without checks, so that tests can show what an excluded value would do.
    score = scores.build(score_options(name).model_copy(update={"noise_channels": 16, **options}), size)
    source = generator(seed, "head")
    for module in score.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight, generator=source)
            torch.nn.init.zeros_(module.bias)
    score.initialise(source)
    return score


def _conditions(count: int, source: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(count, generator=source) < 0.5, 1.0, -1.0)


def fit(score: Score, *, steps: int = 600, temperature: float = 1.0, rate: float = 4e-3) -> Score:
    """Train the head alone on random conditions in {-1, 1}; returns its averaged copy."""
    source, noise = generator(0, "mixture"), stream(0, "noise")
    score.learn(mixture(_conditions(4096, source), source), seed=0)
    optimizer = torch.optim.AdamW(score.parameters(), lr=rate, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = Average(score, 0.99)
    for _ in range(steps):
        condition = _conditions(256, source)
        target = mixture(condition, source)
        loss = score.loss(hidden(condition), target, temperature=temperature, source=noise).value.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        average.update(score, 1000)
    return average.module


@torch.no_grad()
def judge(score: Score, value: float, count: int = 4000) -> Figures:
    """Compare samples at one condition with the truth."""
    condition, source = torch.full((count,), value), generator(1, "judge", value)
    truth = mixture(condition, source)
    drawn = score.sample(hidden(condition), source=stream(1, "judge", value), denoising=_DENOISING)
    unbiased = count / (count - 1)
    squared = 2 * torch.cdist(drawn, truth).mean()
    squared -= (torch.cdist(drawn, drawn).mean() + torch.cdist(truth, truth).mean()) * unbiased
    side = drawn @ _centre(condition[:1])[0] > 0
    within = torch.cat([drawn[side] - drawn[side].mean(0), drawn[~side] - drawn[~side].mean(0)])
    return Figures(float(squared), abs(float(side.float().mean()) - 0.3), float(within.square().mean().sqrt()) / 0.3)


@torch.no_grad()
def coverage(score: Score, value: float, count: int = 4000) -> float:
    """Share of the truth within the central 80% of samples at one condition, along the line of the modes."""
    condition, source = torch.full((count,), value), generator(1, "coverage", value)
    line = _centre(condition[:1])[0]
    drawn = score.sample(hidden(condition), source=stream(1, "coverage", value), denoising=_DENOISING) @ line
    truth = mixture(condition, source) @ line
    low, high = drawn.quantile(torch.tensor([0.1, 0.9]))
    return float(((truth > low) & (truth < high)).float().mean())
