"""DVC experiments in copies of the workspace, which itself is not changed.

DVC has its own copies (`dvc exp run --temp`, `--queue`). Those lack the inputs that git ignores and the unfinished work
of killed runs, and their workers are daemons, which outlive a cancelled flow. Here each device has one copy, in
work/experiments: it sees the inputs, shares the workspace's folder of unfinished work and its DVC cache, and runs
`dvc exp run`. What ran before comes from DVC's run cache.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ear import config
from ear.config import edit
from ear.config.parameters import PARAMETERS
from ear.errors import UserError
from ear.files.atomic import whole_file, whole_folder
from ear.files.reading import reading
from ear.lineage.declaration import declarations, stages_of
from ear.lineage.run import SHARED_WORK, WORK, clear_finished
from flows import command, repository
from flows.command import StoppedError
from flows.devices import environment, hold, needed
from flows.repository import RepositoryError

COPIES = Path("work/experiments")
LOCK = "dvc.lock"
_POLL_SECONDS = 1.0
_LONGEST_NAME = 200  # of an experiment; git keeps each as a file, of at most 255 bytes


def experiment_name(values: Mapping[str, Any], prefix: str) -> str:
    """A readable name that git accepts: sweep-score.name=kernel-sample.guidance=2.0; just `prefix` for no change.

    A long one, which no file could be named after, ends in a digest.
    """
    name = "-".join([prefix, *(f"{key}={_quoted(value)}" for key, value in values.items())])
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - len(digest) - 1].rstrip('.%')}-{digest}"


def _quoted(value: Any) -> str:
    """A value without what git refuses in names: ~, .., .lock or a dot at the end."""
    return re.sub(r"\.(?!\d)", "%2E", quote(str(value), safe="").replace("~", "%7E"))


@dataclass(frozen=True)
class Snapshot:
    """The workspace at one moment: its HEAD commit, and a git tree that includes uncommitted edits.

    DVC stores experiments under a commit, so all experiments of a snapshot stay under its commit, whatever is
    committed in the workspace meanwhile.
    """

    commit: str
    tree: str

    @property
    def references(self) -> str:
        """Where DVC keeps the experiments of the commit."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/"

    def text(self, path: str) -> str:
        """The text of a file of the tree. Raises RepositoryError."""
        return _git("show", f"{self.tree}:{path}")

    def parameters(self, values: Mapping[str, Any]) -> config.Parameters:
        """Those of its params.yaml with {"section.key": value} changed. Raises UserError and RepositoryError."""
        return edit.check_text(self.text(str(PARAMETERS)), values)


def take_snapshot() -> Snapshot:
    """The workspace as it is, with new files that git does not ignore, but for the inputs that params.yaml names.

    Nothing in the workspace, its index or its branches changes. Raises RepositoryError.
    """
    inputs = {path.absolute() for path in config.named_paths(config.load(PARAMETERS)).values()} - {Path.cwd()}
    inside = [path.relative_to(Path.cwd()) for path in sorted(inputs) if path.is_relative_to(Path.cwd())]
    excluded = [f":(exclude,literal){path}" for path in inside if not _ignored(path)]  # `git add` fails on the others
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git("read-tree", "HEAD", variables=index)
        _git("add", "--all", "--", ".", *excluded, variables=index)
        return Snapshot(_git("rev-parse", "HEAD").strip(), _git("write-tree", variables=index).strip())


def run(
    name: str,
    values: Mapping[str, Any],
    *,
    snapshot: Snapshot,
    among: list[str],
    line: Callable[[str], None],
    stopped: threading.Event | None = None,
) -> None:
    """Run the pipeline of the snapshot as the DVC experiment `name` with {"section.key": value} changed.

    It waits for as many of the devices `among` as it needs. An experiment of this name on its commit is replaced.
    Raises UserError for a wrong value, RepositoryError, and StoppedError if `stopped` is set before it has begun.
    """
    parameters = snapshot.parameters(values)
    with hold(needed(parameters, among), among, line, stopped) as held:
        copy = COPIES / held[0]
        _wait_for_others(copy, line, stopped)
        _bring_up(copy, snapshot)
        _show_inputs(copy, parameters)
        edit.apply(copy / PARAMETERS, values)
        if name in _names(snapshot, copy):
            repository.act("exp", "remove", name, line=line, folder=copy)
        shared = {SHARED_WORK: str(Path.cwd() / WORK), **environment(held)}
        repository.act("exp", "run", "--name", name, line=line, folder=copy, variables=shared, stopped=stopped)
        clear_finished(declarations().values(), copy)
        reference = f"{snapshot.references}{name}"
        _git("fetch", "--quiet", str(copy), f"+{reference}:{reference}")


