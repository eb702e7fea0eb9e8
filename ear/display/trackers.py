"""TensorBoard, MLflow and Weights & Biases: what `runtime.trackers` names gets every row of a running training.

Nothing leaves the machine unless the environment says so (WANDB_MODE, MLFLOW_TRACKING_URI). A tracker never ends a
training: if it cannot start or fails, one line says so, and the training continues without it. Their packages are the
extra `trackers`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ear.files.json_files import read_json, write_json

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes rows of figures."""

    def log(self, table: str, row: Row) -> None:
        """A row of the table "training" or "validation"; row["images"] is its position."""

    def close(self) -> None:
        """Write what is left."""


@dataclass(frozen=True)
class Start:
    """What a tracker needs to know of a training to start its run, or to continue it."""

    run: str  # name
    folder: Path  # of the unfinished training, where the ids of runs are kept
    work: Path  # folder that all copies of the repository share
    parameters: Mapping[str, Any]  # plain values, by section
    images: int  # after which this run starts


def opened(names: Iterable[str], start: Start) -> list[Tracker]:
    """The named trackers; a resumed training continues its run."""
    return [_Careful(name, functools.partial(_START[name], start)) for name in names]


class _Careful:
    """A tracker whose failures are told once and then ignored."""

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self._name, self._tracker = name, None
        with self._forgiving():
            self._tracker = start()

    def log(self, table: str, row: Row) -> None:
        with self._forgiving():
            if self._tracker:
                self._tracker.log(table, {name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        with self._forgiving():
            if self._tracker:
                self._tracker.close()

    @contextlib.contextmanager
    def _forgiving(self):
        try:
            yield
        except Exception as error:  # a tracker can fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"note: {self._name} has failed and is off for the rest of this training ({reason})", flush=True)
            self._tracker = None


class _TensorBoard:
    """Event files in work/tensorboard/RUN."""

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(start.work / "tensorboard" / start.run), purge_step=start.images + 1)
        self._writer.add_text("parameters", f"```\n{start.parameters}\n```")

    def log(self, table: str, row: Row) -> None:
        for name, value in row.items():
            self._writer.add_scalar(f"{table}/{name}", value, row["images"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run in the store that MLFLOW_TRACKING_URI names; default: work/mlflow.db."""

    def __init__(self, start: Start):
        import mlflow

        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{start.work}/mlflow.db")
        mlflow.set_experiment("ear")
        known = _read_id(start.folder, "mlflow")
        self._mlflow, active = mlflow, mlflow.start_run(run_id=known, run_name=None if known else start.run)
        _write_id(start.folder, "mlflow", active.info.run_id)
        if not known:
            mlflow.log_params(dict(_named(start.parameters)))

    def log(self, table: str, row: Row) -> None:
        self._mlflow.log_metrics({f"{table}/{name}": value for name, value in row.items()}, step=row["images"])

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """A run in the project `ear`; offline by default (WANDB_MODE), so stored in work/wandb only."""

    def __init__(self, start: Start):
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        known = _read_id(start.folder, "wandb")
        self._run = wandb.init(
            project="ear",
            name=start.run,
            id=known,
            resume="allow",
            dir=start.work,
            config=dict(start.parameters),
            reinit=True,
        )
        _write_id(start.folder, "wandb", self._run.id)
        for table in ("training", "validation"):
            self._run.define_metric(f"{table}/*", step_metric=f"{table}/images")

    def log(self, table: str, row: Row) -> None:
        self._run.log({f"{table}/{name}": value for name, value in row.items()})

    def close(self) -> None:
        self._run.finish()


_START: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}


def _named(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(section.key, value), or (key, value) of a single value."""
    for section, keys in parameters.items():
        if isinstance(keys, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in keys.items())
        else:
            yield section, keys


def _read_id(folder: Path, name: str) -> str | None:
    path = folder / f"{name}.json"
    return read_json(path)["run"] if path.is_file() else None


def _write_id(folder: Path, name: str, run: str) -> None:
    write_json(folder / f"{name}.json", {"run": run})
