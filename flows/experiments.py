"""DVC experiments in a copy of the workspace, which itself is not changed.

`dvc exp run --temp` makes a new copy each time, starting from the workspace's outputs. Here one copy is kept in
work/experiments: a killed experiment resumes inside its stage, and each experiment starts from the outputs of the run
that leaves it the least to do.
"""

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from ear.files.atomic import whole_file, whole_folder
from flows import overrides, repository
from flows.repository import BusyError, RepositoryError

COPY = Path("work/experiments")
LOCK, PARAMETERS = "dvc.lock", "params.yaml"


def experiment_name(values: Mapping[str, Any], prefix: str) -> str:
    """A readable name that git accepts: sweep-score.name=kernel-sample.guidance=2.0; just `prefix` for no change."""
    return "-".join([prefix, *(f"{key}={quote(str(value), safe='')}" for key, value in values.items())])


def run(name: str, values: Mapping[str, Any], *, line: Callable[[str], None]) -> None:
    """Run the pipeline as the DVC experiment `name` with {"section.key": value} changed.

    The copy holds the files that git tracks, with uncommitted edits, and new files that it does not ignore; outputs
    come from DVC's cache. An experiment of this name on the same commit is replaced. Raises UserError for a wrong
    value, RepositoryError, BusyError.
    """
    parameters = overrides.check(PARAMETERS, values)
    with _alone():
        _bring_up(nearest(parameters))
        overrides.apply(COPY / PARAMETERS, values)
        if name in _names(COPY):
            repository.act("exp", "remove", name, line=line, folder=COPY)
        repository.act("exp", "run", "--name", name, line=line, folder=COPY)
        _git("fetch", "--quiet", str(COPY), f"+{_refs()}*:{_refs()}*")


def nearest(parameters: Mapping) -> dict[str, str]:
    """The known outputs that leave the least to run for `parameters`, as far as git tracks them: path => text.

    Known are the outputs of the workspace, of a killed experiment in the copy, and of the experiments of this commit.
    """
    known = [_results_in(Path()), _results_in(COPY), *map(_results_of, _names())]
    return max(known, key=lambda files: len(up_to_date(_stages(files.get(LOCK, "")), parameters)))


