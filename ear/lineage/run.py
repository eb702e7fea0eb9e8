"""One run of a stage: exclusive, resumable, published only if parameters, code and inputs stayed the same.

work/STAGE/KEY keeps unfinished work; KEY is a digest of the parameters and inputs that the work depends on. It survives
a kill, edits of the code and other parameters, and is deleted once the stage has succeeded and dvc.lock lists its
outputs (or before, if runtime.other_code is restart). Copies of the repository, such as those of experiments, can share
the folder `work`: the environment variable EAR_WORK names it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ear.errors import UserError
from ear.files.atomic import remove, remove_unfinished, replace
from ear.files.digests import code_digest, files_under, sha256
from ear.files.json_files import read_json, write_json
from ear.lineage.cache import cached_outputs
from ear.lineage.declaration import Declaration, declarations, locked
from ear.lineage.digests import Inputs, file_digests
from ear.lineage.record import Record, difference, published
from ear.runtime import distributed
from ear.runtime.versions import versions

WORK = Path("work")  # of this copy of the repository
SHARED_WORK = "EAR_WORK"  # environment variable: the folder for unfinished work; default: WORK
_PROGRESS_FORMAT = 2  # of what stages keep in their scratch folders; other formats are not continued
_CODE, _DONE = ".code.json", ".published.json"  # notes beside work/STAGE/KEY: its code, and the record published
_LOCK, _OUTPUTS, _KEPT = "lock", "outputs", "kept"
_TURN_SECONDS = 60.0  # that ranks wait at a time for a folder of work; collectives end after two hours
Values = Mapping[str, Any]


class Run:
    """A stage at work. Rank 0 holds its lock, notes what it depends on and publishes; other ranks only share scratch.

    Raises UserError if the stage runs already, or an output is a symbolic link that leads out of DVC's cache.
    """

    def __init__(
        self,
        stage: str,
        values: Callable[[], Values],  # the parameters of the stage as params.yaml has them now
        *,
        began: Values | None = None,  # those that the caller works with; default: as they are now
        other_code: str = "refuse",  # for work begun under other code or libraries: refuse, continue or restart
        files: Iterable[Path] = (),  # that parameters name: inputs which DVC does not track
        unread: str = "",  # pattern of input files that the stage does not read, such as data/prepared/train-*
    ):
        declared = declarations()
        self.declared, self.other_code = declared[stage], other_code
        self._values, self._began = values, values() if began is None else began
        self._earlier_code: tuple[Values, ...] = ()
        self._scratch: Path | None = None
        self._computed: dict[str, str] = {}
        self._elsewhere: dict[str, str] = {}  # name => SHA-256 of inputs that nothing declares
        self._leaving = contextlib.ExitStack()
        if not distributed.is_main():
            return
        check_links(self.declared.outputs)
        self._leaving.enter_context(_alone(stage))
        clear_finished(declared.values())
        remove(self._staging)  # of a killed run
        self._leaving.callback(remove, self._staging)
        self._code = self._code_now()
        inputs = Inputs([*self.declared.inputs, *files], *published(self._makers(declared)), unread=unread)
        self._leaving.callback(inputs.close)
        self._inputs = inputs

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def _makers(self, declared: Mapping[str, Declaration]) -> list[Declaration]:
        """The stages that wrote its inputs; a damaged record of any other must not stop it."""
        return [
            entry
            for entry in declared.values()
            if any(
                made.is_relative_to(read) or read.is_relative_to(made)
                for made in entry.outputs
                for read in self.declared.inputs
            )
        ]

    @property
    def _staging(self) -> Path:
        return WORK / self.declared.stage / _OUTPUTS

    def output(self, path: str | Path) -> Path:
        """Where to write the declared output `path`, or a folder of outputs; `publish` moves it into place."""
        place = self._staging / path
        if distributed.is_main():
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def scratch(self, key: Any, inputs: Iterable[str | Path] = ()) -> Path:
        """The folder for unfinished work that depends on `key` and `inputs`; all ranks share it.

        key: plain values. inputs: files that identify the inputs, such as an index with digests. The record names those
        from outside the repository, too, such as weights in torch's cache.
        Raises UserError if the folder holds work begun under other code or libraries and the user has not said what to
        do with it.
        """
        folder = distributed.from_main(lambda: self._scratch_folder(key, inputs))
        held = distributed.from_main(lambda: self._hold(folder, 0.0))
        if not held and distributed.is_main():
            print(f"another copy of the repository works in {folder}; waiting until it ends", flush=True)
        while not held:
            held = distributed.from_main(lambda: self._hold(folder, _TURN_SECONDS))
        distributed.from_main(lambda: self._open_scratch(folder))
        self._scratch = folder
        return folder

    def _scratch_folder(self, key: Any, inputs: Iterable[str | Path]) -> Path:
        digest = hashlib.sha256(json.dumps([_PROGRESS_FORMAT, key], sort_keys=True).encode())
        for path in inputs:
            digest.update((found := sha256(path)).encode())
            if not self._inputs.expected(Path(path).as_posix()):
                self._elsewhere[Path(path).name] = found
        folder = unfinished(self.declared.stage) / digest.hexdigest()[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _hold(self, folder: Path, seconds: float) -> bool:
        """Whether this run holds the scratch folder; waits up to `seconds` for another copy to release it."""
        lock = _lock_of(folder)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=seconds)
            self._leaving.callback(lock.release)
        return lock.is_locked

    def _open_scratch(self, folder: Path) -> None:
        """Continue, restart or refuse the work in a folder that this run holds, and note the present code beside it."""
        self._mention_others(folder)
        note = _beside(folder, _CODE)
        if note.is_file():
            self._resume(folder, read_json(note))
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, _kept(folder)):
            remove_unfinished(path)
        _beside(folder, _DONE).unlink(missing_ok=True)
        self._note_code(folder)

    def _note_code(self, folder: Path) -> None:
        """Write down the code and libraries under which the work in `folder` was begun and is continued."""
        note = {"code": [*self._earlier_code, self._code], "libraries": versions()}
        write_json(_beside(folder, _CODE), note)

    @property
    def kept(self) -> Path:
        """A folder for what outlives the work in `scratch`: nothing but the user deletes it."""
        assert self._scratch is not None
        return _kept(self._scratch)

    def shorter(self, key: str, output: str) -> tuple[Path | None, str]:
        """Find an earlier result that this run can extend: one that differs only by a smaller `key`.

        key: a number in params.yaml, such as train.images. The result is the one that dvc.lock lists. Returns (its file
        `output` in DVC's cache, ""), or (None, reason); the reason is empty if there is no result, or if its parameters
        do not fit. A result of mixed code or libraries is never extended.
        """
        try:
            cached = cached_outputs(self.declared.stage)
        except UserError as error:  # no DVC here, or a damaged cache
            return None, str(error)
        note, made = cached.get(self.declared.record.as_posix()), cached.get(output)
        if note is None or made is None:
            return None, ""
        record = Record.read(note)
        section, _, name = key.partition(".")
        before, now = (dict(values[section]) for values in (record.parameters, self._began))
        fewer, rest = before.pop(name) < now.pop(name), {section: None}
        if not fewer or before != now or {**record.parameters, **rest} != {**self._began, **rest}:
            return None, ""
        if record.earlier_code:
            return None, "it was begun under other code or libraries than it ended with"
        inputs = {file: digest for file in record.inputs if (digest := self._inputs.expected(file))}
        for what, old, new in (
            ("code", record.code, self._code),
            ("libraries", record.libraries, versions()),
            ("inputs", record.inputs, inputs),
        ):
            if changed := difference(old, new):
                return None, f"other {what} ({changed.partition(':')[0]})"
        if sha256(made) != record.outputs[output]:
            return None, f"its {output} is damaged"
        return made, ""

    def _mention_others(self, folder: Path) -> None:
        """Print where unfinished work lies that this run does not continue, so that the user can delete it."""
        others = sorted(
            path
            for path in folder.parent.iterdir()
            if _is_key(path) and path != folder and not _beside(path, _DONE).is_file() and not _in_use(path)
        )
        if others:
            names = ", ".join(map(str, others))
            print(
                f"note: unfinished work of other parameters or inputs ({sum(map(_size, others)) / 1e9:.2f} GB) is kept "
                f"in {names}; delete what you will not continue",
                flush=True,
            )

    def _resume(self, folder: Path, note: Mapping[str, Any]) -> None:
        """Continue, restart or refuse the work in `folder`; `note` has the code and libraries it was begun with."""
        codes, now = list(note["code"]), versions()
        libraries = {name: version for name, version in note.get("libraries", now).items() if now.get(name) != version}
        changed = [path for path, digest in self._code.items() if codes[-1].get(path) != digest]
        changed += [f"{name} (was {version})" for name, version in libraries.items()]
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not changed:
            self._earlier_code = tuple(codes[:-1])
        elif self.other_code == "continue":
            self._earlier_code = (*codes[:-1], {**codes[-1], **libraries})
        elif self.other_code == "restart":
            shutil.rmtree(folder)
        else:
            raise UserError(
                f"{folder} holds work of an earlier run, and {', '.join(changed)} changed since; set "
                "runtime.other_code to continue, which mixes old and new (data/lineage records it), or to restart."
            )

    def computed(self, folder: str, shards: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """Take over the digests of shards in the output `folder`, computed as they were written.

        shards: {split: [{"file": name, "sha256": digest, ...}]}.
        """
        self._computed |= {f"{folder}/{shard['file']}": shard["sha256"] for part in shards.values() for shard in part}

    def check(self) -> None:
        """Compare inputs hashed so far with the records of their stages; raises UserError if one is damaged."""
        if distributed.is_main():
            self._inputs.check()

    def publish(self) -> None:
        """Move the outputs into place, if parameters, code and inputs are still those that the run began with.

        Raises UserError naming what changed, with nothing published and the scratch folder kept; RuntimeError if the
        stage has not written an output that it declares.
        """
        if not distributed.is_main():
            return
        made = [path for path in self.declared.outputs if path != self.declared.record]
        absent = [str(path) for path in made if not self.output(path).exists()]
        if absent:
            raise RuntimeError(f"the {self.declared.stage} stage has not written {', '.join(absent)}")
        inputs, outputs = self._inputs.digests() | self._elsewhere, self._output_digests(made)
        record = Record(
            self.declared.stage, self._began, self._code, versions(), inputs, outputs, earlier_code=self._earlier_code
        )
        record.write(self.output(self.declared.record))
        self._check_unchanged()  # last: digests of large outputs take minutes
        if self._scratch:
            write_json(_beside(self._scratch, _DONE), {"md5": _md5(self.output(self.declared.record))})
        for path in [*made, self.declared.record]:
            replace(self.output(path), path)

    def _output_digests(self, made: Iterable[Path]) -> dict[str, str]:
        """SHA-256 of every output file; those that are known already are not read again."""
        files = [file.relative_to(self._staging) for path in made for file in files_under(self.output(path))]
        unknown = [self.output(file) for file in files if file.as_posix() not in self._computed]
        found = {Path(name).relative_to(self._staging).as_posix(): d for name, d in file_digests(unknown).items()}
        return {file.as_posix(): self._computed.get(file.as_posix()) or found[file.as_posix()] for file in files}

    def _check_unchanged(self) -> None:
        try:
            now = self._values()
        except UserError as error:
            raise UserError(f"params.yaml changed while the stage ran, and is invalid now: {error}") from error
        changed = difference(self._began, now) or ", ".join(
            path for path, digest in self._code_now().items() if self._code[path] != digest
        )
        if changed:
            raise UserError(
                f"params.yaml or code changed while the stage ran ({changed}), so its results were not published; "
                "its progress is kept. Undo the change to publish them, or run again to use the new values."
            )

    def _code_now(self) -> dict[str, str]:
        return {path.as_posix(): code_digest(path) for path in self.declared.code}


def unfinished(stage: str) -> Path:
    """The folder of a stage's unfinished work."""
    return Path(os.environ.get(SHARED_WORK, WORK)) / stage


def clear_finished(declared: Iterable[Declaration], copy: Path = Path()) -> None:
    """Delete the scratch folders whose results dvc.lock lists, except those in use.

    copy: root of the copy of the repository whose dvc.lock is read.
    """
    stages = locked(copy).values()
    records = {output["path"]: output.get("md5") for stage in stages for output in stage.get("outs", [])}
    for entry in declared:
        for note in unfinished(entry.stage).glob(f"*{_DONE}"):
            folder = note.with_name(note.name.removesuffix(_DONE))
            with contextlib.suppress(Timeout), _lock_of(folder).acquire(blocking=False):
                if note.is_file() and read_json(note)["md5"] == records.get(entry.record.as_posix()):
                    for path in (folder, _beside(folder, _CODE), note):
                        remove(path)


@contextlib.contextmanager
def _alone(stage: str) -> Iterator[None]:
    """Be the only run of a stage in this copy of the repository; raises UserError if there is another."""
    folder = WORK / stage
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / _LOCK, blocking=False):
            yield
    except Timeout as error:
        raise UserError(f"another {stage} stage runs in this folder; wait until it ends, or stop it.") from error


