"""Shards as tasks: one function over many shards, here, in a process pool, or on a Dask cluster.

The function writes files whose bytes depend only on its shard, so every executor gives the same bytes.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from ear.errors import UserError
from ear.files.digests import sha256
from ear.runtime import distributed
from ear.runtime.versions import versions

Shard = TypeVar("Shard")
Result = TypeVar("Result")

_SECONDS_TO_CONNECT = 20
_PACKAGE = Path(__file__).parents[1]
_CODE = {file.relative_to(_PACKAGE).as_posix(): sha256(file) for file in _PACKAGE.rglob("*.py")}  # as imported here


def map_shards(
    function: Callable[[Shard], Result],
    shards: Sequence[Shard],
    *,
    workers: int,  # processes on this machine; 0 and 1 run in this process
    cluster: str = "",  # address of a Dask scheduler to use instead, such as tcp://host:8786
) -> Iterator[tuple[Shard, Result]]:
    """Yield (shard, function(shard)) in order of completion.

    `function` must be a module-level function, or a partial of one; shards must be small (an index, a file name), since
    they are sent to other processes. On a cluster, every worker needs this package and access to the paths of
    `function`, which must be absolute. Raises UserError if the cluster does not answer, or if its copy of this package
    or its versions of packages that affect bytes differ from those here; ConnectionError if the cluster is lost;
    ChildProcessError if a worker dies; and whatever `function` raises.
    """
    if not cluster and min(workers, len(shards)) < 2:
        yield from ((shard, function(shard)) for shard in shards)
        return
    with _on_cluster(cluster) if cluster else _in_processes(min(workers, len(shards))) as executor:
        futures = {executor.submit(function, shard): shard for shard in shards}
        for future in as_completed(futures):
            yield futures[future], future.result()


def share_shards(
    shards: Sequence[Shard],
    *,
    here: Callable[[Shard], Result],
    there: Callable[[Shard], Result],  # the same work in a worker of a cluster; see `map_shards`
    cluster: str = "",
) -> Iterator[tuple[Shard, Result]]:
    """Yield (shard, result) on rank 0, the work shared by all ranks or, if there is one, by a cluster.

    All ranks must exhaust the iterator: that is where they work. Without a cluster, results come in order.
    """
    if not cluster:
        yield from zip(shards, distributed.in_turns(shards, here), strict=distributed.is_main())
    elif distributed.is_main():
        yield from map_shards(there, shards, workers=0, cluster=cluster)


@contextlib.contextmanager
def _in_processes(count: int) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")  # fork is unsafe with HDF5's locks and a caller's threads
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps out of memory; finished shards are kept: run again, with a lower "
            "runtime.workers if it happens again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: exit if the parent is killed, so as not to write alongside the next run; exit on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _on_cluster(address: str) -> Iterator[Executor]:
    """An executor on a Dask cluster, which runs a shard again if a worker dies and gives up after three deaths."""
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise UserError(
            f"runtime.cluster is {address!r}, but Dask is not installed; install the extra `cluster` "
            "(pip install -e '.[cluster]'), or set runtime.cluster to ''."
        ) from error
    try:
        _knock(address)
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Dask scheduler answers at runtime.cluster, {address!r}; start one with `dask scheduler` and workers "
            "with `dask worker`, or set runtime.cluster to '' to use this machine."
        ) from error
    with client:
        _check_alike(client, address)
        executor = client.get_executor(pure=False)
        try:
            yield executor
        except KilledWorker as error:
            raise ChildProcessError(
                f"workers of the cluster at {address} died, perhaps out of memory; finished shards are kept: run "
                "again, with fewer workers on each machine if it happens again."
            ) from error
        except CancelledError as error:
            raise ConnectionError(
                f"the Dask scheduler at {address} was lost; finished shards are kept: start it and its workers, then "
                "run again."
            ) from error
        finally:
            executor.shutdown(wait=False)


def _knock(address: str) -> None:
    """Raise OSError or ValueError at once if nothing listens; Dask's client would wait, then hang at exit."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()


def check_shared(path: Path, digest: str) -> None:
    """In a worker of a cluster: raise UserError unless the file is the one that rank 0 reads."""
    if sha256(path) != digest:
        raise UserError(f"{path} is another file on a worker of the cluster; let all machines share its folder.")


def _installed() -> tuple[dict[str, str], dict[str, str]]:
    """(versions of packages, digests of this package's code), in a worker."""
    return versions(), _CODE


def _check_alike(client: Any, address: str) -> None:
    """Raise UserError if a worker's code or packages differ: they would silently change values.

    A worker keeps the code that it imported first, whatever is edited later.
    """
    expected, workers = versions(), client.run(_installed)
    if not workers:
        raise UserError(f"the cluster at runtime.cluster, {address!r}, has no workers; start some with `dask worker`.")
    for worker, (installed, code) in workers.items():
        if code != _CODE:
            raise UserError(
                f"worker {worker} of the cluster at {address} runs other code of ear than this machine; start it again "
                "in this checkout."
            )
        for name, version in expected.items():
            found = installed.get(name)
            if found != version:
                raise UserError(
                    f"worker {worker} of the cluster at {address} has {name} {found}, but this machine has {version}; "
                    "install the same requirements.txt on both."
                )
