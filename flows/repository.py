"""What DVC knows and does: the graph of stages, what is out of date and why, runs, metrics. Independent of Prefect."""

import contextlib
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

from ear.errors import MissingFileError, UserError
from ear.files.atomic import whole_file
from ear.lineage.cache import cached_outputs
from ear.lineage.declaration import locked
from flows import command

# Without --wait-for-lock, a stage that has finished is reported as failed if another DVC process holds the lock.
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
_LINES_KEPT = 200
# Lines after a stage's own error.
_NO_REASON = ("ERROR: failed to reproduce", "(details: ", "(earlier outputs: ")
_BUSY_SECONDS = 2.0  # between two tries while another DVC process is in the way
# DVC's advice about git after every run; noise in a flow's log.
_ADVICE = (
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    "To apply the results of an experiment",
    "WARNING: No file hash info found for",  # an output that was never produced
    "\tdvc exp apply",
)


CODE = ("ear", "stages")  # folders of packages, on which stages depend


class RepositoryError(RuntimeError):
    """DVC or git refused or failed; the message is its last error line."""


class BusyError(RepositoryError):
    """Another DVC process works on the same files; trying again helps."""


def environment() -> dict[str, str]:
    """The environment for DVC: `python` in its stages is this Python, unbuffered."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def ask(*arguments: str, folder: Path = Path()) -> str:
    """The standard output of a short DVC command in `folder`, once no other DVC process is in its way.

    Raises RepositoryError.
    """
    while True:
        done = subprocess.run([*DVC, *arguments], capture_output=True, text=True, env=environment(), cwd=folder)
        if not done.returncode:
            return done.stdout
        error = failure(done.stderr.splitlines())
        if not _retry_can_help(error, folder):
            raise error


def act(
    *arguments: str,
    line: Callable[[str], None],
    folder: Path = Path(),
    variables: Mapping[str, str] | None = None,
    stopped: threading.Event | None = None,
) -> None:
    """Run a DVC command in `folder` and pass each line of its output to `line` immediately.

    The command is retried as long as another DVC process works on the same files, even for days: trainings are long.
    `variables`: environment variables to add. Raises RepositoryError; StoppedError if `stopped` is set before a try
    begins.
    """
    settings = {**environment(), **(variables or {})}
    said = ""
    while True:
        kept: deque[str] = deque(maxlen=_LINES_KEPT)

        def keep(text: str, kept: deque[str] = kept) -> None:
            if text and not text.startswith(_ADVICE):
                kept.append(text)
                line(text)

        if not command.stream([*DVC, *arguments], line=keep, environment=settings, folder=folder, stopped=stopped):
            return
        error = failure(kept)
        if not _retry_can_help(error, folder):
            raise error
        if not said:
            said = f"tried again: {error}"
            line(said)


def _retry_can_help(error: RepositoryError, folder: Path) -> bool:
    """Wait for a busy repository, or delete a lock file that a killed DVC left half-written; False for other errors."""
    if isinstance(error, BusyError):
        time.sleep(_BUSY_SECONDS)
        return True
    lock = folder / ".dvc/tmp/rwlock"
    if "Unable to read RWLock-file" in str(error) and lock.is_file():
        lock.unlink()
        return True
    return False


def failure(lines: Iterable[str]) -> RepositoryError:
    """The error behind DVC's output: the last line of the failed program if it ran, or else DVC's last error line."""
    lines = [text.strip() for text in lines if text.strip()]
    errors = [text.removeprefix("ERROR: ") for text in lines if text.startswith("ERROR: ")]
    said = errors[-1] if errors else (lines or ["DVC failed and said nothing"])[-1]
    if "is busy, it is being blocked by" in said or "Unable to acquire lock" in said:
        return BusyError(said)
    if "failed to run: " in said:
        starts = [i for i, text in enumerate(lines) if text.startswith("> ")]
        own = lines[starts[-1] + 1 :] if starts else lines
        own = [text for text in own if not text.startswith(_NO_REASON)]
        said = own[-1] if own else said
    return RepositoryError(said)


def graph() -> dict[str, set[str]]:
    """Every stage of dvc.yaml => the stages it directly needs, in an order in which they can run.

    Raises MissingFileError outside the repository's root, RepositoryError if DVC cannot read dvc.yaml.
    """
    if not Path("dvc.yaml").is_file():
        raise MissingFileError(f"dvc.yaml is not in {Path.cwd()}; run the flow from the repository's root.")
    drawn = ask("dag", "--dot")
    nodes = re.findall(r'^"([^"]+)";$', drawn, re.MULTILINE)
    # .dvc files are nodes, too, and so are the stages of other folders: FOLDER/dvc.yaml:NAME.
    upstream: dict[str, set[str]] = {name: set() for name in nodes if not name.endswith(".dvc") and ":" not in name}
    for before, after in re.findall(r'"([^"]+)" -> "([^"]+)"', drawn):
        if before in upstream and after in upstream:
            upstream[after].add(before)
    return {name: upstream[name] for name in TopologicalSorter(upstream).static_order()}


def known(names: Iterable[str], stages: Iterable[str]) -> list[str]:
    """Return `names` if all are among `stages`; raises UserError naming the first that is not."""
    names, stages = list(names), list(stages)
    for name in names:
        if name not in stages:
            near = difflib.get_close_matches(name, stages, n=1)
            hint = f"did you mean {near[0]}?" if near else f"stages here: {', '.join(stages)}."
            raise UserError(f"{name!r} is not a stage that would run; {hint}")
    return names


def with_upstream(graph: dict[str, set[str]], names: Iterable[str]) -> list[str]:
    """`names` and all stages that they need, in the order of `graph`."""
    wanted: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending.extend(graph[name])
    return [name for name in graph if name in wanted]


def with_downstream(graph: dict[str, set[str]], names: Iterable[str]) -> set[str]:
    """`names` and all stages that need one of them."""
    wanted = set(names)
    for name, upstream in graph.items():  # in an order in which they can run
        if upstream & wanted:
            wanted.add(name)
    return wanted


def changes(*names: str) -> dict[str, str]:
    """Stage => why it is out of date, for those that are; of all stages, or only of `names`. Raises as `ask` does."""
    return {name: reason(entries) for name, entries in json.loads(ask("status", "--json", *names) or "{}").items()}


def reason(entries: list) -> str:
    """One phrase from DVC's status of a stage, such as `parameters: sample modified; code: ear/training modified`."""
    said: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, str):  # "changed command", "always changed"
            said.setdefault(entry, [])
            continue
        for kind, paths in entry.items():
            for path, change in paths.items():
                group, text = _change(kind, path, change)
                said.setdefault(group, []).append(text)
    return "; ".join(f"{group}: {', '.join(texts)}" if texts else group for group, texts in said.items())


