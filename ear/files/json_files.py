"""JSON files: readable, written whole, keys in the order given."""

import json
from pathlib import Path

from ear.errors import MissingFileError, UserError
from ear.files.atomic import whole_file


def write_json(path: str | Path, content: object) -> None:
    """Write readable JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> dict:
    """Read JSON; raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run its stage again.") from error


def rounded(figures: object) -> object:
    """The same nested content with floats to six significant digits: beyond them, thread counts of BLAS show."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.6g}") if isinstance(figures, float) else figures
