"""Search parameters with Optuna: every trial is a DVC experiment, and the study survives a kill.

    python -m flows.search --trials 20 --set train.learning_rate=1e-4..1e-2:log score.samples=2,4,8

A range LOW..HIGH is searched on a linear scale, or with :log on a logarithmic one; if the key is an integer, so are
its values. Values separated by commas are choices. Trials run in a copy of the workspace, one after the other. They use
another sampling seed than params.yaml, so parameters are not chosen on the images that are reported. Started again, a
search continues until the study has --trials trials. `--apply` writes the best trial's values into params.yaml, and
`dvc repro` measures them on fresh samples.

Optuna is an extra:

    pip install -c requirements.txt -e '.[search]'
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import State, flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from ear import config
from ear.config import edit
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from flows import experiments, readiness
from flows.artifacts import only_shown
from flows.experiments import Snapshot, experiment_name
from flows.metrics import check_metric, find
from flows.program import report
from flows.repository import RepositoryError
from flows.runs import APART, quiet_snapshot, run_all

_STUDY = "study"


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; whole ones if the key is a whole number."""

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
                raise UserError(f"the range of {key} is {value!r}, but must be two numbers LOW..HIGH, the lower first.")
            if high.endswith(":log") and bounds["low"] <= 0:
                raise UserError(f"the range of {key} is {value!r}, but with :log must start above 0; raise it.")
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
        if not space or trials < 1:
            raise UserError(
                f"a search has {len(space)} keys and {trials} trials, but needs one of each; give --set and --trials."
            )
        wanted = space_of([f"{key}={value}" for key, value in space.items()])
        firsts = {key: _ends(choice)[0] for key, choice in wanted.items()}
        config.load(PARAMETERS)  # errors of the file itself come first
        check_values({key: _ends(choice) for key, choice in wanted.items()})
        check_metric(metric)
        with _alone(Path(output)):
            snapshot = quiet_snapshot()
            first = snapshot.parameters(firsts)
            wanted = {key: _typed(choice, config.value_of(first, key)) for key, choice in wanted.items()}
            asked = {"metric": metric, "maximize": maximize, "space": dict(space), "others": _others(first, space)}
            study = opened_study(Path(output), asked, seed)
            failures = 0
            while len(_done(study)) < trials and failures < trials:
                failures += not attempt(study, wanted, metric, snapshot, sampling_seed=first.sample.seed + APART)
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))
    rows = [{"experiment": t.user_attrs["experiment"], **t.user_attrs["values"], metric: t.value} for t in _done(study)]
    with only_shown():
        create_table_artifact(key="search", table=rows, description=f"{metric} of every trial")
    if not rows:
        return Failed(message=f"no trial succeeded ({failures} failed); the log above says why")
    best = study.best_trial
    return Completed(message=f"best {metric} {best.value:.6g}: {best.user_attrs['experiment']}; study in {output}")


