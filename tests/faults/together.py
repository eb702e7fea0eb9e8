"""Two programs on one repository at once; and Prefect's server, worker and cancellation."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from tests.faults.pipelines import (
    assert_same,
    change_back,
    copy,
    family,
    finish,
    kill,
    last_lines,
    python,
    started,
    wait_for,
)
from tests.repositories import change, environment

FLOW = python("-m", "flows.pipeline")
SWEEP = python("-m", "flows.sweep", "--set", "sample.guidance=1.0,2.0")


def at_once(case: int) -> dict[str, int]:
    """Start two programs on a repository in which nothing has run; together they end in the usual bytes."""
    kind = ("two programs of a stage", "two flows", "a flow and a sweep", "two dvc repro")[case % 4]
    pause = random.Random(f"at once {case}").uniform(0, 2)
    if kind == "two programs of a stage":
        return _two_programs(pause)
    first, second = {
        "two dvc repro": (["dvc", "repro"], ["dvc", "repro"]),
        "two flows": (FLOW, FLOW),
        "a flow and a sweep": (FLOW, SWEEP),
    }[kind]
    with copy(empty=True) as folder:
        home = {"PREFECT_HOME": str(folder.parent / "prefect")}
        with started(*first, folder=folder, **home) as one:
            time.sleep(pause)
            with started(*second, folder=folder, log=folder.parent / "second", **home) as two:
                codes = (one.wait(900), two.wait(900))
        said = [last_lines((folder.parent / name).read_text()) for name in ("log", "second")]
        if kind == "two dvc repro":
            assert 0 in codes, said
            assert codes == (0, 0) or any("lock" in text or "busy" in text for text in said), said
        else:
            assert codes == (0, 0), said
        finish(folder)
        assert_same(folder)
        if kind == "a flow and a sweep":
            table = (folder / "work/sweep/table.csv").read_text().splitlines()
            assert len(table) == 3, table
            assert not list(folder.glob("work/*/*.code.json")), "unfinished work of finished runs was left"
    return {kind: 1}


def _two_programs(pause: float) -> dict[str, int]:
    with copy() as folder:
        with started(*python("-m", "stages.train"), folder=folder) as one:
            wait_for(lambda: (folder / "work/train/lock").exists())
            time.sleep(pause / 4)
            with started(*python("-m", "stages.train"), folder=folder, log=folder.parent / "second") as two:
                codes = (one.wait(120), two.wait(120))
        said = [(folder.parent / name).read_text() for name in ("log", "second")]
        assert sorted(codes) == [0, 1], (codes, *map(last_lines, said))
        assert "train: another train stage runs in this folder" in said[codes.index(1)], said
        assert_same(folder)
    return {"two programs of a stage: the second refuses": 1}


def prefect(case: int) -> dict[str, int]:
    """The server is restarted, the worker killed, or the run cancelled during the train stage of a deployed run."""
    kind = ("server restarted", "worker killed", "cancelled")[case % 3]
    with copy(empty=True) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        change(folder, {"train.images": 64_000})  # long enough to be disturbed
        home = {"PREFECT_HOME": str(folder.parent / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        server = python("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        worker = python("-m", "prefect", "worker", "start", "--pool", "ear", "--type", "process")
        logs = {name: folder.parent / name for name in ("server", "worker", "again")}
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(started(*server, folder=folder, log=logs["server"], **home))
            wait_for(lambda: _healthy(port), 300)
            at_work = stack.enter_context(started(*worker, folder=folder, log=logs["worker"], **home))
            wait_for(lambda: "started!" in logs["worker"].read_text(), 120)
            _prefect(folder, home, "--no-prompt", "deploy", "--all")
            name = _run_name(_prefect(folder, home, "deployment", "run", "pipeline/local", "-p", 'stages=["train"]'))
            wait_for(lambda: list((folder / "work/train").glob("*/checkpoint-*")), 300)
            if kind == "server restarted":
                kill(family(first))
                time.sleep(5)
                stack.enter_context(started(*server, folder=folder, log=logs["again"], **home))
                wait_for(lambda: _healthy(port), 120)
            elif kind == "worker killed":
                kill(family(at_work))
                state = _state(folder, home, name)
            else:
                _prefect(folder, home, "flow-run", "cancel", name)
                wait_for(lambda: not _trains(folder), 120)
            if kind == "server restarted":
                state = wait_for(lambda: _ended(folder, home, name), 600, poll=3)
                assert state == "COMPLETED", (state, last_lines(logs["worker"].read_text(), 20))
            if kind == "cancelled":
                state = wait_for(lambda: _ended(folder, home, name), 120, poll=3)
                assert state == "CANCELLED", state
            change_back(folder)
            shutil.rmtree(folder / "work/train", ignore_errors=True)
        finish(folder)
        assert_same(folder)
    return {f"{kind}; Prefect says {state}": 1}


def _trains(folder: Path) -> bool:
    import psutil

    return any(
        p.info["cwd"] == str(folder) and "stages.train" in " ".join(p.info["cmdline"] or [])
        for p in psutil.process_iter(["cwd", "cmdline"])
    )


def _healthy(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=1) as answer,
    ):
        return answer.status == 200
    return False


def _prefect(folder: Path, home: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        python("-m", "prefect", *arguments), cwd=folder, env=environment() | home, capture_output=True, text=True
    )
    assert done.returncode == 0, last_lines(done.stdout + done.stderr)
    return done.stdout


def _run_name(said: str) -> str:
    return next(word for line in said.splitlines() if "UUID:" in line for word in line.split()[-1:])


def _ended(folder: Path, home: dict[str, str], name: str) -> str:
    """The type of a run's final state, or ''."""
    state = _state(folder, home, name)
    return state if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else ""


def _state(folder: Path, home: dict[str, str], name: str) -> str:
    """The type of a run's state."""
    return json.loads(_prefect(folder, home, "flow-run", "inspect", name, "--output", "json"))["state"]["type"]
