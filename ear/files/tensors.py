"""Named tensors with a JSON description in one safetensors file, byte-reproducible.

The description is a single metadata key: safetensors writes several keys in random order.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ear.errors import MissingFileError
from ear.files.atomic import whole_file
from ear.files.json_files import as_object
from ear.files.reading import reading

_DESCRIPTION = "ear"


def write_tensors(path: str | Path, tensors: dict, description: dict) -> None:
    """Write tensors by name with a JSON description, byte-reproducibly. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        try:
            save_file(contiguous, partial, metadata={_DESCRIPTION: json.dumps(description)})
        except SafetensorError as error:  # which is no OSError, even if the disk is full
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_tensors(path: str | Path) -> tuple[dict, dict]:
    """(tensors by name, description) of a file written by `write_tensors`; raises MissingFileError or UserError."""
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _description(file)  # noqa: SIM118 - not a dict


def read_part(path: str | Path, prefix: str) -> dict:
    """The tensors whose names start with `prefix`, by the rest of the name; raises as `read_tensors` does."""
    with _opened(Path(path)) as file:
        return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118


def read_description(path: str | Path) -> dict:
    """Only the description; raises as `read_tensors` does, also if the file is truncated."""
    with _opened(Path(path)) as file:
        return _description(file)


def _description(file) -> dict:
    return as_object(json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}")))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    from safetensors import safe_open

    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
    with reading(path, "safetensors file", "run its stage again"), safe_open(path, framework="pt") as file:
        yield file
