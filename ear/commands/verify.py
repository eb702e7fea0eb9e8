"""Check that outputs, their records and dvc.lock agree (`ear verify`).

Reads every file of every output once. `--repair` deletes damaged files, in DVC's cache too, so that `dvc repro` makes
them again.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ear.config.parameters import PARAMETERS
from ear.display.progress import Progress
from ear.errors import UserError
from ear.files.atomic import remove
from ear.files.digests import code_digest, files_under, sha256
from ear.lineage.cache import cache_folder, listed_files, stored
from ear.lineage.declaration import Declaration, declarations, locked
from ear.lineage.record import Record, difference
from ear.runtime.cores import cores
from ear.runtime.versions import versions

_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Problem:
    """One disagreement; `damaged` is the file to make again, if it is one."""

    stage: str
    what: str
    damaged: Path | None = None


@dataclass(frozen=True)
class Digests:
    """SHA-256, as records have it, and MD5, as dvc.lock has it, of one file."""

    sha256: str
    md5: str


def run(*, repair: bool) -> tuple[list[str], bool]:
    """(lines that say what was found, whether all is well); `repair` deletes damaged files.

    Raises UserError outside a repository, or if dvc.lock lists no stage.
    """
    lock, declared = locked(), declarations()
    if not lock:
        raise UserError("dvc.lock lists no stage; run the pipeline first (`dvc repro`).")
    stages = [declared[name] for name in declared if name in lock]
    found = _digests(stages)
    records = {entry.stage: record for entry in stages if (record := _record(entry, lock[entry.stage], found))}
    problems = [problem for entry in stages for problem in _problems(entry, lock[entry.stage], records, found)]
    cache = _cache()
    problems += _damaged_lists(stages, lock, cache) if cache else ()
    lines = [f"{problem.stage}: {problem.what}" for problem in problems] + _notes(stages, records, lock)
    damaged = [problem.damaged for problem in problems if problem.damaged]
    if repair and damaged:
        deleted = _repair(damaged, lock, cache or cache_folder())
        lines.append(f"deleted {', '.join(map(str, deleted))}; `dvc repro` makes damaged outputs again")
    if not problems:
        lines.append(f"{len(stages)} stages and {len(found)} files agree with their records and with dvc.lock")
    return lines, not problems


def _record(entry: Declaration, locked_entry: Mapping[str, Any], found: Mapping[str, Digests]) -> Record | None:
    """The record of a stage; None if it is missing or damaged.

    It counts as damaged if it cannot be read, or if it is the only output that differs from dvc.lock.
    """
    if not entry.record.is_file() or _changed(locked_entry, found) == [entry.record.as_posix()]:
        return None
    try:
        return Record.read(entry.record)
    except UserError:
        return None


def _changed(locked_entry: Mapping[str, Any], found: Mapping[str, Digests]) -> list[str]:
    """The outputs that exist, but not as dvc.lock lists them."""
    outputs = {output["path"]: output["md5"] for output in locked_entry.get("outs", [])}
    return [path for path, md5 in outputs.items() if Path(path).exists() and _md5(path, found) != md5]


def _digests(stages: Iterable[Declaration]) -> dict[str, Digests]:
    """The digests of every file of every output, by path."""
    files = [file for entry in stages for output in entry.outputs for file in files_under(output)]
    found = {}
    with Progress("verifying", len(files), unit="file") as progress, ThreadPoolExecutor(cores()) as pool:
        for file, digests in zip(files, pool.map(_digest, files), strict=True):
            found[file.as_posix()] = digests
            progress.advance(1)
    return found


def _digest(path: Path) -> Digests:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    return Digests(sha256.hexdigest(), md5.hexdigest())


def _problems(
    entry: Declaration, locked_entry: Mapping[str, Any], records: Mapping[str, Record], found: Mapping[str, Digests]
) -> Iterator[Problem]:
    """Where one stage's outputs, record and entry in dvc.lock disagree."""
    if not entry.record.is_file():
        yield Problem(entry.stage, f"{entry.record} is missing; `dvc checkout {entry.stage}` brings it back")
        return
    record = records.get(entry.stage)
    if record is None:
        yield Problem(entry.stage, f"{entry.record} is damaged: not what the stage wrote", damaged=entry.record)
        return
    yield from _of_outputs(entry, record, found)
    for path in _changed(locked_entry, found):
        yield Problem(entry.stage, f"{path} is not what dvc.lock lists")
    parameters = locked_entry.get("params", {}).get(str(PARAMETERS), {})
    if differing := difference(record.parameters, parameters):
        yield Problem(entry.stage, f"parameters in dvc.lock differ from those that the stage used ({differing})")
    for name, digest in record.inputs.items():
        makers = [other for other in records.values() if name in other.outputs]
        if makers and makers[0].outputs[name] != digest:
            maker = makers[0].stage
            yield Problem(entry.stage, f"the {name} that it read differs from the one that stage {maker} last wrote")
        elif not makers and Path(name).is_file() and sha256(name) != digest:  # named by a parameter: no stage writes it
            fix = f"restore that file, or use this one with `dvc repro --single-item --force {entry.stage}`"
            yield Problem(entry.stage, f"{name} differs from the file that the stage read; {fix}")


