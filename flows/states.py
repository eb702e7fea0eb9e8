"""States and options that the tasks of all flows share."""

from typing import Any

from prefect import State
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from flows.repository import BusyError


def failed(error: Exception) -> State:
    """A failed state whose message is one line, without a traceback; named Busy if waiting can help."""
    return Failed(name="Busy" if isinstance(error, BusyError) else "Failed", message=str(error))


def _is_busy(task: Any, run: Any, state: State) -> bool:
    """Whether another DVC process was in the way: the only failure that is retried."""
    return state.name == "Busy"


# DVC is the only cache, so Prefect keeps none; only a busy repository is tried again.
OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 4,
    "retry_delay_seconds": [2, 10, 60, 300],
    "retry_condition_fn": _is_busy,
}
