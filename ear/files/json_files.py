"""JSON files: readable, written atomically, keys in the given order."""

import json
from pathlib import Path
from typing import Any

from ear.errors import MissingFileError, UserError
from ear.files.atomic import whole_file


def write_json(path: str | Path, content: object) -> None:
    """Write readable JSON, complete or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> dict:
    """Read JSON; raises MissingFileError or UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run its stage again.") from error


def rounded(figures: Any) -> Any:
    """Nested content with floats rounded to six significant digits; more would depend on BLAS threads."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.6g}") if isinstance(figures, float) else figures
