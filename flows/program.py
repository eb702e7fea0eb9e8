"""A flow as a command-line program: checks the server, prints one line, returns an exit code."""

import signal
import sys
import time
from collections.abc import Callable

import httpx
from prefect import State
from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.settings import get_current_settings

from flows.command import let_commands_be_interrupted


def report(name: str, run: Callable[[], State]) -> int:
    """Run a flow: `run()` returns its final state, which is printed as one line; returns the exit code.

    SIGHUP (a closed terminal) stops the flow and its stage as SIGTERM does, unless nohup has it ignored.
    """
    let_commands_be_interrupted()  # here, since threads of several jobs cannot
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    if not server_answers(url := get_current_settings().api.url):
        fix = "start it with `prefect server start`, or unset PREFECT_API_URL to run without one."
        print(f"{name}: PREFECT_API_URL is {url}, but no Prefect server answers there; {fix}", file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        state = run()
    except (KeyboardInterrupt, TerminationSignal):
        print(f"{name}: stopped; run the same command to resume", file=sys.stderr)
        return 130
    seconds = f"({time.monotonic() - start:.0f} s)"
    if state.is_completed():
        print(f"{name}: {state.message} {seconds}")
        return 0
    print(f"{name}: {state.message} {seconds}", file=sys.stderr)
    return 1


def server_answers(url: str | None) -> bool:
    """Whether a server answers at `url`, if only to refuse; true without one: Prefect starts its own for the run."""
    if url is None:
        return True
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    return error is None or isinstance(error, httpx.HTTPStatusError)
