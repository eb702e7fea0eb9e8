"""The pipeline as a Prefect flow: one task per DVC stage, in the order that dvc.yaml gives.

As a plain script, with no server started by hand:

    python -m flows.pipeline
    python -m flows.pipeline --stages sample evaluate --set sample.guidance=2.0 --force sample

With Prefect's server, which shows runs at http://127.0.0.1:4200 and starts them, each in a terminal of its own after
`export PREFECT_API_URL=http://127.0.0.1:4200/api`:

    prefect server start --host 127.0.0.1
    prefect worker start --pool ear --type process
    prefect --no-prompt deploy --all && prefect deployment run pipeline/local --watch

DVC decides what is out of date. Stages run one at a time and stop with the flow: Ctrl-C, a cancelled run and a
terminated worker process leave no process behind. Overrides are written to params.yaml and stay there.
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import base64
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed

from ear.errors import UserError
from flows import overrides as parameter_overrides
from flows import repository
from flows.repository import BusyError, RepositoryError

PARAMETERS = Path("params.yaml")
GRID = Path("data/samples/grid.png")
# A larger picture would make the artifact, and the page that shows it, heavy.
GRID_BYTES = 1 << 20


@dataclass
class Outcome:
    """What became of one stage."""

    stage: str
    result: str  # ran, restored, up to date, failed, not run
    why: str
    seconds: float


def _is_busy(task, run, state: State) -> bool:
    """Whether another DVC process was in the way: the one failure that waiting mends."""
    return state.name == "Busy"


def failed(error: Exception) -> State:
    """A failed state of one line, without a traceback."""
    return Failed(name="Busy" if isinstance(error, BusyError) else "Failed", message=str(error))


# DVC is the only cache, so Prefect keeps none; only a busy repository is tried again.
OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 4,
    "retry_delay_seconds": [2, 10, 60, 300],
    "retry_condition_fn": _is_busy,
}


@task(task_run_name="check what changed", **OPTIONS)
def check(stages: list[str]) -> dict[str, str] | State:
    """Stage => why it is out of date, before anything runs."""
    try:
        return repository.changes(*stages)
    except RepositoryError as error:
        return failed(error)


@task(task_run_name="stage-{name}", **OPTIONS)
def run_stage(name: str, why: str, upstream_ran: bool, force: bool) -> State:
    """Bring one stage up to date; the state's name says how, its message why."""
    log = get_run_logger()
    try:
        if upstream_ran and not force:  # what ran may have changed its inputs, or given the same bytes again
            why = repository.changes(name).get(name, "")
        if not why:
            log.info("%s is up to date", name)
            return Completed(name="up to date", message="nothing that it depends on has changed")
        log.info("%s is out of date: %s", name, why)
        return Completed(name=repository.reproduce(name, force=force, line=log.info), message=why)
    except RepositoryError as error:
        return failed(error)


@flow(name="pipeline")
def pipeline(
    stages: tuple[str, ...] = (),
    overrides: dict[str, Any] | None = None,
    force: bool | tuple[str, ...] = False,
) -> State:
    """Bring stages up to date through DVC.

    Args:
        stages: what to bring up to date, each with all that it needs; none means every stage.
        overrides: {"section.key": value}, written to params.yaml once all of them are found to be valid.
        force: stages to run though nothing has changed; true means those named in `stages`, or every stage.
    """
    try:
        graph = repository.graph()
        targets = repository.known(stages or graph, graph)
        order = repository.with_upstream(graph, targets)
        forced = repository.known((targets if force else ()) if isinstance(force, bool) else force, order)
        parameter_overrides.apply(PARAMETERS, overrides or {})
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))
    state = check(order, return_state=True)
    if not state.is_completed():
        return Failed(message=state.message)
    outcomes = walk(graph, order, forced, state.result())
    publish(outcomes)
    return summary(outcomes)


