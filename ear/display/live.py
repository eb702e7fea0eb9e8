"""The figures of a training while it runs: rows on disk for `ear watch` and `dvc plots show`, and for trackers.

work/live/STAGE/training.tsv and validation.tsv grow by a line at a time; about.json says what is trained. They are no
outputs of a stage, since rates and memory differ from run to run, and nothing reads them back into a result.
"""

import contextlib
import csv
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ear.display.trackers import Tracker
from ear.files.atomic import remove, replace, whole_file
from ear.files.json_files import read_json, rounded, write_json

FOLDER = Path("work/live")
TRAINING, VALIDATION, ABOUT = "training.tsv", "validation.tsv", "about.json"
Row = dict[str, Any]


class Live:
    """Writes the rows of a training to disk and to trackers; without a folder (ranks other than 0), writes nothing."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        key: str = "",  # identifies the training; `begin` deletes rows with another key
        more: Callable[[Row], Row] = lambda row: {},  # further figures of a row of training
        trackers: Callable[[int], Sequence[Tracker]] = lambda images: (),  # opened when it begins at that image
    ):
        self.folder, self._key, self._more, self._open = folder, key, more, trackers
        self._trackers: Sequence[Tracker] = ()
        self._failed = False

    def begin(self, images: int, about: Mapping[str, Any], last: tuple[int, int] = (0, 0)) -> None:
        """Begin or resume after `images` images.

        last: image counts of the last training row and the last validation row in the resumed checkpoint. Later rows,
        written before a kill, are removed, since the resumed training writes them again.
        """
        if self.folder is None:
            return
        with self._noting():
            self._begin(self.folder, images, about, last)
        self._trackers = self._open(images)

    def _begin(self, folder: Path, images: int, about: Mapping[str, Any], last: tuple[int, int]) -> None:
        known = folder / ABOUT
        own = known.is_file() and read_json(known).get("key") == self._key
        for name, until in zip((TRAINING, VALIDATION), last, strict=True):
            rows = [row for row in read_rows(folder / name) if row["images"] <= until] if own else []
            _write(folder / name, rows)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(known, {**about, "key": self._key, "started": now, "started_at_image": images})

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Suppress OSErrors, printing the first one as a note: a display failure must not end the training."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"note: {self.folder} cannot be written ({error}); the training continues without it", flush=True)
            self._failed = True

    def training(self, row: Row) -> None:
        """Add a row of means since the row before."""
        more = self._more(row)  # on all ranks: the call also resets what it accumulates
        self._add(TRAINING, row | more)

    def validation(self, row: Row) -> None:
        """Add a row of losses on held-out data."""
        self._add(VALIDATION, row)

    def _add(self, name: str, row: Row) -> None:
        if self.folder is None:
            return
        with self._noting():
            _append(self.folder / name, row)
        for tracker in self._trackers:
            tracker.log(name.removesuffix(".tsv"), row)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def archive(stage: str, began: float) -> None:
    """Move a stage's rows to work/live/finished, replacing those there; call it after the results are published.

    began: start time of the stage; older rows, from an abandoned training, are deleted. Empty tables are left behind,
    since `dvc plots show` warns about missing files.
    """
    folder, kept = FOLDER / stage, FOLDER / "finished" / stage
    if not (folder / ABOUT).is_file():
        return
    if (folder / ABOUT).stat().st_mtime >= began:
        remove(kept)
        replace(folder, kept)
    else:
        remove(folder)
    for name in (TRAINING, VALIDATION):
        _write(folder / name, [])


def read_rows(path: Path) -> list[Row]:
    """The rows of a table that may be growing; a line that is not complete yet is left out. [] without a file."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    table = csv.DictReader(lines, delimiter="\t")
    rows = [{name: float(value) if value else None for name, value in row.items()} for row in table]
    return [row | {"images": int(row["images"] or 0)} for row in rows]


def _append(path: Path, row: Row) -> None:
    header = path.read_text().partition("\n")[0].split("\t") if path.is_file() else []
    if header != list(row):  # the first row, or one of other code than the rows before
        _write(path, [*read_rows(path), row])
    else:
        with path.open("a") as file:
            file.write(_line(row.values()))  # one call: a reader sees the whole line, or none of it


def _write(path: Path, rows: Sequence[Row]) -> None:
    columns = list(rows[-1]) if rows else ["images"]
    with whole_file(path) as partial:
        partial.write_text(_line(columns) + "".join(_line(row.get(name) for name in columns) for row in rows))


def _line(values) -> str:
    return "\t".join("" if value is None else str(rounded(value)) for value in values) + "\n"