def check_values(values: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError for a value that is invalid with every combination of the other keys' values."""
    present = config.read(PARAMETERS)
    for key, candidates in values.items():
        others = {name: each for name, each in values.items() if name != key}
        for candidate in candidates:
            first = ""
            for combination in itertools.product(*others.values()):
                refusal = _refusal(present, {**dict(zip(others, combination, strict=True)), key: candidate})
                first = first or refusal
                if not refusal:
                    break
            else:
                raise UserError(first)


def _refusal(content: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Why the content of a parameter file with {"section.key": value} set is refused; empty if it is not."""
    sections = {name: dict(section) for name, section in content.items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        config.parse(sections, origin="overrides")
    except UserError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only search of the study in a folder; raises UserError if there is another."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", blocking=False):
            yield
    except Timeout as error:
        raise UserError(f"another search works on the study in {folder}; wait, or give another --output.") from error


def _optuna() -> Any:
    """The package. Raises UserError if it is missing."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna; pip install -c requirements.txt -e '.[search]'.") from error
    return optuna


def opened_study(folder: Path, asked: Mapping[str, Any], seed: int) -> Any:
    """Open or create the study in `folder`; `asked` holds its metric, direction, space and fixed parameters.

    Trials left over from a killed search come first, and their experiments resume. Raises UserError if Optuna is
    missing, or if the study was made with another `asked`.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/study.db",
        study_name=_STUDY,
        load_if_exists=True,
        direction="maximize" if asked["maximize"] else "minimize",
    )
    if study.user_attrs.get("asked", asked) != asked:
        raise UserError(f"the study in {folder} has another metric, space or fixed parameters; give another --output.")
    study.set_user_attr("asked", asked)
    # Other random draws after every start, or the first trials would be proposed again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def attempt(
    study: Any, space: Mapping[str, Range | list[Any]], metric: str, snapshot: Snapshot, *, sampling_seed: int
) -> bool:
    """One trial: ask Optuna for values, run the experiment, tell the metric => whether it succeeded."""
    import optuna

    trial = study.ask()
    values = {key: _suggested(trial, key, choice) for key, choice in space.items()}
    name = experiment_name(values, prefix="search")
    trial.set_user_attr("experiment", name)
    trial.set_user_attr("values", values)
    try:
        readiness.check(snapshot.parameters(values), readiness.reading(values), values)
        ((_, state),) = run_all({name: {"sample.seed": sampling_seed, **values}}, snapshot)
        found = find(metric, experiments.metrics(snapshot, name)) if state.is_completed() else None
    except UserError as error:  # values that contradict each other, or a metric that is no number
        get_run_logger().warning("%s: %s", name, error)
        found = None
    if found is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return False
    study.tell(trial, found)
    return True


def _suggested(trial: Any, key: str, choice: Range | list[Any]) -> Any:
    if isinstance(choice, list):
        return trial.suggest_categorical(key, choice)
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(key, choice.low, choice.high, log=choice.logarithmic)
    drawn = trial.suggest_float(key, choice.low, choice.high, log=choice.logarithmic)
    return min(max(float(f"{drawn:.6g}"), choice.low), choice.high)  # short, for names of experiments


def _typed(choice: Range | list[Any], example: Any) -> Range | list[Any]:
    """A range of fractions if the key has them, though its bounds may be written as whole numbers."""
    if isinstance(choice, Range) and isinstance(example, float):
        return Range(float(choice.low), float(choice.high), choice.logarithmic)
    return choice


def _others(parameters: config.Parameters, space: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that the search does not choose and that can change a result."""
    sections = parameters.model_dump(mode="json")
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if section != "runtime" and f"{section}.{name}" not in space
    }


def _ends(choice: Range | list[Any]) -> list[Any]:
    """All of the choices, or both bounds of a range."""
    return choice if isinstance(choice, list) else [choice.low, choice.high]


def _done(study: Any) -> list[Any]:
    """Trials that have succeeded."""
    return [trial for trial in study.trials if trial.value is not None]


def write_back(output: str) -> dict[str, Any]:
    """Write the values of the best trial of the study in `output` into params.yaml => them. Raises UserError."""
    optuna = _optuna()
    if not (Path(output) / "study.db").is_file():
        raise UserError(f"{output} holds no study; run a search first.")
    study = optuna.load_study(study_name=_STUDY, storage=f"sqlite:///{output}/study.db")
    if not _done(study):
        raise UserError(f"no trial of the study in {output} has succeeded; run the search again.")
    values = study.best_trial.user_attrs["values"]
    edit.apply(PARAMETERS, values)
    return values


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=LOW..HIGH")
    parser.add_argument("--apply", action="store_true", help="write the best trial of --output into params.yaml")
    parser.add_argument("--trials", type=int, default=20, help="of the study, earlier ones included (default: 20)")
    parser.add_argument("--metric", default="fid", help="NAME in the evaluation, or FILE:NAME (default: fid)")
    parser.add_argument("--maximize", action="store_true", help="a higher metric is better")
    parser.add_argument("--seed", type=int, default=0, help="of Optuna's sampler (default: 0)")
    parser.add_argument("--output", default="work/search", help="folder of the study")
    arguments = vars(parser.parse_args())
    if arguments.pop("apply"):
        try:
            values = write_back(arguments["output"])
        except UserError as error:
            print(f"search: {error}", file=sys.stderr)
            return 1
        print(f"search: set {', '.join(f'{k}={v}' for k, v in values.items())} in params.yaml; run `dvc repro`")
        return 0
    space = dict(text.split("=", 1) if "=" in text else (text, "") for text in arguments.pop("set"))
    return report("search", lambda: search(space, **arguments, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
