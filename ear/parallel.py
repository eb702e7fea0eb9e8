"""Shards as tasks: one function over many shards, in this process, in processes of this machine or on a Dask cluster.

The function writes files, and what it writes depends on its shard alone; so the three ways give the same bytes.
"""

import importlib.metadata
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from ear import records

Shard = TypeVar("Shard")
Result = TypeVar("Result")

_DECISIVE = ("pillow", "h5py", "numpy", "torch")  # the packages whose versions decide about the bytes of a shard
_SECONDS_TO_CONNECT = 20


def map_shards(
    function: Callable[[Shard], Result],
    shards: Sequence[Shard],
    *,
    workers: int,  # processes of this machine; 0 and 1 work in this one
    cluster: str = "",  # address of a Dask scheduler to use instead, such as tcp://host:8786
) -> Iterator[tuple[Shard, Result]]:
    """Yield (shard, function(shard)) as they are ready.

    `function` is of module level, or a partial of one. On a cluster its paths must be absolute and reachable from every
    worker, and this package must be installed there. Raises ValueError where the cluster does not answer or differs in
    a version that decides about bytes, ChildProcessError where a worker dies, and what `function` raises.
    """
    if cluster:
        yield from _on_cluster(function, shards, cluster)
    elif min(workers, len(shards)) < 2:
        yield from ((shard, function(shard)) for shard in shards)
    else:
        yield from _in_processes(function, shards, workers)


def _in_processes(function: Callable, shards: Sequence, workers: int) -> Iterator[tuple]:
    spawn = multiprocessing.get_context("spawn")  # fork is unsafe beside HDF5's locks and a caller's threads
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=spawn, initializer=_follow_parent)
    try:
        futures = {pool.submit(function, shard): shard for shard in shards}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps for want of memory; finished shards are kept: run again, with a lower "
            "runtime.workers if it recurs."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """In a worker: end when the parent is killed, or else it would write on beside the next run; end on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _on_cluster(function: Callable, shards: Sequence, address: str) -> Iterator[tuple]:
    """As `_in_processes`; Dask runs a shard again where a worker dies, and gives up when three have died of it."""
    try:
        from distributed import Client, KilledWorker
        from distributed import as_completed as as_finished
    except ImportError as error:
        raise ValueError(
            f"runtime.cluster is {address!r}, but Dask is not installed; install the extra `cluster` "
            "(pip install -e '.[cluster]'), or set runtime.cluster to ''."
        ) from error
    try:
        _knock(address)
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Dask scheduler answers at runtime.cluster, {address!r}; start one with `dask scheduler` and workers "
            "with `dask worker`, or set runtime.cluster to '' for processes of this machine."
        ) from error
    with client:
        _check_alike(client, address)
        futures = dict(zip(client.map(function, shards, pure=False), shards, strict=True))
        try:
            for future in as_finished(futures, loop=client.loop):
                yield futures[future], future.result()
        except KilledWorker as error:
            raise ChildProcessError(
                f"workers of the cluster at {address} died, perhaps for want of memory; finished shards are kept: run "
                "again, with fewer workers on each machine if it recurs."
            ) from error
        finally:
            client.cancel(list(futures))


def _knock(address: str) -> None:
    """Raise OSError or ValueError at once where a client would first wait, and then hang at the program's end."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()


def versions() -> dict[str, str]:
    """Versions of the packages that decide about the bytes of a shard."""
    return {name: importlib.metadata.version(name) for name in (*_DECISIVE, "ear")}


def check_shared(path: Path, digest: str) -> None:
    """In a worker of a cluster: raise ValueError unless the file is the one that the main process reads."""
    if records.sha256(path) != digest:
        raise ValueError(f"{path} is another file on a worker of the cluster; let all machines share its folder.")


def _check_alike(client, address: str) -> None:
    """Another version of a decoder or of a kernel may give other values, silently."""
    here, found = versions(), client.run(versions)
    if not found:
        raise ValueError(f"the cluster at runtime.cluster, {address!r}, has no workers; start some with `dask worker`.")
    for worker, there in found.items():
        for name, version in here.items():
            if there[name] != version:
                raise ValueError(
                    f"worker {worker} of the cluster at {address} has {name} {there[name]}, but this machine has "
                    f"{version}; install the same requirements.txt on both."
                )