def is_complete(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the experiment `name` of this commit exists and was made with {"section.key": value}."""
    if name not in _names():
        return False
    lock = _stages(read(name, LOCK))
    return up_to_date(lock, overrides.check(PARAMETERS, values)) == set(lock)


def up_to_date(lock: Mapping[str, Mapping], parameters: Mapping) -> set[str]:
    """Stages that would not run again; `lock` maps stages to deps, params and outs, as in dvc.lock."""
    stale = {name for name, stage in lock.items() if not _made_with(stage, parameters)}
    while True:
        changed = [output["path"] for name in stale for output in lock[name].get("outs", [])]
        below = {
            name
            for name in lock.keys() - stale
            if any(_overlap(dep["path"], path) for dep in lock[name].get("deps", []) for path in changed)
        }
        if not below:
            return lock.keys() - stale
        stale |= below


def _made_with(stage: Mapping, parameters: Mapping) -> bool:
    recorded = stage.get("params", {}).get(PARAMETERS, {})
    return all(_value(parameters, key) == value for key, value in recorded.items())


def _overlap(path: str, other: str) -> bool:
    """Whether one path equals the other or contains it."""
    return path == other or path.startswith(f"{other}/") or other.startswith(f"{path}/")


def read(name: str, path: str) -> str:
    """The text of a file that git tracks, in the experiment `name`. Raises RepositoryError."""
    return _git("show", f"{_refs()}{name}:{path}")


def fetch(name: str, path: str, target: Path) -> None:
    """Copy an output of the experiment `name` from DVC's cache. Raises RepositoryError."""
    revision = _git("rev-parse", f"{_refs()}{name}").strip()
    with tempfile.TemporaryDirectory() as folder, whole_file(target) as partial:
        fetched = Path(folder) / "output"
        repository.ask("get", ".", path, "--rev", revision, "--out", str(fetched))
        shutil.copyfile(fetched, partial)  # DVC may have hard-linked its cached file there


def metrics(name: str) -> dict[str, dict]:
    """Metrics file (JSON) => its content, in the experiment `name`. Raises RepositoryError."""
    return {path: json.loads(text) for path, text in _results_of(name).items() if path.endswith(".json")}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the copy; raises BusyError if another process holds it."""
    COPY.parent.mkdir(exist_ok=True)
    try:
        with FileLock(COPY.with_suffix(".lock"), blocking=False):
            yield
    except Timeout as error:
        raise BusyError(f"another sweep or comparison is running in {COPY}; wait until it ends.") from error


def _bring_up(results: Mapping[str, str]) -> None:
    """Bring the copy to the state of the workspace, with these `results` of earlier stages."""
    if not COPY.is_dir():
        _create()
    _git("fetch", "--quiet", "--prune", str(Path.cwd()), "HEAD", f"+{_refs()}*:{_refs()}*", folder=COPY)
    _git("checkout", "--quiet", "--force", "--detach", head(), folder=COPY)
    _git("clean", "--quiet", "--force", "-d", folder=COPY)
    for path in edited():
        (COPY / path).unlink(missing_ok=True)
        if Path(path).is_file():
            (COPY / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, COPY / path)
    for path, text in results.items():
        (COPY / path).parent.mkdir(parents=True, exist_ok=True)
        (COPY / path).write_text(text)


def _create() -> None:
    """Clone the repository; both share one DVC cache."""
    with whole_folder(COPY) as partial:
        _git("clone", "--quiet", ".", str(partial))
        if Path(".dvc/config.local").is_file():
            shutil.copy2(".dvc/config.local", partial / ".dvc/config.local")
        cache = Path(repository.ask("cache", "dir").strip()).resolve()
        repository.ask("config", "--local", "cache.dir", str(cache), folder=partial)


def edited() -> list[str]:
    """Files that differ from the last commit, deleted ones included, and new files that git does not ignore."""
    listed = _git("diff", "--name-only", "-z", "HEAD") + _git("ls-files", "-z", "--others", "--exclude-standard")
    return [path for path in listed.split("\0") if path]


def _results_in(folder: Path) -> dict[str, str]:
    """dvc.lock and the metrics files in `folder`: path => text; empty without a dvc.lock."""
    if not (folder / LOCK).is_file():
        return {}
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=folder).split("\0")
    kept = _kept((folder / LOCK).read_text(), listed)
    return {path: (folder / path).read_text() for path in kept if (folder / path).is_file()}


def _results_of(name: str) -> dict[str, str]:
    """dvc.lock and the metrics files of the experiment `name`: path => text."""
    listed = _git("ls-tree", "-r", "--name-only", "-z", f"{_refs()}{name}").split("\0")
    return {path: read(name, path) for path in _kept(read(name, LOCK), listed)}


def _kept(lock: str, paths: Iterable[str]) -> list[str]:
    """dvc.lock and those of `paths` that it lists as outputs; all other outputs are in DVC's cache."""
    outputs = {output["path"] for stage in _stages(lock).values() for output in stage.get("outs", [])}
    return [LOCK, *(path for path in paths if path in outputs)]


def _stages(lock: str) -> dict[str, dict]:
    return (YAML(typ="safe", pure=True).load(lock) or {}).get("stages", {})


def _names(folder: Path = Path()) -> list[str]:
    """The experiments of the current commit."""
    listed = _git("for-each-ref", "--format=%(refname)", _refs(), folder=folder)
    return [reference.removeprefix(_refs()) for reference in listed.split()]


def _refs() -> str:
    """Where DVC keeps the experiments of the current commit."""
    commit = head()
    return f"refs/exps/{commit[:2]}/{commit[2:]}/"


def head() -> str:
    """The current commit."""
    return _git("rev-parse", "HEAD").strip()


def _git(*arguments: str, folder: Path = Path()) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RepositoryError(f"git {arguments[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _value(parameters: Mapping, key: str) -> Any:
    """The value of "section.key" or of a section; None if absent."""
    value: Any = parameters
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
