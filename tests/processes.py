"""Processes inside a test: forked, so that none has to import torch again."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable

import torch

from ear.runtime import distributed

_fork = multiprocessing.get_context("fork")


def together(work: Callable[[], object], count: int = 2, seconds: float = 60.0) -> list:
    """Run `work()` in `count` processes joined by gloo; what each returns (must pickle), or what ended it."""
    queue, port = _fork.Queue(), _free_port()
    children = [_fork.Process(target=_work, args=(work, rank, count, port, queue)) for rank in range(count)]
    for child in children:
        child.start()
    try:
        results = dict(queue.get(timeout=seconds) for _ in children)
        for child in children:
            child.join(seconds)
    finally:
        for child in children:
            child.kill()
    return [results[rank] for rank in range(count)]


def kill(work: Callable[[], object], ready: Callable[[], bool], seconds: float = 120.0) -> None:
    """Start `work()` in a process, and kill it as soon as `ready()`; fails if it has ended before."""
    child = _fork.Process(target=work)
    child.start()
    deadline = time.monotonic() + seconds
    try:
        while not ready():
            assert child.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL


def _work(work: Callable, rank: int, count: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        with distributed.group():
            result = work()
    except Exception as error:
        traceback.print_exc()
        result = error
    queue.put((rank, result))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
