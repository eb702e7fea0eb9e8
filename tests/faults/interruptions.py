"""Kills, signals, dead workers and edits while stages run."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from ear.lineage.declaration import Declaration, declarations
from tests.faults.pipelines import (
    assert_same,
    change_back,
    clear,
    copy,
    expected,
    family,
    finish,
    kill,
    last_lines,
    python,
    started,
    stop_group,
    wait_for,
)
from tests.repositories import STAGES, change, digests, environment, stale

TRAININGS = ("train", "finetune", "tokenizer")
KILLS = 10  # per case
_HALF_WRITTEN = {  # what DVC says of a file that a kill has cut short => the file
    "Unable to read RWLock-file": ".dvc/tmp/rwlock",
    "dvc.lock' validation failed": "dvc.lock",
    "dvc.lock' is invalid": "dvc.lock",
}


def kill_dvc(case: int) -> dict[str, int]:
    """Ten kills of `dvc repro` at random moments, then the end."""
    randomness = random.Random(f"kill {case}")
    killed = 0
    cut: Counter[str] = Counter()
    with copy(empty=True) as folder:
        while killed < KILLS:
            with started("dvc", "repro", folder=folder) as process:
                time.sleep(randomness.uniform(0.5, 12))
                if process.poll() is not None:
                    said = (folder.parent / "log").read_text()
                    if half := next((path for sign, path in _HALF_WRITTEN.items() if sign in said), None):
                        (folder / half).unlink()  # as docs/reliability.md says
                        cut[half] += 1
                        continue
                    assert process.returncode == 0, last_lines(said)
                    assert_same(folder)
                    clear(folder)
                    continue
                kill(family(process))
                killed += 1
        (folder / ".dvc/tmp/rwlock").unlink(missing_ok=True)
        finish(folder)
        assert_same(folder)
    return {
        "killed, then the same bytes": killed,
        **{f"of these, DVC had half-written {path}": count for path, count in cut.items()},
    }


def kill_flow(case: int) -> dict[str, int]:
    """A kill of the flow alone: DVC and the stage are orphans then; the next flow must end well."""
    randomness = random.Random(f"kill flow {case}")
    with copy(empty=True) as folder:
        home = {"PREFECT_HOME": str(folder.parent / "prefect")}
        with started(*python("-m", "flows.pipeline"), folder=folder, **home) as flow:
            wait_for(lambda: (folder / "work/fetch").exists() or flow.poll() is not None, 300)
            time.sleep(randomness.uniform(0, 15))
            members = family(flow)
            flow.kill()
            flow.wait()
            with started(
                *python("-m", "flows.pipeline"), folder=folder, log=folder.parent / "second", **home
            ) as second:
                assert second.wait(600) == 0, last_lines((folder.parent / "second").read_text())
            kill([member for member in members if member.pid != flow.pid])
        assert_same(folder)
    return {"killed, then the same bytes": 1}


def signalled(case: int) -> dict[str, int]:
    """A signal to the group of `dvc repro` during a training."""
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[case % 3]
    stage = TRAININGS[case // 3 % 3]
    with copy() as folder:
        _make_stale(folder, stage)
        with started("dvc", "repro", "--single-item", "--force", stage, folder=folder) as process:
            wait_for(lambda: list((folder / "work" / stage).glob("*/checkpoint-*")) or process.poll() is not None)
            members = family(process)
            stop_group(process, number)
            _, alive = psutil.wait_procs(members, timeout=60)
            assert not alive, f"{alive} still run a minute after {number.name}"
            said = (folder.parent / "log").read_text()
        if f"{stage} was stopped by {number.name} after" not in said:
            assert "has not written" not in said, last_lines(said)
            outcome = f"{number.name} before or after the training"
        else:
            outcome = f"{number.name}: saved"
        finish(folder)
        assert_same(folder)
    return {outcome + ", then the same bytes": 1}


def _make_stale(folder: Path, stage: str) -> None:
    """Remove what DVC knows of a stage, so that its program runs."""
    subprocess.run(["rm", "-rf", ".dvc/cache/runs", "work"], cwd=folder, check=True)


def kill_worker(case: int) -> dict[str, int]:
    """SIGKILL to one worker process of a stage."""
    return (_kill_decoder, _kill_dask, _kill_rank)[case % 3](case)


def _kill_decoder(case: int) -> dict[str, int]:
    with copy() as folder:
        change(folder, {"runtime.workers": 2, "prepare.shard_size": 8})
        with started(*python("-m", "stages.prepare"), folder=folder) as process:
            wait_for(lambda: list((folder / "work/prepare").glob("*/*.h5")), poll=0.002)
            workers = [
                p for p in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(p.cmdline())
            ]
            assert workers
            workers[-1].kill()
            _assert_one_sentence("prepare", process, folder)
        change_back(folder)
        finish(folder)
        assert_same(folder)
    return {"decoding pool: one sentence": 1}


def _assert_one_sentence(stage: str, process: subprocess.Popen, folder: Path) -> None:
    process.wait(60)
    said = (folder.parent / "log").read_text()
    assert process.returncode == 1, f"exit code {process.returncode}: {last_lines(said)}"
    assert "Traceback" not in said, last_lines(said)
    assert any(line.startswith(f"{stage}: ") for line in said.splitlines()), last_lines(said)


def _running(process: subprocess.Popen, word: str) -> list[psutil.Process]:
    """Descendants with a word in their command line."""
    return [p for p in family(process) if p.pid != process.pid and word in " ".join(p.cmdline())]


def _kill_dask(case: int) -> dict[str, int]:
    from distributed import LocalCluster

    with copy() as folder, LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        before = {name: digest for name, digest in expected().items() if name.startswith("data/latents")}
        change(folder, {"runtime.cluster": cluster.scheduler_address})
        subprocess.run(["rm", "-rf", "data/latents", "work"], cwd=folder, check=True)
        with started(*python("-m", "stages.cache"), folder=folder) as process:
            wait_for(lambda: (folder / "work/cache").exists())
            time.sleep(random.Random(f"dask {case}").uniform(0.5, 3))
            os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
            assert process.wait(120) == 0, last_lines((folder.parent / "log").read_text())
        found = {name: digest for name, digest in digests(folder).items() if name.startswith("data/latents")}
        assert found == before
    return {"Dask worker: the shard was repeated": 1}


def _kill_rank(case: int) -> dict[str, int]:
    with copy() as folder:
        change(folder, {"runtime.processes": 2, "train.images": 64_000, "train.micro_batch_size": 32})
        with started(*python("-m", "stages.train"), folder=folder) as process:
            wait_for(lambda: list((folder / "work/train").glob("*/checkpoint-*")))
            _running(process, "stages.train")[-1].kill()
            assert process.wait(60) == 1
            said = (folder.parent / "log").read_text()
            assert "was ended by SIGKILL" in said, last_lines(said)
            assert "Traceback" not in said, last_lines(said)
        change_back(folder)
        finish(folder)
        assert_same(folder)
    return {"one of two processes: one sentence": 1}


def edit(case: int) -> dict[str, int]:
    """An edit while a stage runs: it is refused, recorded, or found by `ear verify`; never silently wrong."""
    randomness = random.Random(f"edit {case}")
    kinds = [
        (stage, kind)
        for stage in STAGES
        for kind in ("parameter", "code", "input")
        if (stage, kind) != ("fetch", "input")
    ]
    randomness_of_order = random.Random("order")
    randomness_of_order.shuffle(kinds)
    stage, kind = kinds[case % len(kinds)]
    with copy() as folder:
        _make_stale(folder, stage)
        declared = _declarations(folder)[stage]
        lock = (folder / "dvc.lock").read_bytes()
        with started("dvc", "repro", "--single-item", "--force", stage, folder=folder) as process:
            wait_for(lambda: (folder / "work" / stage / "lock").exists() or process.poll() is not None)
            time.sleep(randomness.uniform(0, 2))
            edited, undo = _edit(folder, declared, kind)
            process.wait(300)
        said = (folder.parent / "log").read_text()
        if process.returncode:
            assert "Traceback" not in said, last_lines(said, 20)
            assert (folder / "dvc.lock").read_bytes() == lock
            sentences = [line for line in said.splitlines() if line.startswith(f"{stage}: ")]
            assert any(edited.name in line or "params.yaml or code" in line for line in sentences), last_lines(said)
            undo()
            finish(folder)
            assert_same(folder)
            return {f"{kind}: refused, nothing published": 1}
        verified = subprocess.run(
            python("-m", "ear", "verify"), cwd=folder, env=environment(), capture_output=True, text=True
        )
        if kind == "input" or verified.returncode:
            assert verified.returncode == 1, verified.stdout
            return {f"{kind}: after the stage had ended; `ear verify` names it": 1}
        assert stage in stale(folder) or kind == "parameter", "edited, and DVC takes the stage for up to date"
        return {f"{kind}: after the stage had ended; DVC sees it": 1}


def _declarations(folder: Path) -> dict[str, Declaration]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return declarations()
    finally:
        os.chdir(before)


_EDITS = {  # a parameter of each stage, with a valid other value
    "fetch": {"data.val_fraction": 0.3},
    "prepare": {"prepare.shard_size": 512},
    "reference": {"reference.learning_rate": 0.002},
    "tokenizer": {"tokenizer.learning_rate": 0.0007},
    "reconstruct": {"reference.batch_size": 50},
    "cache": {"cache.batch_size": 50},
    "train": {"train.learning_rate": 0.0007},
    "finetune": {"finetune.learning_rate": 0.0007},
    "sample": {"sample.guidance": 1.3},
    "evaluate": {"evaluate.neighborhood": 2},
}


def _edit(folder: Path, declared: Declaration, kind: str) -> tuple[Path, Callable[[], None]]:
    """Make the edit => (the file in the repository, a function that takes it back)."""
    if kind == "parameter":
        path = folder / "params.yaml"
        before = path.read_bytes()
        change(folder, _EDITS[declared.stage])
    else:
        roots = declared.code if kind == "code" else declared.inputs
        root = folder / roots[-1]
        path = (
            root
            if root.is_file()
            else sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)[0]
        )
        before = path.read_bytes()
        path.unlink()  # not in place: DVC's cache may share the file
        path.write_bytes(before + b"\n# edited\n")

    def undo() -> None:
        path.unlink()
        path.write_bytes(before)

    return path.relative_to(folder), undo
