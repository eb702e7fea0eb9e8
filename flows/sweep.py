"""Compare parameters: run every combination as a DVC experiment, then write a table and a plot of one metric.

    python -m flows.sweep --set sample.guidance=1.0,1.5,2.0 sample.temperature=0.7,1.0

Experiments run in a copy of the workspace, which itself is not changed; edits made meanwhile do not reach them.
`dvc exp apply NAME` brings one of them into the workspace, its sample.seed included. The table is rewritten after each
run, so a stopped sweep keeps its results so far. Started again, it restores what ran before and continues inside the
stage that was stopped. `-j N` runs N experiments at a time: one per GPU or, without one, one per `compute.threads`
cores. Small models gain little from a second thread, so on a CPU one thread and as many jobs as cores take the least
time.

Seeds are repetitions: with `train.seed=0,1,2` among the keys, the best point is the one with the best mean, and the
table has means and standard deviations. Points are not chosen on the images that are reported: unless sample.seed is
among the keys, runs use another sampling seed than params.yaml. After the sweep,

    python -m flows.sweep --apply

writes the best point into params.yaml (not the seeds), and `dvc repro` measures it on images not used to choose it.
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from ear import config
from ear.config import edit
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from ear.files.atomic import whole_file
from flows import experiments, readiness
from flows.artifacts import only_shown
from flows.experiments import Snapshot, experiment_name
from flows.metrics import NoNumberError, check_metric, find
from flows.program import report
from flows.repository import RepositoryError
from flows.runs import APART, quiet_snapshot, run_all

_STATISTICS = {"mean": None, "sd": None}  # columns of the table, over seeds


@flow(name="sweep")
def sweep(
    parameters: dict[str, list[Any]],
    metric: str = "fid",
    maximize: bool = False,
    jobs: int = 1,
    output: str = "work/sweep",
) -> State:
    """Run every combination of `parameters` and compare one metric.

    Args:
        parameters: {"section.key": values to try}.
        metric: a name in the metrics of the evaluation or of one other stage, or FILE:NAME.
        maximize: whether a higher metric is better (accuracy) rather than a lower one (FID).
        jobs: experiments at a time, each on its own GPU, or on its own `compute.threads` cores.
        output: folder for table.csv and plot.png.
    """
    try:
        runs = grid(parameters)
        for values in runs.values():  # mistakes are said before the wait for another flow
            readiness.check(edit.check(PARAMETERS, values), readiness.reading(parameters), parameters)
        check_metric(metric)
        snapshot = quiet_snapshot()
        if "sample.seed" not in parameters:
            apart = snapshot.parameters({}).sample.seed + APART
            runs = {name: {**values, "sample.seed": apart} for name, values in runs.items()}
        rows = compare(
            runs, snapshot, metric, maximize, jobs, lambda rows: write(rows, list(parameters), metric, Path(output))
        )
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))
    with only_shown():
        create_table_artifact(key="sweep", table=rows, description=f"{metric} by {', '.join(parameters)}")
    return summary(rows, metric, output)


def grid(parameters: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Experiment name => {"section.key": value}, for every combination. Raises UserError if there is none."""
    for key, values in parameters.items():
        if not values:
            raise UserError(f"{key} has no values to try; give at least one.")
    if not parameters:
        raise UserError("a sweep needs at least one parameter; give SECTION.KEY and its values.")
    combinations = [dict(zip(parameters, values, strict=True)) for values in itertools.product(*parameters.values())]
    return {experiment_name(values, prefix="sweep"): values for values in combinations}


def compare(
    runs: dict[str, dict[str, Any]],
    snapshot: Snapshot,
    metric: str,
    maximize: bool,
    jobs: int,
    save: Callable[[list[dict]], None],
) -> list[dict]:
    """Run the experiments of the snapshot, `jobs` at a time => a row each: experiment, values, metric, best, error.

    The metric of a failed one, or of one without a number, is None. `save` is called with the rows so far after each
    run. Raises UserError if no metrics file has `metric`.
    """
    rows: dict[str, dict] = {}
    for name, state in run_all(runs, snapshot, jobs):
        found, error = None, "" if state.is_completed() else state.message
        if state.is_completed():
            try:
                found = find(metric, experiments.metrics(snapshot, name))
            except NoNumberError as reason:  # of this run: fewer images than are held out have no FID / floor
                error = str(reason)
        rows[name] = {"experiment": name, **runs[name], metric: found, **_STATISTICS, "best": False, "error": error}
        ordered = [rows[each] for each in runs if each in rows]
        mark_best(ordered, metric, maximize)
        save(ordered)
    return [rows[name] for name in runs]


def mark_best(rows: list[dict], metric: str, maximize: bool) -> None:
    """Set `mean` and `sd` over rows that differ only in seeds, and mark the rows of the best point; the first of a tie.

    A point is best only if all of its runs so far have succeeded. `sd` is None for a single run.
    """
    points: dict[str, list[dict]] = {}
    for row in rows:
        points.setdefault(repr([(k, v) for k, v in row.items() if is_point(k)]), []).append(row)
    means: dict[str, float] = {}
    for name, group in points.items():
        values = [row[metric] for row in group if row[metric] is not None]
        spread = statistics.stdev(values) if len(values) > 1 else None
        mean = statistics.fmean(values) if values else None
        for row in group:
            row.update(mean=mean, sd=spread, best=False)
        if mean is not None and len(values) == len(group):
            means[name] = mean
    if means:
        for row in points[(max if maximize else min)(means, key=means.__getitem__)]:
            row["best"] = True


def is_seed(key: str) -> bool:
    """Whether a key of params.yaml is a seed, whose values are repetitions."""
    return key.endswith(".seed")


