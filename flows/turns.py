"""One flow at a time in a repository, over all deployments and command lines: the others wait for their turn."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = Path("work/flow.lock")


@contextlib.contextmanager
def turn(say: Callable[[str], None]) -> Iterator[None]:
    """Hold the repository's lock; `say` tells once that another flow is waited for, without a limit of time."""
    LOCK.parent.mkdir(exist_ok=True)
    lock = FileLock(LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another flow works in this repository; this one starts when it ends")
        lock.acquire(poll_interval=1)
    try:
        yield
    finally:
        lock.release()
