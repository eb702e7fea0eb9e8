"""Curves of a training as pictures: from the rows of a log, finished or growing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One diagram: what it shows, and which columns it draws."""

    title: str
    columns: tuple[str, ...]
    dashed: tuple[str, ...] = ()  # constants to compare with
    logarithmic: bool = False


_TRAINING = (
    Panel("loss (means since the row before)", ("loss",), ("context_free_loss",)),
    Panel("attraction and 2 x repulsion: equal if samples vary as the data do", ("attraction", "repulsion x 2")),
    Panel("loss by share of masked tokens", ("loss_masked_",)),
    Panel("gradient norm, before clipping", ("gradient_norm",), logarithmic=True),
    Panel("learning rate", ("rate",)),
    Panel("images per second", ("images_per_second",)),
)
_VALIDATION = Panel("held-out loss, of the weights and their EMAs", ("loss", "averaged_loss", "averaged_long_loss"))


def figure(training: Rows, validation: Rows, *, title: str) -> "Figure":
    """All diagrams whose columns exist, two in a row; images seen on the x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [_derived(row) for row in training]
    panels = [(panel, rows) for panel in _TRAINING] + [(_VALIDATION, validation)]
    drawn = [(panel, lines(panel, table), table) for panel, table in panels if lines(panel, table)]
    height = max(1, -(-len(drawn) // 2))
    picture = Figure(figsize=(12, 3.2 * height), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(title)
    for number, (panel, names, table) in enumerate(drawn):
        axes = picture.add_subplot(height, 2, number + 1)
        for name, style in names.items():
            points = [(row["images"], row[name]) for row in table if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=3)
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel("images", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return picture


def lines(panel: Panel, rows: Rows) -> dict[str, str]:
    """Columns of the rows that a panel draws => style; a name that ends in _ stands for all that start with it."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    marker = ".-" if len(rows) < 30 else "-"
    found = {
        n: marker
        for column in panel.columns
        for n in names
        if n == column or (column[-1] == "_" and n.startswith(column))
    }
    return found | {name: "k--" for name in panel.dashed if name in names} if found else {}


def _derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with twice the repulsion, if it has one."""
    return {**row, **({"repulsion x 2": 2 * row["repulsion"]} if row.get("repulsion") is not None else {})}