def is_point(column: str) -> bool:
    """Whether a column of the table is a key of params.yaml other than a seed."""
    section, _, key = column.partition(".")
    field = config.Parameters.model_fields.get(section)
    return field is not None and key in getattr(field.annotation, "model_fields", {}) and not is_seed(column)


def write_back(output: str) -> dict[str, Any]:
    """Write the best point of the table in `output` into params.yaml, seeds excepted => the values.

    Raises UserError if there is no table, or no run succeeded.
    """
    path = Path(output) / "table.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; run a sweep first.")
    with path.open(newline="") as file:
        best = next((row for row in csv.DictReader(file) if row["best"] == "True"), None)
    if best is None:
        raise UserError(f"{path} has no best point, since no run succeeded; run the sweep again.")
    values = edit.values_of(f"{key}={value or repr('')}" for key, value in best.items() if is_point(key))
    edit.apply(PARAMETERS, values)
    return values


def write(rows: list[dict], keys: list[str], metric: str, folder: Path) -> None:
    """Write table.csv and plot.png into `folder`, each complete or not at all."""
    with whole_file(folder / "table.csv") as partial, partial.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    with whole_file(folder / "plot.png") as partial:
        draw(rows, keys, metric).savefig(partial, format="png", dpi=120)


def draw(rows: list[dict], keys: list[str], metric: str):
    """A matplotlib figure of the metric: a line for one parameter, a heat map for two, bars for more."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    if any(row["sd"] is not None for row in rows):  # one row per point
        keys = [key for key in keys if not is_seed(key)]
        points = {repr([row[key] for key in keys]): {**row, metric: row["mean"]} for row in rows}
        rows = [*points.values()]
    values = [float("nan") if row[metric] is None else row[metric] for row in rows]
    if len(keys) == 1 and any(row["sd"] is not None for row in rows):
        spread = [row["sd"] or 0.0 for row in rows]
        axes.errorbar([str(row[keys[0]]) for row in rows], values, spread, marker="o", capsize=4)
        axes.set(xlabel=keys[0], ylabel=f"{metric}, mean and standard deviation")
    elif len(keys) == 1:
        axes.plot([str(row[keys[0]]) for row in rows], values, marker="o")
        axes.set(xlabel=keys[0], ylabel=metric)
    elif len(keys) == 2:
        heat_map(axes, rows, keys, values)
        figure.colorbar(axes.images[0], label=metric)
    else:
        axes.barh([row["experiment"].removeprefix("sweep-") for row in rows], values)
        axes.set(xlabel=metric)
    best = [row["experiment"].removeprefix("sweep-") for row in rows if row["best"]]
    axes.set_title(f"best: {best[0]}" if best else "no run succeeded", fontsize="medium")
    return figure


def heat_map(axes, rows: list[dict], keys: list[str], values: list[float]) -> None:
    """Show the metric as colour and number; rows are the first parameter, columns the second."""
    down, right = (list(dict.fromkeys(str(row[key]) for row in rows)) for key in keys)
    cells = [[float("nan")] * len(right) for _ in down]
    for row, value in zip(rows, values, strict=True):
        i, j = down.index(str(row[keys[0]])), right.index(str(row[keys[1]]))
        cells[i][j] = value
        text = "failed" if value != value else f"{value:.4g}"
        weight = "bold" if row["best"] else "normal"
        axes.text(j, i, text, ha="center", va="center", weight=weight, bbox={"facecolor": "white", "alpha": 0.7})
    axes.imshow(cells, aspect="auto")
    axes.set_xticks(range(len(right)), right)
    axes.set_yticks(range(len(down)), down)
    axes.set(xlabel=keys[1], ylabel=keys[0])


def summary(rows: list[dict], metric: str, output: str) -> State:
    """The flow's final state: the best run, or how many failed, in one line."""
    best = next((_named_best(row, metric) for row in rows if row["best"]), "")
    errors = [f"{row['experiment']}: {row['error']}" for row in rows if row["error"]]
    if errors:
        return Failed(message=f"{len(errors)} of {len(rows)} runs failed ({errors[0]}); {best or 'none is left'}")
    return Completed(message=f"{best}; see {output}/table.csv and {output}/plot.png")


def _named_best(row: dict, metric: str) -> str:
    if row["sd"] is None:
        return f"best {metric} {row[metric]:.6g}: {row['experiment']}"
    point = ", ".join(f"{key}={value}" for key, value in row.items() if is_point(key))
    return f"best mean {metric} {row['mean']:.6g} (sd {row['sd']:.2g}): {point or 'all seeds'}"


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE,VALUE,...")
    parser.add_argument("--apply", action="store_true", help="write the best point of --output into params.yaml")
    parser.add_argument("--metric", default="fid", help="NAME in the evaluation, or FILE:NAME (default: fid)")
    parser.add_argument("--maximize", action="store_true", help="a higher metric is better")
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, help="experiments at a time, one per GPU or compute.threads cores (1)"
    )
    parser.add_argument("--output", default="work/sweep", help="folder for table.csv and plot.png")
    arguments = parser.parse_args()
    try:
        if arguments.apply:
            values = write_back(arguments.output)
            done = ", ".join(f"{key}={value}" for key, value in values.items())
            print(f"sweep: set {done} in params.yaml; run `dvc repro`" if done else "sweep: only seeds were compared")
            return 0
        if wrong := [text for text in arguments.set if "=" not in text]:
            raise UserError(f"{wrong[0]!r} sets nothing; write SECTION.KEY=VALUE,VALUE.")
        parameters = edit.values_of([text.replace("=", "=[", 1) + "]" for text in arguments.set])
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    options = {
        "metric": arguments.metric,
        "maximize": arguments.maximize,
        "jobs": arguments.jobs,
        "output": arguments.output,
    }
    return report("sweep", lambda: sweep(parameters, **options, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
