"""Run a command as its own process group: live output, and no process left behind when it is stopped."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

_running: set[subprocess.Popen] = set()
_starting = threading.Lock()
GRACE_SECONDS = 25.0  # to write a training state; Prefect kills a cancelled flow itself after 30


class StoppedError(Exception):
    """The command was stopped, while it ran or before it started."""


def stream(
    command: Sequence[str],
    *,
    line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    grace: float = GRACE_SECONDS,
    stopped: threading.Event | None = None,
) -> int:
    """Run `command` in `folder`, pass each line of its output to `line` immediately, return its exit code.

    Standard output and error are merged. If the wait is interrupted (Ctrl-C, a signal handler that raises, an error in
    `line`), the command and all its descendants are stopped first: SIGINT to each, `grace` seconds to clean up, then
    SIGKILL. If the command itself has died, the rest of its process group is stopped. Raises StoppedError if
    `stopped` is set before the command begins or ends.
    """
    let_commands_be_interrupted()
    with _starting:
        if stopped and stopped.is_set():
            raise StoppedError("stopped before it began")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            env=environment,
            cwd=folder,
            # Its own group: signals to this process do not reach the command directly, only through `_stop`.
            start_new_session=True,
        )
        _running.add(process)
    assert process.stdout is not None
    with process.stdout:
        try:
            for text in process.stdout:
                line(text.rstrip())
            code = process.wait()
            if stopped and stopped.is_set():
                raise StoppedError("stopped while it ran")
            return code
        except BaseException:
            _stop([process], grace)
            raise
        finally:
            _running.discard(process)


def let_commands_be_interrupted() -> None:
    """Make commands of this process react to SIGINT even if this process ignores it.

    Background jobs of a shell script ignore SIGINT, and commands inherit that. Does nothing outside the main thread.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: None)


def stop_all(stopped: threading.Event, grace: float = GRACE_SECONDS) -> None:
    """Stop the commands that other threads of this process run, in which no signal or Ctrl-C arrives.

    `stopped` is set first, so that those that watch it begin no further command.
    """
    stopped.set()
    with _starting:
        running = list(_running)
    _stop(running, grace)


def _stop(processes: Sequence[subprocess.Popen], grace: float) -> None:
    """End all of them and their descendants, even outside their groups (torchrun gives workers their own session)."""
    members = [member for process in processes for member in family(process)]
    try:
        send(members, signal.SIGINT)
        psutil.wait_procs(members, timeout=grace)
    finally:  # reached at once if a second Ctrl-C interrupts the wait
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        send(members, signal.SIGKILL)
        for process in processes:
            process.wait()


def programs() -> Iterator[tuple[int, Path]]:
    """Every Python program that this user may look at, and the folder that it works in."""
    for process in psutil.process_iter(["cwd", "exe"]):
        if process.info["cwd"] and Path(process.info["exe"] or "").name.startswith("python"):
            yield process.pid, Path(process.info["cwd"])


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and its descendants; if it has ended, the rest of its process group with their descendants."""
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            return [parent, *parent.children(recursive=True)]
    left = []
    for member in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(member.pid) == process.pid:
                left += [member, *member.children(recursive=True)]
    return left


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those of the processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
