"""What a flow shows on Prefect's pages: progress, what ran and why, metrics, the picture of the samples, the report."""

import base64
import contextlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from ear.lineage.declaration import declarations
from flows import command, repository

if TYPE_CHECKING:
    from flows.pipeline import Outcome

GRID = Path("data/samples/grid.png")
REPORT = Path("data/report.html")  # of `ear report`
_LARGEST_PICTURE = 1 << 20  # bytes; a larger one would make the page that shows it slow
_SECONDS_BETWEEN_UPDATES = 5.0
_PROGRESS = re.compile(r"(?P<title>[\w -]+): (?P<done>\d+)/(?P<total>\d+) ")  # a line of ear.display.progress


class Shown:
    """Shows a running stage: its lines as logs, its progress as an artifact that is updated at a bounded rate."""

    def __init__(self, stage: str):
        self._stage, self._log = stage, get_run_logger()
        self._artifact: Any = None  # its id
        self._next = 0.0
        self._now = (0.0, "")

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._artifact and kind is None:
            self._update(100.0, self._now[1])

    def line(self, text: str) -> None:
        """A line of the stage's output."""
        self._log.info(text)
        if match := _PROGRESS.match(text):
            self._now = 100 * int(match["done"]) / max(int(match["total"]), 1), text
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + _SECONDS_BETWEEN_UPDATES
                self._update(*self._now)

    def _update(self, percent: float, text: str) -> None:
        with only_shown():
            if self._artifact is None:
                key = f"progress-{self._stage}"
                self._artifact = create_progress_artifact(progress=percent, key=key, description=text)
            else:
                update_progress_artifact(self._artifact, progress=percent, description=text)


@contextlib.contextmanager
def only_shown() -> Iterator[None]:
    """Log a warning instead of failing if something cannot be shown on Prefect's page."""
    try:
        yield
    except Exception as error:  # of the network, the server, the client
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        get_run_logger().warning("not shown on Prefect's page: %s", reason)


def show_made(stages: Iterable[str]) -> None:
    """Artifacts of what stages have made: metrics, and the picture of the samples."""
    declared = declarations()
    made = {path for stage in stages for path in declared[stage].outputs}
    with only_shown():
        if any(path.name == "metrics.json" for path in made) and (rows := metric_rows(repository.metrics())):
            create_table_artifact(key="metrics", table=rows, description="`dvc metrics show`")
        if GRID in made and GRID.is_file():
            create_markdown_artifact(key="sample-grid", markdown=picture(GRID), description="Generated images")


def show_outcomes(outcomes: "Sequence[Outcome]") -> None:
    """Artifacts of a whole run: what ran and why; and what stages had made before it."""
    with only_shown():
        create_table_artifact(
            key="stages", table=[asdict(outcome) for outcome in outcomes], description="What ran, and why"
        )
    show_made(outcome.stage for outcome in outcomes if outcome.result == "up to date")


def write_report() -> None:
    """Write the report of what there is, and name it on Prefect's page; a failure is only logged."""
    lines: list[str] = []
    program = [sys.executable, "-m", "ear", "report"]
    code = command.stream(program, line=lines.append, environment=repository.environment())
    said = lines[-1] if lines else "it said nothing"
    if code:
        get_run_logger().warning("no report: %s", said)
        return
    with only_shown():
        create_markdown_artifact(key="report", markdown=f"{said}; open it in a browser.", description="`ear report`")


def metric_rows(files: Mapping[str, Mapping]) -> list[dict]:
    """Metrics files (path => content) => one row per number: file, dotted name, value."""

    def flat(prefix: str, values: Mapping) -> Iterable[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    return [
        {"file": path, "metric": name, "value": value} for path, data in files.items() for name, value in flat("", data)
    ]


def picture(path: Path) -> str:
    """Markdown that embeds the picture if it is small, or else names its path."""
    content = path.read_bytes()
    if len(content) > _LARGEST_PICTURE:
        return f"`{path}` has {len(content) / 1e6:.1f} MB; open it there."
    return f"![{path}](data:image/png;base64,{base64.b64encode(content).decode()})"
