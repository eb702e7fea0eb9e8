"""The pipeline as a Prefect flow: one task per DVC stage, in the order that dvc.yaml gives.

As a program, without a server:

    python -m flows.pipeline
    python -m flows.pipeline --stages sample evaluate --set sample.guidance=2.0 --force sample

With Prefect's server, which starts runs and shows them at http://127.0.0.1:4200. Run each line in its own terminal,
after `export PREFECT_API_URL=http://127.0.0.1:4200/api`:

    prefect server start --host 127.0.0.1
    prefect worker start --pool ear --type process
    prefect --no-prompt deploy --all && prefect deployment run pipeline/local --watch

DVC decides which stages are out of date. Stages run one at a time and stop with the flow: Ctrl-C, a cancelled run and a
terminated worker leave no process behind. Overrides are written to params.yaml and stay there.
"""

# isort: off
import flows.settings  # noqa: F401 - first: Prefect reads its settings when it is imported

# isort: on
import argparse
import contextlib
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote

from ear import config
from ear.config import edit
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from ear.files.atomic import whole_file
from ear.lineage.declaration import declarations
from ear.lineage.run import clear_finished
from flows import readiness, repository
from flows.artifacts import REPORT, Shown, show_made, show_outcomes, write_report
from flows.devices import devices, environment, hold, needed
from flows.form import Overrides, Stages
from flows.inputs import changed_images
from flows.program import report
from flows.repository import RepositoryError
from flows.turns import turn

CACHED = "Cached"  # Prefect's name for a result that was there already
_LONGEST_NAME = 120
UNCHANGED = "none of its dependencies changed"


@dataclass
class Outcome:
    """What happened to one stage."""

    stage: str
    result: str  # ran, restored, up to date, failed, not run
    why: str
    seconds: float


@task(task_run_name="check what changed", cache_policy=NO_CACHE)
def check(stages: list[str]) -> dict[str, str] | State:
    """Stage => why it is out of date, before anything runs."""
    try:
        return repository.changes(*stages)
    except RepositoryError as error:
        return Failed(message=str(error))


@task(task_run_name="stage-{name}", cache_policy=NO_CACHE)
def run_stage(name: str, why: str, upstream_ran: bool, force: bool, variables: dict[str, str]) -> State:
    """Bring one stage up to date; the state's data says how (ran, restored, up to date), its message also why."""
    log = get_run_logger()
    try:
        if upstream_ran and not force:  # upstream stages may have changed its inputs, or written the same bytes again
            why = repository.changes(name).get(name, "")
        if not why:
            log.info("%s is up to date", name)
            return Completed(name=CACHED, data="up to date", message=UNCHANGED)
        log.info("%s is out of date: %s", name, why)
        with Shown(name) as shown:
            how = repository.reproduce(name, force=force, line=shown.line, variables=variables)
        return Completed(name="Completed" if how == "ran" else CACHED, data=how, message=why)
    except RepositoryError as error:
        restore(name)
        return Failed(message=str(error))
    except BaseException:  # stopped by Ctrl-C, a signal or a cancelled run
        restore(name)
        raise


def restore(name: str) -> None:
    """Bring back the outputs that DVC deleted before a stage that has not written new ones.

    If that fails, too, as on a full disk, the reason is logged, and the stage's own reason stays the result.
    """
    try:
        if restored := repository.restore(name):
            get_run_logger().info("restored the earlier outputs of %s: %s", name, ", ".join(restored))
    except (OSError, UserError, RepositoryError) as error:
        get_run_logger().warning("the earlier outputs of %s could not be restored: %s", name, error)


def run_name() -> str:
    """What a run was asked for: its stages and overrides."""
    asked = flow_run.parameters or {}
    stages = ", ".join(asked.get("stages") or ["all stages"])
    changes = ", ".join(f"{key}={value}" for key, value in (asked.get("overrides") or {}).items())
    forced = "forced" if asked.get("force") else ""
    return "; ".join(filter(None, [stages, changes, forced]))[:_LONGEST_NAME]


@flow(name="pipeline", flow_run_name=run_name)
def pipeline(
    stages: Stages = (),
    overrides: Overrides = None,
    force: bool | Stages = False,
) -> State:
    """Bring stages up to date through DVC.

    Args:
        stages: stages to bring up to date, each with all its upstream stages; none means every stage.
        overrides: {"section.key": value}, written to params.yaml if all of them are valid.
        force: stages to run even if nothing changed; true means those named in `stages`, or every stage.
    """
    try:
        graph = repository.graph()
        targets = repository.known(stages or graph, graph)
        order = repository.with_upstream(graph, targets)
        forced = repository.known((targets if force else ()) if isinstance(force, bool) else force, order)
        asked = overrides or {}
        readiness.check(edit.check(PARAMETERS, asked), readiness.reading(asked), asked)
        say = get_run_logger().info
        with turn(say):
            parameters = edit.check(PARAMETERS, asked)  # again: another flow may have written the file
            among = devices(parameters)
            with hold(needed(parameters, among), among, say) as held:
                with _applied(asked):
                    changed, unseen = due(graph, order, forced)
                return bring_up_to_date(graph, order, forced, changed, unseen, environment(held))
    except (UserError, RepositoryError) as error:
        return Failed(message=str(error))


