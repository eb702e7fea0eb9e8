"""The record of a stage: what its outputs were made from, written beside them to data/lineage/STAGE.json.

No stage depends on these files, so a stage whose outputs are unchanged after an edit does not make later stages rerun.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ear.files.json_files import read_json, write_json
from ear.files.reading import reading, require_format
from ear.lineage.declaration import Declaration

FORMAT = "ear-lineage-1"


@dataclass(frozen=True)
class Record:
    """What the outputs of one run of a stage were made from. Digests are SHA-256."""

    stage: str
    parameters: Mapping[str, Any]  # section or key => value, as the stage saw it
    code: Mapping[str, str]  # declared file or package => digest
    libraries: Mapping[str, str]  # package => version, of those that can change a number
    inputs: Mapping[str, str]  # file => digest
    outputs: Mapping[str, str]  # file => digest
    # Under which the work began, if the user let it continue, with the versions of libraries that differed.
    earlier_code: tuple[Mapping[str, str], ...] = ()

    def write(self, path: Path) -> None:
        """Write the record, complete or not at all."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read what `write` wrote; raises MissingFileError or UserError naming the file."""
        content = read_json(path)
        require_format(path, content.pop("format", None), FORMAT, "run its stage again")
        with reading(path, "record", "run its stage again"):
            return cls(**content | {"earlier_code": tuple(content["earlier_code"])})


def published(declared: Iterable[Declaration]) -> tuple[dict[str, str], dict[str, str]]:
    """(SHA-256, stage) by output file, over the records that exist."""
    digests: dict[str, str] = {}
    makers: dict[str, str] = {}
    for entry in declared:
        if entry.record.is_file():
            outputs = Record.read(entry.record).outputs
            digests |= outputs
            makers |= dict.fromkeys(outputs, entry.stage)
    return digests, makers


def difference(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> str:
    """The first key whose value differs, as `train.images: 50, now 7`; empty if none does."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = difference(old, new, f"{prefix}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{prefix}{key}: {old}, now {new}"
    return ""