def read(snapshot: Snapshot, name: str, path: str) -> str:
    """The text of a file that git tracks, in the experiment `name` of the snapshot. Raises RepositoryError."""
    return _git("show", f"{snapshot.references}{name}:{path}")


def fetch(snapshot: Snapshot, name: str, path: str, target: Path) -> None:
    """Copy an output of the experiment `name` of the snapshot from DVC's cache. Raises RepositoryError."""
    revision = _git("rev-parse", f"{snapshot.references}{name}").strip()
    with tempfile.TemporaryDirectory() as folder, whole_file(target) as partial:
        fetched = Path(folder) / "output"
        repository.ask("get", ".", path, "--rev", revision, "--out", str(fetched))
        shutil.copyfile(fetched, partial)  # DVC may have hard-linked its cached file there


def metrics(snapshot: Snapshot, name: str) -> dict[str, dict]:
    """Metrics file => its content, in the experiment `name` of the snapshot. Raises RepositoryError."""
    lock = read(snapshot, name, LOCK)
    with reading(f"{LOCK} of experiment {name}", "list of stages", f"remove it with `dvc exp remove {name}`"):
        stages = stages_of(lock)
    outputs = {output["path"] for stage in stages.values() for output in stage.get("outs", [])}
    tracked = _git("ls-tree", "-r", "--name-only", "-z", f"{snapshot.references}{name}").split("\0")
    paths = [path for path in tracked if path in outputs and path.endswith(".json")]
    return {path: json.loads(read(snapshot, name, path)) for path in paths}


def _wait_for_others(copy: Path, line: Callable[[str], None], stopped: threading.Event | None) -> None:
    """Wait until no Python process works in the copy: processes of a killed flow outlive it.

    Raises StoppedError once `stopped` is set.
    """
    place, stopped, said = copy.absolute(), stopped or threading.Event(), False
    while others := [pid for pid, folder in command.programs() if folder.is_relative_to(place)]:
        if not said:
            line(f"process {others[0]}, perhaps of a killed flow, works in {copy}; this run starts when it ends")
            said = True
        if stopped.wait(_POLL_SECONDS):
            raise StoppedError("stopped before it began")


def _bring_up(copy: Path, snapshot: Snapshot) -> None:
    """Bring the copy to the snapshot, on its commit, whose objects it shares with the workspace."""
    if not copy.is_dir():
        _create(copy)
    references = f"{snapshot.references}*"
    _git("fetch", "--quiet", "--prune", str(Path.cwd()), f"+{references}:{references}", folder=copy)
    _git("checkout", "--quiet", "--force", "--detach", snapshot.commit, folder=copy)
    _git("read-tree", "--reset", "-u", snapshot.tree, folder=copy)
    _git("clean", "--quiet", "--force", "-d", folder=copy)


def _create(copy: Path) -> None:
    """Clone the repository; both share one DVC cache, and the clone reads the objects of this one's git."""
    with whole_folder(copy) as partial:
        _git("clone", "--quiet", "--shared", ".", str(partial))
        if Path(".dvc/config.local").is_file():
            shutil.copy2(".dvc/config.local", partial / ".dvc/config.local")
        cache = Path(repository.ask("cache", "dir").strip()).resolve()
        repository.ask("config", "--local", "cache.dir", str(cache), folder=partial)


def _show_inputs(copy: Path, parameters: config.Parameters) -> None:
    """Link input files named by the parameters into the copy if they are missing there, since git ignores them."""
    for key, path in config.named_paths(parameters).items():
        inside = copy / path
        if path.is_absolute() or inside.exists():
            continue
        if ".." in path.parts:
            raise UserError(
                f"{key} is {str(path)!r}, outside the repository, but experiments run in a copy in another folder; "
                "give an absolute path."
            )
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.unlink(missing_ok=True)
        inside.symlink_to(path.absolute())


def edited() -> list[str]:
    """Files that differ from the last commit, deleted ones included, and new files that git does not ignore."""
    listed = _git("diff", "--name-only", "-z", "HEAD") + _git("ls-files", "-z", "--others", "--exclude-standard")
    return [path for path in listed.split("\0") if path]


def _names(snapshot: Snapshot, folder: Path) -> list[str]:
    """The experiments of the snapshot's commit."""
    listed = _git("for-each-ref", "--format=%(refname)", snapshot.references, folder=folder)
    return [reference.removeprefix(snapshot.references) for reference in listed.split()]


def _ignored(path: Path) -> bool:
    return subprocess.run(["git", "check-ignore", "--quiet", "--", path], check=False).returncode == 0


def _git(*arguments: str, folder: Path = Path(), variables: Mapping[str, str] | None = None) -> str:
    settings = {**os.environ, **(variables or {})}
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, env=settings)
    if done.returncode:
        raise RepositoryError(f"git {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout
