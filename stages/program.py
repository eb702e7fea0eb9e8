"""What every stage program shares: its parameters, its scratch folder, its log, its errors.

A stage declares a dataclass of parameters; the test of dvc.yaml holds it equal to the `params` declared there, so no
parameter can be a hidden dependency.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ear import config
from ear.errors import MissingFileError, UserError
from ear.files.digests import sha256
from ear.runtime import distributed

LOGS = Path("work/logs")
SCRATCH = Path("work")
View = TypeVar("View")


def tracked_keys(kind: type) -> list[str]:
    """The keys of params.yaml that a parameter class declares: its fields, but for the untracked `runtime`.

    A field is a section of that name, or a single key: `image_size: Annotated[int, "data.image_size"]`.
    """
    return [key for name, key in _fields(kind).items() if name != "runtime"]


def _fields(kind: type) -> dict[str, str]:
    """Field => key or section of params.yaml."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: typing.get_args(hint)[1] if typing.get_args(hint) else name for name, hint in hints.items()}


def visible(parameters: config.Parameters, kind: type[View]) -> View:
    """Only the sections and keys that `kind` declares."""

    def value(key: str) -> Any:
        section, _, name = key.partition(".")
        found = getattr(parameters, section)
        return getattr(found, name) if name else found

    return kind(**{name: value(key) for name, key in _fields(kind).items()})


def scratch(stage: str, key: object, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder for unfinished work of `stage`, named by parameters, code and inputs; ranks share it.

    A killed run finds its own folder again; anything changed gives another folder, and old ones are removed.
    key: the parameters that the work depends on, a dataclass or plain values. inputs: files that identify the inputs;
    they must exist and are read completely, so give an index with digests if there is one.
    """
    return distributed.from_main(lambda: _scratch(stage, key, inputs))


def _scratch(stage: str, key: object, inputs: Iterable[str | Path]) -> Path:
    digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode())
    for path in [*_code(stage), *inputs]:
        digest.update(sha256(path).encode())
    folder = SCRATCH / stage / digest.hexdigest()[:16]
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _plain(value: Any) -> Any:
    """Parameters as JSON values, without the section that cannot change a result."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "runtime"}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


def _code(stage: str) -> Iterator[Path]:
    """The Python files among the dependencies that dvc.yaml declares for `stage`."""
    for path in map(Path, declared(stage).get("deps", [])):
        if path.suffix == ".py":
            yield path
        elif path.parts[0] == "ear":
            yield from sorted(path.rglob("*.py"))


def declared(stage: str) -> dict[str, Any]:
    """The entry of `stage` in dvc.yaml; raises MissingFileError outside the repository's root."""
    from omegaconf import OmegaConf

    path = Path("dvc.yaml")
    if not path.is_file():
        raise MissingFileError("dvc.yaml is not in the current folder; run stages from the repository's root.")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content["stages"][stage]


def run(
    stage: str,
    work: Callable[[View], None],
    kind: type[View],  # dataclass of the parameters that the stage depends on
    description: str | None,
    *,
    many_processes: bool = False,  # `work` can run in all ranks of `ear.runtime.distributed.group` at once
    check: Callable[[config.Parameters], None] | None = None,  # of all parameters; it can only refuse them
) -> None:
    """Run a stage as a program: exit code 0, or 1 after one line that says what to fix (traceback in work/logs).

    A stage of many processes starts `runtime.processes` of them, unless a launcher such as torchrun has. An error that
    is not the user's (a bug) ends the program with its traceback.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    arguments = parser.parse_args()
    try:
        with distributed.group():
            parameters = config.load(arguments.params)
            if check:
                check(parameters)
            if distributed.size() > 1 and not many_processes:
                raise UserError(
                    f"{stage} runs in one process, but the launcher started {distributed.size()}; start it without."
                )
            if many_processes and parameters.runtime.processes > 1 and not distributed.launched():
                sys.exit(distributed.launch(f"stages.{stage}", sys.argv[1:], parameters.runtime.processes))
            work(visible(parameters, kind))
    except distributed.FailedElsewhere:
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        print(f"{stage}: {_sentence(error)}", file=sys.stderr)
        _keep_traceback(LOGS / f"{stage}.log")
        sys.exit(1)
    if distributed.is_main():
        shutil.rmtree(SCRATCH / stage, ignore_errors=True)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; earlier outputs are unchanged."
    return " ".join(str(error).split()) or type(error).__name__


def _keep_traceback(log: Path) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        print(f"(details: {log})", file=sys.stderr)
    except OSError:
        pass  # a full or read-only disk; the sentence above has been printed
