"""Tables: tab-separated for `dvc plots`, comma-separated for lists of files."""

import csv
import io
from pathlib import Path
from typing import Any, TextIO

from ear.files.atomic import whole_file


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Write rows with equal keys, in the same order, as TSV with six significant digits, for `dvc plots`."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(rows[0] if rows else ["images"])
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())


def csv_writer(file: TextIO) -> Any:
    """A writer of CSV with lines ended by a line feed, which quotes every file name that needs it."""
    return csv.writer(_LineFeeds(file), lineterminator="\r\n")


class _LineFeeds:
    """Replace CRLF line ends by LF: csv itself, set to LF, would not quote a carriage return in a value."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(line.removesuffix("\r\n") + "\n")
