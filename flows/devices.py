"""Devices of this machine, each for one run at a time over all flows of a repository: a run waits for free ones.

A device is a GPU or, without one, a core of the CPU.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ear import config
from ear.runtime.cores import cores
from flows.command import StoppedError

FOLDER = Path("work/devices")
_CPU = "cpu"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 1.0


def devices(parameters: config.Parameters) -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them, or the cores of the CPU."""
    from ear.runtime import device

    if not device.uses_cuda(parameters.runtime.device):
        return [f"{_CPU}-{number}" for number in range(cores())]
    import torch

    visible = os.environ.get(_VISIBLE)
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def needed(parameters: config.Parameters, among: Sequence[str]) -> int:
    """How many of the devices a run holds: a GPU per process, or a core per thread of each process, at most all."""
    per_process = parameters.compute.threads if among[0].startswith(_CPU) else 1
    return min(parameters.runtime.processes * per_process, len(among))


def environment(held: Sequence[str]) -> dict[str, str]:
    """The variables that restrict a program to these devices."""
    return {} if held[0].startswith(_CPU) else {_VISIBLE: ",".join(held)}


@contextlib.contextmanager
def hold(
    count: int, among: Sequence[str], say: Callable[[str], None], stopped: threading.Event | None = None
) -> Iterator[list[str]]:
    """Hold `count` of the devices `among`, waiting without a limit of time; `say` tells once that they are in use.

    All are taken together or none, so that two waiting runs cannot block each other. Raises StoppedError once
    `stopped` is set.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    waiting = False
    while True:
        with contextlib.ExitStack() as locks:
            if stopped and stopped.is_set():
                raise StoppedError("stopped before it had a device")
            held = _free(min(count, len(among)), among, locks)
            if held:
                yield held
                return
        if not waiting:
            say(f"other runs use {', '.join(among)}; this one starts when they end")
            waiting = True
        time.sleep(_POLL_SECONDS)


def _free(count: int, among: Sequence[str], locks: contextlib.ExitStack) -> list[str]:
    """Lock `count` devices that nobody holds => their names, or none of them."""
    held: list[str] = []
    for name in among:
        with contextlib.suppress(Timeout):
            locks.enter_context(FileLock(FOLDER / f"{name}.lock", blocking=False))
            held.append(name)
        if len(held) == count:
            return held
    return []
