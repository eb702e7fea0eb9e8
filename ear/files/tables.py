"""Tab-separated tables."""

import csv
import io
from pathlib import Path

from ear.files.atomic import whole_file


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Write rows with equal keys, in the same order, as TSV with six significant digits, for `dvc plots`."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(rows[0] if rows else ["images"])
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    with whole_file(path) as partial:
        partial.write_text(text.getvalue())
