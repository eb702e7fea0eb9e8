"""What every stage program shares: its declared parameters, its device, its log, its scratch folder, its errors.

A stage sees only the parameters that dvc.yaml declares for it, so that none can be a hidden dependency.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from ear import config, distributed, records

LOGS = Path("work/logs")
SCRATCH = Path("work")


def declared(stage: str) -> dict:
    """The entry of `stage` in dvc.yaml; raises FileNotFoundError outside the repository's root."""
    from omegaconf import OmegaConf

    path = Path("dvc.yaml")
    if not path.is_file():
        raise FileNotFoundError("dvc.yaml is not in the current folder; run stages from the repository's root.")
    return OmegaConf.to_container(OmegaConf.load(path))["stages"][stage]


def visible(parameters: config.Parameters, keys: Iterable[str]) -> SimpleNamespace:
    """Only the sections and the dotted keys named, plus the untracked runtime section."""
    view: dict = {"runtime": parameters.runtime}
    for key in keys:
        section, _, name = key.partition(".")
        values = getattr(parameters, section)
        if name:
            vars(view.setdefault(section, SimpleNamespace()))[name] = getattr(values, name)
        else:
            view[section] = values
    return SimpleNamespace(**view)


def scratch(stage: str, parameters: SimpleNamespace, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder where `stage` keeps unfinished work, named by its parameters, code and inputs.

    A killed run finds its own folder again; anything changed gives another one, and old ones are removed.
    `inputs` are the files that stand for the inputs, an index with digests where there is one: they must exist, and are
    read whole. The processes of a stage share the folder.
    """
    return distributed.from_main(lambda: _scratch(stage, parameters, inputs))


def _scratch(stage: str, parameters: SimpleNamespace, inputs: Iterable[str | Path]) -> Path:
    tracked = {name: value for name, value in sorted(vars(parameters).items()) if name != "runtime"}
    plain = {n: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else vars(v) for n, v in tracked.items()}
    code = [path for path in declared(stage).get("deps", []) if path.endswith(".py")]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for path in [*code, *inputs]:
        digest.update(records.sha256(path).encode())
    folder = SCRATCH / stage / digest.hexdigest()[:16]
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(
    stage: str,
    work: Callable[[SimpleNamespace], None],
    description: str | None,
    *,
    many_processes: bool = False,  # `work` can run in all processes of `ear.distributed.group` at once
    check: Callable[[config.Parameters], None] | None = None,  # of all parameters: it can refuse them, nothing else
) -> None:
    """Run a stage as a program: exit code 0, or 1 after one line that says what to mend (traceback in work/logs).

    A stage of many processes starts `runtime.processes` of them, unless a launcher such as torchrun has.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    arguments = parser.parse_args()
    try:
        with distributed.group():
            every = config.load(arguments.params)
            if check:
                check(every)
            parameters = visible(every, declared(stage).get("params", []))
            if distributed.size() > 1 and not many_processes:
                raise ValueError(f"{stage} works in one process, but the launcher started {distributed.size()}.")
            if many_processes and parameters.runtime.processes > 1 and not distributed.launched():
                sys.exit(distributed.launch(f"stages.{stage}", sys.argv[1:], parameters.runtime.processes))
            work(parameters)
    except distributed.FailedElsewhere:
        sys.exit(1)
    except (ValueError, OSError, MemoryError) as error:
        print(f"{stage}: {_sentence(error)}", file=sys.stderr)
        _keep_traceback(LOGS / f"{stage}.log")
        sys.exit(1)
    if distributed.is_main():
        shutil.rmtree(SCRATCH / stage, ignore_errors=True)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; earlier outputs are as they were."
    return " ".join(str(error).split()) or type(error).__name__


def _keep_traceback(log: Path) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        print(f"(details: {log})", file=sys.stderr)
    except OSError:
        pass  # a full or read-only disk: the sentence above has been said