def _of_outputs(entry: Declaration, record: Record, found: Mapping[str, Digests]) -> Iterator[Problem]:
    for name, digest in record.outputs.items():
        if name not in found:
            yield Problem(entry.stage, f"{name} is missing; `dvc checkout {entry.stage}` brings it back")
        elif found[name].sha256 != digest:
            yield Problem(entry.stage, f"{name} is damaged: not what the stage wrote", damaged=Path(name))
    own = {file.as_posix() for output in entry.outputs for file in files_under(output)}
    for name in sorted(own - record.outputs.keys() - {entry.record.as_posix()}):
        yield Problem(entry.stage, f"{name} was not written by the stage; move it elsewhere")


def _md5(path: str, found: Mapping[str, Digests]) -> str:
    """The MD5 of a file, or DVC's of a folder: that of the list of its files."""
    if path in found:
        return found[path].md5
    inside = sorted(
        (name.removeprefix(f"{path}/"), digests.md5) for name, digests in found.items() if name.startswith(f"{path}/")
    )
    listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in inside], sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _notes(stages: Iterable[Declaration], records: Mapping[str, Record], lock: Mapping[str, Any]) -> list[str]:
    """What is no disagreement but worth knowing: other libraries, and other code than dvc.lock says."""
    lines = []
    for entry in stages:
        stage, record = entry.stage, records.get(entry.stage)
        if record is None:
            continue
        if others := _other_code(entry, record, lock[stage]):
            lines.append(f"note: dvc.lock lists the current {', '.join(others)}, but {stage} ran with another version")
        if differing := difference(record.libraries, versions()):
            lines.append(f"note: {stage} ran with different library versions from those installed now ({differing})")
        if record.earlier_code:
            lines.append(f"note: {stage} was begun under other code or libraries and continued (runtime.other_code)")
    return lines


def _other_code(entry: Declaration, record: Record, locked_entry: Mapping[str, Any]) -> list[str]:
    """Code whose current version is in dvc.lock although the stage ran with another: edited before DVC hashed it."""
    listed = {item["path"]: item["md5"] for item in locked_entry.get("deps", [])}
    present = [path for path in entry.code if listed.get(path.as_posix()) == _md5_of_code(path)]
    return [path.as_posix() for path in present if record.code.get(path.as_posix()) != code_digest(path)]


def _md5_of_code(path: Path) -> str:
    """MD5 of a Python file or package as it is now, computed as DVC does."""
    found = {file.as_posix(): _digest(file) for file in files_under(path) if "__pycache__" not in file.parts}
    return _md5(path.as_posix(), found)


def _repair(damaged: Iterable[Path], lock: Mapping[str, Any], cache: Path) -> list[Path]:
    """Delete damaged files, and the objects of DVC's cache that are damaged too => the paths deleted."""
    damaged = list(damaged)
    deleted = [path for path in damaged if path.is_relative_to(cache)]  # lists, which must go before any is read
    for path in deleted:
        remove(path)
    objects = {path: digest for entry in lock.values() for path, digest in listed_files(entry, cache)}
    for path in (path for path in damaged if path not in deleted):
        digest = objects.get(path.as_posix(), "")
        copy = stored(digest, cache)
        if digest and copy.is_file() and _digest(copy).md5 != digest:
            remove(copy)
            deleted.append(copy)
        remove(path)
        deleted.append(path)
    return deleted


def _cache() -> Path | None:
    """The folder of DVC's cache; None without DVC, as in a copy of the results alone."""
    try:
        return cache_folder()
    except UserError:
        return None


def _damaged_lists(stages: Iterable[Declaration], lock: Mapping[str, Any], cache: Path) -> Iterator[Problem]:
    """The cache's lists of the files in a folder that are not what dvc.lock names."""
    for stage in (entry.stage for entry in stages):
        for output in lock[stage].get("outs", []):
            listing = stored(output["md5"], cache)
            if not output["md5"].endswith(".dir") or not listing.is_file():
                continue
            if _digest(listing).md5 != output["md5"].removesuffix(".dir"):
                fix = f"run `ear verify --repair`, then `dvc commit --force {stage}` to write it again"
                yield Problem(stage, f"DVC's list of the files in {output['path']} is damaged; {fix}", damaged=listing)
