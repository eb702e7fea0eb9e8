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
    """Every stage by name, in the order of dvc.yaml; raises MissingFileError if a repository's root has none."""
    return {name: _declaration(name, entry) for name, entry in _yaml(repository / "dvc.yaml")["stages"].items()}


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
    """Stage => its entry in the dvc.lock of a copy of the repository; empty without that file."""
    path = copy / "dvc.lock"
    return stages_of(path.read_text(), path) if path.is_file() else {}


def stages_of(lock: str, path: Path = Path("dvc.lock")) -> dict[str, dict[str, Any]]:
    """Stage => its entry in the text of a dvc.lock; raises UserError naming `path` if it is no such text."""
    return _content(lock, path).get("stages", {})


def _yaml(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"{path} is not in {Path.cwd()}; run stages from the repository's root.")
    return _content(path.read_text(), path)


def _content(text: str, path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    with reading(path, "list of stages", f"restore it with `git checkout {path.name}`"):
        content: Any = OmegaConf.to_container(OmegaConf.create(text))
        if not isinstance(content, dict):
            raise TypeError("no mapping")
        return content
