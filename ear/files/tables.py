"""Tab-separated tables."""

import csv
import io
from pathlib import Path

from ear.files.atomic import whole_file


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Rows with the same keys, in one order => a tab-separated file that `dvc plots` draws; six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(rows[0] if rows else ["images"])
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())
