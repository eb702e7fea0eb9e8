"""Real repositories with tiny parameters, and programs in process groups of their own."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock

from tests.repositories import ROOT, change, digests, environment, fresh, run

# Trainings of a few seconds, so that they can be disturbed.
LONGER = {"train.images": 4800, "finetune.images": 2400, "tokenizer.images": 2560}
TEMPLATES = ROOT / "work/faults/template"


@functools.cache
def template() -> Path:
    """A repository in which `dvc repro` has run everything; made once per state of the code."""
    from tests.faults.run import code

    folder = TEMPLATES / code()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            fresh(folder)
            change(folder, LONGER)
            run("dvc", "repro", cwd=folder)
            (folder / "done").touch()
    return folder


@functools.cache
def expected() -> dict[str, str]:
    """The digests of all outputs of an uninterrupted run."""
    return digests(template())


@contextlib.contextmanager
def copy(*, empty: bool = False) -> Iterator[Path]:
    """A copy of the template to ruin; `empty`: without outputs, DVC's cache and its lock, so that every stage runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        folder = Path(parent) / "copy"
        shutil.copytree(template(), folder, symlinks=True)
        if empty:
            clear(folder)
        run("dvc", "config", "core.site_cache_dir", str(folder / ".dvc/tmp/site"), cwd=folder)
        yield folder


def clear(folder: Path) -> None:
    """Delete all that stages and DVC have written."""
    for name in ("data", "work", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    run("git", "checkout", "--quiet", "--", "data/README.md", cwd=folder)


def assert_same(folder: Path) -> None:
    """The outputs are those of an uninterrupted run, byte for byte, and nothing unfinished lies about."""
    found, whole = digests(folder), expected()
    different = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    assert not different, f"differs from an uninterrupted run: {', '.join(different)}"
    left = list((folder / "data").rglob("*.partial"))
    assert not left, f"left over: {left}"


def finish(folder: Path, *, seconds: float = 600) -> str:
    """Run `dvc repro` to the end => its output."""
    done = subprocess.run(
        ["dvc", "repro"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, last_lines(done.stdout + done.stderr)
    return done.stdout


def change_back(folder: Path) -> None:
    """The parameters of the template again."""
    shutil.copy(template() / "params.yaml", folder / "params.yaml")


def last_lines(text: str, count: int = 6) -> str:
    return " | ".join(text.strip().splitlines()[-count:])


@contextlib.contextmanager
def started(*command: str, folder: Path, log: Path | None = None, **variables: str) -> Iterator[subprocess.Popen]:
    """A program in its own process group, gone with all its descendants at the end; its output goes to `log`."""
    log = log or folder.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_usual_signals,
        )
    try:
        yield process
    finally:
        members = family(process)
        kill(members)
        process.wait()


def _usual_signals() -> None:
    """As in a terminal, even if this program runs under nohup or in the background of a shell."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def wait_for(condition: Callable[[], object], seconds: float = 120.0, poll: float = 0.02) -> object:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := condition():
            return found
        time.sleep(poll)
    raise AssertionError(f"nothing happened within {seconds} s")


def stop_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
