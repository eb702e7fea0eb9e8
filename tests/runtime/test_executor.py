"""One function over many shards: in this process, in several, on a Dask cluster of two workers."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from distributed import Client

from ear.runtime import executor

ROOT = Path(__file__).parents[2]
CLUSTER = 2  # workers


def halve(shard: int, folder: Path) -> int:
    """Halve the shard and record the worker's PID; a negative shard fails, shard 99 kills its process."""
    if shard < 0:
        raise ValueError(f"shard {shard} is negative")
    if shard == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{shard}").write_text(str(os.getpid()))
    return shard // 2


def mapped(folder: Path, shards: list[int], **where) -> dict[int, int]:
    return dict(executor.map_shards(partial(halve, folder=folder), shards, **where))


def workers(folder: Path) -> set[int]:
    return {int(path.read_text()) for path in folder.iterdir()}


def test_every_way_gives_the_same_results(tmp_path, cluster):
    ways = {"here": {"workers": 1}, "processes": {"workers": 2}, "cluster": {"workers": 0, "cluster": cluster}}
    for name, where in ways.items():
        (tmp_path / name).mkdir()
        assert mapped(tmp_path / name, list(range(8)), **where) == {k: k // 2 for k in range(8)}
    assert workers(tmp_path / "here") == {os.getpid()}
    assert os.getpid() not in workers(tmp_path / "processes") | workers(tmp_path / "cluster")
    assert len(workers(tmp_path / "cluster")) == 2


def test_an_error_in_a_shard_arrives_as_it_was_raised(tmp_path, cluster):
    for where in ({"workers": 0}, {"workers": 2}, {"workers": 0, "cluster": cluster}):
        with pytest.raises(ValueError, match="shard -3 is negative"):
            mapped(tmp_path, [1, -3, 5], **where)


def test_a_dying_process_is_one_sentence(tmp_path):
    with pytest.raises(ChildProcessError, match=r"a worker process died, .* finished shards are kept"):
        mapped(tmp_path, [1, 99], workers=2)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{}", "nonsense", "tcp://127.0.0.1"])
def test_a_cluster_that_does_not_answer_is_named(tmp_path, address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = address.format(unused.getsockname()[1])
        with pytest.raises(ValueError, match="no Dask scheduler answers at") as caught:
            mapped(tmp_path, [1], workers=0, cluster=address)
    assert repr(address) in str(caught.value)


def test_workers_with_another_decoder_are_refused(tmp_path, cluster, monkeypatch):
    with monkeypatch.context() as patch:
        real = importlib.metadata.version
        patch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "pillow" else real(name))
        with pytest.raises(ValueError, match=r"worker tcp://.* has pillow \d+\S*, but this machine has 0\.1; install"):
            mapped(tmp_path, [1], workers=0, cluster=cluster)
    assert not list(tmp_path.iterdir())


def test_workers_with_other_code_are_refused(tmp_path, cluster, monkeypatch):
    """A worker keeps the code that it imported first; here, this machine's has changed meanwhile."""
    monkeypatch.setitem(executor._CODE, "data/images.py", "another digest")
    with pytest.raises(ValueError, match=r"worker tcp://.* runs other code of ear than this machine; start it again"):
        mapped(tmp_path, [1], workers=0, cluster=cluster)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_lost_scheduler_is_one_sentence():
    """It is killed while a worker works: Dask's client then cancels what is left."""
    dask = [sys.executable, "-m"]
    quiet: dict = {"cwd": Path(__file__).parent, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = ["distributed.cli.dask_worker", address, "--no-nanny", "--no-dashboard"]
    with subprocess.Popen([*dask, *scheduler], **quiet) as first, subprocess.Popen([*dask, *worker], **quiet) as second:
        try:
            with Client(address, timeout=60) as client:
                client.wait_for_workers(1, timeout=60)
            killer = threading.Timer(2, first.kill)
            killer.start()
            with pytest.raises(ConnectionError, match=rf"the Dask scheduler at {address} was lost; finished shards"):
                list(executor.map_shards(time.sleep, [5] * 4, workers=0, cluster=address))
        finally:
            first.kill()
            second.kill()


def test_work_for_this_machine_does_not_need_dask():
    code = "; ".join(
        (
            "import sys",
            "sys.modules['distributed'] = None",
            "from ear.runtime.executor import map_shards",
            "print(list(map_shards(abs, [-1], workers=1)))",
            "list(map_shards(abs, [1], workers=0, cluster='a'))",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[(-1, 1)]\n"
    assert "UserError: runtime.cluster is 'a', but Dask is not installed; install the extra `cluster`" in done.stderr