@contextlib.contextmanager
def _applied(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Write overrides into params.yaml; restore it if the body finds that the stages cannot run."""
    before = PARAMETERS.read_text()
    edit.apply(PARAMETERS, overrides)
    try:
        yield
    except (UserError, RepositoryError):
        with whole_file(PARAMETERS) as partial:
            partial.write_text(before)
        raise


def due(graph: dict[str, set[str]], order: list[str], forced: list[str]) -> tuple[dict[str, str], set[str]]:
    """Return (stage => why it is out of date, stages out of date for a reason that DVC does not see); run nothing.

    Raises RepositoryError if DVC cannot tell, UserError if a stage that would run cannot.
    """
    state = check(order, return_state=True)
    if not state.is_completed():
        raise RepositoryError(state.message)
    changed: Any = state.result()
    parameters = config.load(PARAMETERS)
    unseen: set[str] = set()
    if "fetch" in order and (images := changed_images(parameters)):
        changed["fetch"] = "; ".join(filter(None, [images, changed.get("fetch", "")]))
        unseen = {"fetch"}
    running = repository.with_downstream(graph, {*forced, *changed}) & set(order)
    readiness.check(parameters, running)
    return changed, unseen


def bring_up_to_date(
    graph: dict[str, set[str]],
    order: list[str],
    forced: list[str],
    changed: dict[str, str],  # as `due` returns them
    unseen: Collection[str],
    variables: dict[str, str],  # of the stages' environment
) -> State:
    """Run the stages and write the report => the flow's final state."""
    outcomes = walk(graph, order, forced, changed, unseen, variables)
    clear_finished(declarations().values())  # of the last stage, which has no stage after it that would
    show_outcomes(outcomes)
    if not REPORT.is_file() or any(outcome.result != "up to date" for outcome in outcomes):
        write_report()
    return summary(outcomes)


def walk(
    graph: dict[str, set[str]],
    order: list[str],
    forced: list[str],  # stages that the user wants to run in any case
    changed: dict[str, str],  # stage => why it is out of date
    unseen: Collection[str],  # those that are out of date by a change that DVC does not see
    variables: dict[str, str],  # of the stages' environment
) -> list[Outcome]:
    """Run the stages one after another, up to the first that fails."""
    outcomes: list[Outcome] = []
    fresh: set[str] = set()  # stages with new outputs
    states: dict[str, State] = {}
    for name in order:
        if any(outcome.result == "failed" for outcome in outcomes):
            outcomes.append(Outcome(name, "not run", "an earlier stage failed", 0.0))
            continue
        why = "; ".join(filter(None, ["forced" if name in forced else "", changed.get(name, "")]))
        force = name in forced or name in unseen
        start = time.monotonic()
        # Prefect treats an argument that occurs in an earlier result as a dependency. Quoting arguments and removing
        # messages keeps its page to the edges of the pipeline.
        bare = {"message": None, "data": True}
        upstream = [states[stage].model_copy(update=bare) for stage in sorted(graph[name]) if stage in states]
        ran = bool(fresh & graph[name])
        state = states[name] = run_stage(
            quote(name), quote(why), ran, force, quote(variables), return_state=True, wait_for=upstream
        )
        result: Any = state.result() if state.is_completed() else "failed"
        outcomes.append(Outcome(name, result, state.message or "", round(time.monotonic() - start, 1)))
        if result in ("ran", "restored"):
            fresh.add(name)
            show_made([name])
    return outcomes


def summary(outcomes: Iterable[Outcome]) -> State:
    """The flow's final state: which stage failed, or what each stage did, in one line."""
    stages: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.result == "failed":
            return Failed(message=f"stage '{outcome.stage}' failed: {outcome.why}")
        stages.setdefault(outcome.result, []).append(outcome.stage)
    return Completed(message="; ".join(f"{result}: {', '.join(names)}" for result, names in stages.items()))


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
        "--force",
        nargs="*",
        metavar="STAGE",
        help="run these even if nothing changed; without names: those of --stages, or all",
    )
    arguments = parser.parse_args()
    try:
        values = edit.values_of(arguments.set)
    except UserError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return 1
    force = tuple(arguments.force) if arguments.force else arguments.force is not None
    return report("pipeline", lambda: pipeline(tuple(arguments.stages), values, force, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
