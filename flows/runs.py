"""Run many experiments of one snapshot, several at a time, on the devices of this machine."""

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from ear.errors import UserError
from flows import command, experiments
from flows.command import StoppedError
from flows.devices import devices, needed
from flows.experiments import Snapshot
from flows.repository import RepositoryError
from flows.turns import turn

APART = 1_000_000  # added to sample.seed, so that a point is chosen on other images than those reported
_POLL_SECONDS = 0.5


def quiet_snapshot() -> Snapshot:
    """The workspace while no flow writes to it. Raises RepositoryError."""
    with turn(get_run_logger().info):
        return experiments.take_snapshot()


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def run_experiment(
    name: str, values: dict[str, Any], snapshot: Snapshot, among: list[str], stopped: threading.Event | None = None
) -> State:
    """Run one combination as a DVC experiment of the snapshot, on devices `among`; not once `stopped` is set."""
    try:
        experiments.run(name, values, snapshot=snapshot, among=among, line=get_run_logger().info, stopped=stopped)
    except (UserError, RepositoryError, StoppedError) as error:
        return Failed(message=str(error))
    return Completed(message=f"`dvc exp apply {name}` brings it into the workspace")


def run_all(runs: Mapping[str, Mapping[str, Any]], snapshot: Snapshot, jobs: int = 1) -> Iterator[tuple[str, State]]:
    """Run experiments of the snapshot, `jobs` at a time => (name, final state), as they end.

    Runs that share a training do not run at the same time while other runs are waiting: the later ones then find its
    model in DVC's cache. Raises UserError if there are too few devices for `jobs`.
    """
    checked = [snapshot.parameters(values) for values in runs.values()]
    among = min((devices(parameters) for parameters in checked), key=len)
    most = min(len(among) // needed(parameters, among) for parameters in checked)
    if not 1 <= jobs <= most:
        raise UserError(
            f"jobs is {jobs}, but must be 1 to {most} on this machine: each takes runtime.processes GPUs or, without "
            "GPUs, runtime.processes x compute.threads cores; choose another number, or lower compute.threads."
        )
    if jobs == 1:  # in this thread, which signals reach
        for name, values in runs.items():
            yield name, run_experiment(name, dict(values), snapshot, among, return_state=True)
        return
    waiting = list(runs)
    running: dict[str, Any] = {}
    stopped = threading.Event()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = _next(waiting, running, runs)
                waiting.remove(name)
                running[name] = run_experiment.submit(name, dict(runs[name]), snapshot, among, stopped)
            # Not `future.state`, which asks the server: an outage of it must not end the runs.
            for name in [name for name, future in running.items() if future.wrapped_future.done()]:
                running[name].wait()
                yield name, running.pop(name).state
            time.sleep(_POLL_SECONDS)
    finally:
        command.stop_all(stopped)


def _next(waiting: Sequence[str], running: Collection[str], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The first run whose training is not at work already, or the first one."""
    busy = [_training(runs[name]) for name in running]
    return next((name for name in waiting if _training(runs[name]) not in busy), waiting[0])


def _training(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run changes up to its trained model."""
    return {key: value for key, value in values.items() if not key.startswith(("sample.", "evaluate."))}