def walk(graph: dict[str, set[str]], order: list[str], forced: list[str], changed: dict[str, str]) -> list[Outcome]:
    """Run the stages one after another, up to the first that fails."""
    outcomes: list[Outcome] = []
    fresh: set[str] = set()  # what has new outputs
    for name in order:
        if any(outcome.result == "failed" for outcome in outcomes):
            outcomes.append(Outcome(name, "not run", "an earlier stage failed", 0.0))
            continue
        below = bool(fresh & graph[name])
        why = "; ".join(filter(None, ["forced" if name in forced else "", changed.get(name, "")]))
        start = time.monotonic()
        state = run_stage(name, why, below, name in forced, return_state=True)
        result = state.name if state.is_completed() else "failed"
        outcomes.append(Outcome(name, result, state.message or "", round(time.monotonic() - start, 1)))
        if result in ("ran", "restored"):
            fresh.add(name)
    return outcomes


def summary(outcomes: Iterable[Outcome]) -> State:
    """The flow's last state: what failed, or what ran, in one line."""
    stages: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.result == "failed":
            return Failed(message=f"stage '{outcome.stage}' failed: {outcome.why}")
        stages.setdefault(outcome.result, []).append(outcome.stage)
    return Completed(message="; ".join(f"{result}: {', '.join(names)}" for result, names in stages.items()))


def publish(outcomes: list[Outcome]) -> None:
    """Artifacts for Prefect's pages: what ran and why; and, where nothing failed, the metrics and the sample grid."""
    create_table_artifact(
        key="stages", table=[asdict(outcome) for outcome in outcomes], description="What ran, and why"
    )
    if any(outcome.result == "failed" for outcome in outcomes):
        return
    try:
        rows = metric_rows(repository.metrics())
    except RepositoryError as error:
        get_run_logger().warning("no table of metrics: %s", error)
        rows = []
    if rows:
        create_table_artifact(key="metrics", table=rows, description="`dvc metrics show`")
    if GRID.is_file():
        create_markdown_artifact(key="sample-grid", markdown=picture(GRID), description="Generated images")


def metric_rows(files: dict[str, dict]) -> list[dict]:
    """One row per number: file, dotted name, value."""

    def flat(prefix: str, values: dict) -> Iterable[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    return [
        {"file": path, "metric": name, "value": value} for path, data in files.items() for name, value in flat("", data)
    ]


def picture(path: Path) -> str:
    """Markdown that holds the picture itself where it is small, else its path."""
    content = path.read_bytes()
    if len(content) > GRID_BYTES:
        return f"`{path}` is {len(content) / 1e6:.1f} MB; look at it there."
    return f"![{path}](data:image/png;base64,{base64.b64encode(content).decode()})"


def report(name: str, work) -> int:
    """Run a flow as a program: `work()` gives its last state; prints one line, returns the exit code."""
    # A closed terminal stops the stage too.
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    if not server_answers(url := get_current_settings().api.url):
        mend = "start it with `prefect server start`, or unset PREFECT_API_URL to do without one."
        print(f"{name}: no Prefect server answers at {url}, the PREFECT_API_URL; {mend}", file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        state = work()
    except (KeyboardInterrupt, TerminationSignal):
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    seconds = f"({time.monotonic() - start:.0f} s)"
    if state.is_completed():
        print(f"{name}: {state.message} {seconds}")
        return 0
    print(f"{name}: {state.message} {seconds}", file=sys.stderr)
    return 1


def server_answers(url: str | None) -> bool:
    """Whether a server is at `url`; true without one, since Prefect then starts its own for the length of the run."""
    if url is None:
        return True
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return True  # it answers, if only to refuse
    except OSError:
        return False
    return True


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="default: every stage")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="written to params.yaml"
    )
    parser.add_argument(
        "--force", nargs="*", metavar="STAGE", help="run these though nothing changed; alone: those of --stages, or all"
    )
    arguments = parser.parse_args()
    try:
        values = parameter_overrides.parse(arguments.set)
    except UserError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return 1
    force = tuple(arguments.force) if arguments.force else arguments.force is not None
    return report("pipeline", lambda: pipeline(tuple(arguments.stages), values, force, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
