"""JSON files: readable, written atomically, keys in the given order."""

import json
from pathlib import Path
from typing import Any

from ear.errors import MissingFileError
from ear.files.atomic import whole_file
from ear.files.reading import reading


def write_json(path: str | Path, content: object) -> None:
    """Write readable JSON, complete or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> dict:
    """Read JSON; raises MissingFileError or UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    with reading(path, "JSON file", "delete it and run its stage again"):
        return as_object(json.loads(path.read_text()))


def as_object(content: Any) -> dict:
    """JSON content, if it is an object; raises TypeError."""
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


def rounded(figures: Any) -> Any:
    """Nested content with floats rounded to six significant digits; more would depend on BLAS threads."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.6g}") if isinstance(figures, float) else figures
