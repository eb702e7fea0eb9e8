"""Stages as dvc.yaml declares them, and what dvc.lock records of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ear.errors import MissingFileError
from ear.files.reading import reading

RECORDS = Path("data/lineage")


@dataclass(frozen=True)
class Declaration:
    """A stage: its parameters, code (files and packages), inputs (outputs of earlier stages) and outputs."""

    stage: str
    parameters: tuple[str, ...]  # sections and keys of params.yaml
    code: tuple[Path, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]

    @property
    def record(self) -> Path:
        """The output that says what the others were made from."""
        return RECORDS / f"{self.stage}.json"


def declarations(repository: Path = Path()) -> dict[str, Declaration]:
    """Every stage by name, in the order of dvc.yaml.

    Raises MissingFileError if a repository's root has none; UserError if it is damaged.
    """
    path = repository / "dvc.yaml"
    if not path.is_file():
        raise MissingFileError(f"{path} is not in {Path.cwd()}; run stages from the repository's root.")
    with reading(path, "pipeline", "restore it with `git checkout HEAD dvc.yaml`"):
        return {name: _declaration(name, entry) for name, entry in stages_of(path.read_text()).items()}


def _declaration(name: str, entry: dict[str, Any]) -> Declaration:
    needed = [Path(path) for path in entry.get("deps", [])]
    made = [
        Path(next(iter(output)) if isinstance(output, dict) else output)
        for kind in ("outs", "metrics", "plots")
        for output in entry.get(kind, [])
    ]
    return Declaration(
        name,
        parameters=tuple(entry.get("params", [])),
        code=tuple(path for path in needed if path.parts[0] != "data"),
        inputs=tuple(path for path in needed if path.parts[0] == "data"),
        outputs=tuple(made),
    )


def locked(copy: Path = Path()) -> dict[str, dict[str, Any]]:
    """Stage => its entry in the dvc.lock of a copy of the repository; empty without that file.

    Raises UserError if it is damaged.
    """
    path = copy / "dvc.lock"
    if not path.is_file():
        return {}
    with reading(path, "list of stages", "restore it with `git checkout HEAD dvc.lock`"):
        return stages_of(path.read_text())


def stages_of(text: str) -> dict[str, dict[str, Any]]:
    """Stage => its entry in the text of a dvc.yaml or dvc.lock; raises errors of several kinds for other texts."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    stages = content.get("stages", {})
    if not all(isinstance(entry, dict) for entry in stages.values()):
        raise TypeError("a stage has no entries")
    return stages
