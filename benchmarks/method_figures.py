"""Draw the figures of docs/method.md: landscapes of the energy score, and what heads trained with it draw.

python -m benchmarks.method_figures --output docs/method
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ear.config.compose import compose
from ear.config.scores import Energy
from ear.files.atomic import whole_file
from ear.runtime.randomness import generator, stream
from ear.scores.energy import EnergyScore
from ear.scores.score import HeadSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALPHAS = (0.5, 1.0, 1.5, 2.0)
_STEPS, _BATCH = 1500, 256
_WIDTH = 64  # of the head


def truth(count: int, source: torch.Generator) -> Tensor:
    """[count, 2]: two Gaussians of weight 0.3 and 0.7 at (-1, -0.5) and (1, 0.5), standard deviation 0.3."""
    sign = torch.where(torch.rand(count, 1, generator=source) < 0.3, -1.0, 1.0)
    return sign * torch.tensor([1.0, 0.5]) + 0.3 * torch.randn(count, 2, generator=source)


def landscapes() -> "Figure":
    """Expected loss of predicting N(0, s^2) where N(0, 1) is true, over s, for several exponents."""
    from matplotlib.figure import Figure

    spreads = torch.linspace(0, 2.5, 51)
    picture = Figure(figsize=(6, 3.6), layout="constrained")
    axes = picture.add_subplot()
    for alpha in _ALPHAS:
        losses = expected_loss(spreads, alpha)
        flat = losses - losses[20]  # 0 at the true spread, 1
        axes.plot(spreads, flat, label=f"alpha = {alpha:g}", linestyle="--" if alpha == 2 else "-")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="predicted standard deviation (the true one is 1)", ylabel="expected loss, relative to the truth")
    axes.legend()
    return picture


def expected_loss(spreads: Tensor, alpha: float) -> Tensor:
    """E |x - y|^a + E |x' - y|^a - E |x - x'|^a for x, x' ~ N(0, s^2) and y ~ N(0, 1), over s.

    E |N(0, v)|^a = v^(a/2) 2^(a/2) Gamma((a + 1) / 2) / sqrt(pi).
    """
    scale = 2 ** (alpha / 2) * math.gamma((alpha + 1) / 2) / math.sqrt(math.pi)
    return scale * (2 * (1 + spreads**2).pow(alpha / 2) - (2 * spreads**2).pow(alpha / 2))


def trained(alpha: float) -> Tensor:
    """Samples [2000, 2] of a head trained on `truth` with the energy score of that exponent."""
    options = compose(["preset=digits"]).score.chosen
    assert isinstance(options, Energy)
    changes = {"samples": 2, "noise": "gaussian", "noise_channels": 8, "alpha": alpha}
    head = EnergyScore(
        options.model_copy(update=changes), HeadSize(hidden_width=4, token_channels=2, width=_WIDTH, depth=2)
    )
    source = generator(0, "head")
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight, generator=source)
            torch.nn.init.zeros_(module.bias)
    head.initialise(source)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    noise, hidden = stream(0, "noise"), torch.ones(_BATCH, 4)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        head.loss(hidden, truth(_BATCH, source), temperature=1.0, source=noise).value.mean().backward()
        optimizer.step()
        cosine.step()
    with torch.no_grad():
        return head.sample(torch.ones(2000, 4), source=stream(1, "samples"))


def distributions() -> "Figure":
    """The truth, and what heads trained with alpha 1 and alpha 2 draw."""
    from matplotlib.figure import Figure

    drawn = {
        "truth": truth(2000, generator(1, "truth")),
        "alpha = 1": trained(1.0),
        "alpha = 2: only the mean": trained(2.0),
    }
    picture = Figure(figsize=(9, 3.2), layout="constrained")
    for number, (title, points) in enumerate(drawn.items()):
        axes = picture.add_subplot(1, 3, number + 1)
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=3, alpha=0.4, linewidths=0)
        axes.set(title=title, xlim=(-2.2, 2.2), ylim=(-1.7, 1.7), aspect="equal")
    return picture


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("docs/method"), help="folder (default: docs/method)")
    folder = parser.parse_args().output
    torch.set_num_threads(1)
    for name, draw in (("landscapes", landscapes), ("distributions", distributions)):
        with whole_file(folder / f"{name}.png") as partial:
            draw().savefig(partial, format="png", dpi=110)


if __name__ == "__main__":
    main()
