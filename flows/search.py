"""Search parameters with Optuna: every trial is a DVC experiment, and the study survives a kill.

    python -m flows.search --trials 20 --set train.learning_rate=1e-4..1e-2:log score.samples=2,4,8

A range LOW..HIGH is searched evenly, or with :log in its logarithm; values with commas are choices. Trials run in a
copy of the workspace, one after the other. They sample from another seed than params.yaml does, so the images that
choose are not those that are reported. Started again, a search continues until the study has that many trials.
`dvc exp apply NAME` brings a trial into the workspace. Optuna is an extra:

    pip install -c requirements.txt -e '.[search]'
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from ear import config
from ear.config import edit
from ear.config.edit import PARAMETERS
from ear.errors import UserError
from flows import experiments, readiness
from flows.experiments import experiment_name
from flows.program import report
from flows.repository import RepositoryError
from flows.sweep import APART, find, run_all

_STUDY = "study"


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; whole ones if both bounds are."""

    low: float
    high: float
    logarithmic: bool = False


def space_of(texts: list[str]) -> dict[str, Range | list[Any]]:
    """["key=LOW..HIGH[:log]" or "key=VALUE,VALUE"] => key => what it may be. Raises UserError."""
    space: dict[str, Range | list[Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise UserError(f"{text!r} names no range; write SECTION.KEY=LOW..HIGH or SECTION.KEY=VALUE,VALUE.")
        low, dots, high = value.partition("..")
        if dots:
            bounds = edit.values_of([f"low={low}", f"high={high.removesuffix(':log')}"])
            if not all(isinstance(bound, int | float) for bound in bounds.values()) or bounds["low"] >= bounds["high"]:
                raise UserError(f"{key} is searched in {value!r}, but must be LOW..HIGH, two numbers in this order.")
            if high.endswith(":log") and bounds["low"] <= 0:
                raise UserError(f"{key} is searched from {low} in its logarithm; start above 0, or omit :log.")
            space[key] = Range(bounds["low"], bounds["high"], high.endswith(":log"))
        else:
            space[key] = edit.values_of([f"{key}=[{value}]"])[key]
    return space


@flow(name="search")
def search(
    space: dict[str, str],
    trials: int = 20,
    metric: str = "fid",
    maximize: bool = False,
    seed: int = 0,
    output: str = "work/search",
) -> State:
    """Try parameters until the study has `trials` trials.

    Args:
        space: {"section.key": "LOW..HIGH", "LOW..HIGH:log" or "VALUE,VALUE"}.
        trials: of the whole study, those of earlier searches included.
        metric: a name in the metrics of the evaluation or of one other stage, or FILE:NAME.
        maximize: whether a higher metric is better.
        seed: of the sampler.
        output: folder of the study.
    """
    try:
        import optuna
    except ImportError:
        return Failed(message="a search needs Optuna; pip install -c requirements.txt -e '.[search]'.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(output).mkdir(parents=True, exist_ok=True)
    try:
        wanted = space_of([f"{key}={value}" for key, value in space.items()])
        edit.check(PARAMETERS, {key: _first(choice) for key, choice in wanted.items()})
        study = optuna.create_study(
            storage=f"sqlite:///{output}/study.db",
            study_name=_STUDY,
            load_if_exists=True,
            direction="maximize" if maximize else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        while len(_done(study)) < trials:
            attempt(study, wanted, metric)
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))
    rows = [
        {"experiment": trial.user_attrs["experiment"], **trial.params, metric: trial.value} for trial in _done(study)
    ]
    create_table_artifact(key="search", table=rows, description=f"{metric} of every trial")
    measured = [trial for trial in _done(study) if trial.value is not None]
    if not measured:
        return Failed(message=f"none of {len(rows)} trials succeeded; see the log of the first")
    best = study.best_trial
    return Completed(message=f"best {metric} {best.value:.6g}: {best.user_attrs['experiment']}; study in {output}")


def attempt(study: Any, space: Mapping[str, Range | list[Any]], metric: str) -> None:
    """One trial: ask Optuna for values, run the experiment, tell the metric; a trial that fails is told, too."""
    import optuna

    trial = study.ask()
    values = {key: _suggested(trial, key, choice) for key, choice in space.items()}
    name = experiment_name(values, prefix="search")
    trial.set_user_attr("experiment", name)
    apart = {"sample.seed": config.load(PARAMETERS).sample.seed + APART}
    try:
        readiness.check(edit.check(PARAMETERS, values), values)
        ((_, state),) = run_all({name: {**apart, **values}})
    except UserError:  # values that contradict each other
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    if state.is_completed():
        study.tell(trial, find(metric, experiments.metrics(name)))
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _suggested(trial: Any, key: str, choice: Range | list[Any]) -> Any:
    if isinstance(choice, list):
        return trial.suggest_categorical(key, choice)
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(key, choice.low, choice.high, log=choice.logarithmic)
    return float(f"{trial.suggest_float(key, choice.low, choice.high, log=choice.logarithmic):.3g}")


def _first(choice: Range | list[Any]) -> Any:
    return choice[0] if isinstance(choice, list) else choice.low


def _done(study: Any) -> list[Any]:
    """Trials that have succeeded or failed, but not those that a kill left running."""
    return [trial for trial in study.trials if trial.state.is_finished()]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs="+", action="extend", required=True, metavar="KEY=LOW..HIGH")
    parser.add_argument("--trials", type=int, default=20, help="of the study, earlier ones included (default: 20)")
    parser.add_argument("--metric", default="fid", help="NAME in the evaluation, or FILE:NAME (default: fid)")
    parser.add_argument("--maximize", action="store_true", help="a higher metric is better")
    parser.add_argument("--seed", type=int, default=0, help="of Optuna's sampler (default: 0)")
    parser.add_argument("--output", default="work/search", help="folder of the study")
    arguments = vars(parser.parse_args())
    space = dict(text.split("=", 1) if "=" in text else (text, "") for text in arguments.pop("set"))
    return report("search", lambda: search(space, **arguments, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