def _change(kind: str, path: str, change: str | dict) -> tuple[str, str]:
    if isinstance(change, dict):
        return "parameters", ", ".join(f"{key} {how}" for key, how in change.items())
    if Path(path).name == "params.yaml":
        return "parameters", f"{path} {change}"
    if kind == "changed outs":
        return "outputs", f"{path} {change}"
    return ("code" if path.endswith(".py") or Path(path).parts[0] in CODE else "inputs"), f"{path} {change}"


def reproduce(name: str, *, force: bool, line: Callable[[str], None], variables: Mapping[str, str]) -> str:
    """Bring one stage up to date without checking its upstream => `ran`, `restored` (run cache) or `up to date`.

    Raises RepositoryError with the stage's last error line.
    """
    outcome = "up to date"

    def watch(text: str) -> None:
        nonlocal outcome
        if text.startswith(f"Running stage '{name}'"):
            outcome = "ran"
        elif text.startswith(f"Stage '{name}' is cached - skipping run"):
            outcome = "restored"
        line(text)

    act("repro", "--single-item", *(["--force"] if force else []), name, line=watch, variables=variables)
    return outcome


def metrics() -> dict[str, dict]:
    """Metrics file => its content, for the files that exist. Raises RepositoryError."""
    shown = json.loads(ask("metrics", "show", "--json") or "{}")
    files = shown.get("", {}).get("data", {})
    return {path: entry["data"] for path, entry in files.items() if isinstance(entry.get("data"), dict)}


def restore(name: str) -> list[str]:
    """Bring back the outputs that dvc.lock lists of a stage, as far as DVC's cache has them => those restored.

    DVC deletes a stage's outputs before it runs. Large ones return by checkout; metrics, which git keeps, lie in DVC's
    cache too, for its run cache.
    """
    lost = [Path(entry["path"]) for entry in locked().get(name, {}).get("outs", [])]
    lost = [path for path in lost if not path.exists()]
    if not lost:
        return []
    with contextlib.suppress(RepositoryError):  # an output that is in no cache does not keep the others from returning
        ask("checkout", name)
    cached = cached_outputs(name)
    for path in lost:
        if not path.exists() and path.as_posix() in cached:
            with whole_file(path) as partial:
                shutil.copyfile(cached[path.as_posix()], partial)
    return [str(path) for path in lost if path.exists()]
