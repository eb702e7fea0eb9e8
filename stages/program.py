"""What every stage program shares: its parameters, its log, its errors; ear.lineage has the rest.

A stage declares a dataclass of parameters; the test of dvc.yaml holds it equal to the `params` declared there, so no
parameter can be a hidden dependency.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ear import config
from ear.display.live import FOLDER, Live, archive
from ear.display.trackers import Start, opened
from ear.errors import UserError
from ear.files.json_files import write_json
from ear.lineage.declaration import locked
from ear.lineage.run import Run, unfinished
from ear.runtime import distributed
from stages import edited

LOGS = Path("work/logs")
TIMES = Path("work/times")  # how long each stage took when it last ran here
TRAINING_IMAGES = "data/prepared/train-*"  # pattern of their files
_GPU_FULL = "OutOfMemoryError"  # torch's; stages that do not compute never import torch
_CPU_FULL = "DefaultCPUAllocator: can't allocate memory"  # what torch says in a RuntimeError
_SIZES = (
    *("tokenizer.micro_batch_size", "tokenizer.batch_size", "reference.batch_size", "cache.batch_size"),
    *("train.micro_batch_size", "sample.batch_size"),
)
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
    return kind(**{name: config.value_of(parameters, key) for name, key in _fields(kind).items()})


def plain(value: Any) -> Any:
    """Parameters as JSON values, without the section that cannot change a result: a key for a scratch folder."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "runtime"}
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return value


def tracked(parameters: config.Parameters, kind: type) -> dict[str, Any]:
    """Key or section of params.yaml => plain value, for those that `kind` declares and DVC tracks."""
    return {key: plain(config.value_of(parameters, key)) for key in tracked_keys(kind)}


def perform(
    stage: str,
    work: Callable[[View, Run], None],
    kind: type[View],
    parameters: Callable[[], config.Parameters],  # as params.yaml has them when it is called
    unread: Callable[[View], str] = lambda parameters: "",  # pattern of input files that it does not read
) -> None:
    """Run the work of a stage and publish its outputs."""
    now = parameters()
    view = visible(now, kind)
    began, clock = time.time(), time.monotonic()
    with Run(
        stage,
        lambda: tracked(parameters(), kind),
        began=tracked(now, kind),
        other_code=now.runtime.other_code,
        files=config.named_files(now, stage),
        unread=unread(view),
    ) as run:
        if changed := edited(run.declared.code):
            raise UserError(f"{changed[0]} was edited while the stage's program started; run it again.")
        work(view, run)
        run.publish()
    if distributed.is_main():
        try:
            archive(stage, began)
            write_json(TIMES / f"{stage}.json", {"seconds": time.monotonic() - clock})
        except OSError as error:
            print(f"note: {error}; the results are published", flush=True)


def live(stage: str, parameters: Any, scratch: Path, more: Callable[[dict], dict] = lambda row: {}) -> Live:
    """What shows a running training: rows in work/live/STAGE, and the trackers that runtime.trackers names.

    parameters: those of the stage. more: further figures of a row.
    """
    if not distributed.is_main():
        return Live(more=more)
    names, run, values = parameters.runtime.trackers, f"{stage}-{scratch.name}", plain(parameters)
    shared = unfinished(stage).parent
    trackers = lambda images: opened(names, Start(run, scratch, shared, values, images))  # noqa: E731
    return Live(FOLDER / stage, key=scratch.name, more=more, trackers=trackers)


def run(
    stage: str,
    work: Callable[[View, Run], None],
    kind: type[View],  # dataclass of the parameters that the stage depends on
    description: str | None,
    *,
    many_processes: bool = False,  # `work` can run in all ranks of `ear.runtime.distributed.group` at once
    check: Callable[[config.Parameters], None] | None = None,  # of all parameters; it can only refuse them
    unread: Callable[[View], str] = lambda parameters: "",  # pattern of input files that it does not read
) -> None:
    """Run a stage as a program: exit code 0, or 1 after one line that says what to fix (traceback in work/logs).

    A stage of many processes starts `runtime.processes` of them, unless a launcher such as torchrun has. An error that
    is not the user's (a bug) ends the program with its traceback.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        with distributed.group():
            parameters = config.load()
            if check:
                check(parameters)
            if distributed.size() > 1 and not many_processes:
                raise UserError(
                    f"{stage} runs in one process, but the launcher started {distributed.size()}; omit the launcher."
                )
            if many_processes and parameters.runtime.processes > 1 and not distributed.launched():
                sys.exit(distributed.launch(f"stages.{stage}", sys.argv[1:], parameters.runtime.processes))
            perform(stage, work, kind, config.load, unread)
    except distributed.FailedElsewhere:
        sys.exit(1)
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not _full(error):
            raise
        print(f"{stage}: {_sentence(error)}", file=sys.stderr)
        _keep_traceback(LOGS / f"{stage}.log")
        if "DVC_STAGE" in os.environ and _has_run(stage):  # DVC has removed the outputs of the earlier run
            print(f"(earlier outputs: `dvc checkout {stage}`, and `git checkout` for metrics.json)", file=sys.stderr)
        sys.exit(1)


def _full(error: BaseException) -> str:
    """Which memory was found too small: the GPU's, or this machine's; empty for other errors."""
    if type(error).__name__ == _GPU_FULL:
        return "the GPU's memory"
    of_torch = isinstance(error, RuntimeError) and _CPU_FULL in str(error)
    return "the memory" if of_torch or isinstance(error, MemoryError) else ""


def _has_run(stage: str) -> bool:
    with contextlib.suppress(UserError, OSError):  # a damaged dvc.lock must not hide why the stage failed
        return stage in locked()
    return False


def _sentence(error: BaseException) -> str:
    if memory := _full(error):
        return f"{memory} is full; lower the stage's batch, one of {', '.join(_SIZES)}."
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; fix this and run the stage again: it resumes."
    return " ".join(str(error).split()) or type(error).__name__


def _keep_traceback(log: Path) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), errors="backslashreplace")
        print(f"(details: {log})", file=sys.stderr)
    except OSError:
        pass  # a full or read-only disk; the sentence above has been printed