def _lock_of(folder: Path) -> FileLock:
    """The lock of a scratch folder, outside it: a file that others wait for must never be deleted."""
    path = folder.parent.parent / "locks" / f"{folder.parent.name}-{folder.name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _in_use(folder: Path) -> bool:
    """Whether a run in another copy of the repository works in this scratch folder."""
    try:
        with _lock_of(folder).acquire(blocking=False):
            return False
    except Timeout:
        return True


def _kept(scratch: Path) -> Path:
    """The folder for what outlives the work in a scratch folder."""
    return scratch.parent.parent / _KEPT / f"{scratch.parent.name}-{scratch.name}"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if a run in another copy of the repository deletes some meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in files_under(folder))
    return 0


def _is_key(path: Path) -> bool:
    return path.is_dir() and re.fullmatch("[0-9a-f]{16}", path.name) is not None


def check_links(outputs: Iterable[Path]) -> None:
    """Refuse outputs that are links, or lie behind one: DVC removes links, and renames cannot cross disks."""
    for path in outputs:
        for place in (path, *path.parents):
            if place.is_symlink() and not _is_cached(place.resolve()):
                raise UserError(
                    f"{place} is a symbolic link, which DVC would remove; to store results on another disk, make "
                    f"{place} a folder and run `dvc cache dir /other/disk/cache`."
                )


def _is_cached(target: Path) -> bool:
    """Whether a file lies in a DVC cache, whose folders are files/md5/XX."""
    return target.parent.parent.name == "md5"


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
