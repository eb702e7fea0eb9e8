"""Find one metric among the metrics files of a run."""

import contextlib
import math

from ear.errors import UserError
from flows import repository
from flows.artifacts import metric_rows

EVALUATION = "data/evaluation/metrics.json"  # a metric without a file is looked up here first


class NoNumberError(UserError):
    """A metric of one run is no number."""


def check_metric(metric: str) -> None:
    """Raise UserError if the workspace has metrics, but none or several of that name; RepositoryError as DVC does."""
    if known := repository.metrics():
        with contextlib.suppress(NoNumberError):  # of the present parameters; other ones may have it
            find(metric, known)


def find(metric: str, files: dict[str, dict]) -> float:
    """The value of `metric`, given as NAME or FILE:NAME; a NAME is looked up in the evaluation first.

    Raises UserError if no file has it or several others have; NoNumberError if it is not a number.
    """
    named = {f"{row['file']}:{row['metric']}": row["value"] for row in metric_rows(files)}
    metric = f"{EVALUATION}:{metric}" if f"{EVALUATION}:{metric}" in named else metric
    matches = [full for full in named if metric in (full, full.rpartition(":")[2])]
    if not matches:
        raise UserError(f"metric {metric!r} is in no metrics file; there are: {', '.join(named) or 'none'}.")
    if len(matches) > 1:
        raise UserError(f"metric {metric!r} is in several files; choose {' or '.join(matches)}.")
    value = named[matches[0]]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise NoNumberError(f"metric {matches[0]!r} is {value!r}, not a number to compare; choose another.")
    return value
