"""The pipeline's declarations against the code: deps cover imports, outputs are kept safe, parameters are all used."""

import ast
import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ear import config
from stages import program

ROOT = Path(__file__).parent.parent
STAGES = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
ORDER = ["fetch", "prepare", "reference", "tokenizer", "cache", "train", "finetune", "sample", "evaluate"]
PACKAGES = ("ear", "stages")


def source_of(module: str) -> Path | None:
    """The file of a module of ours."""
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(path: Path) -> set[Path]:
    """Files of ours that one file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        else:
            continue
        found |= {source for name in names if (source := source_of(name))}
    return found


def needed(start: Path) -> set[str]:
    """All files of ours that a program runs, but the packages' own docstring files."""
    seen, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += imported(path)
    return {str(p.relative_to(ROOT)) for p in seen} - {"ear/__init__.py", "stages/__init__.py"}


def test_the_stages_and_their_order():
    assert list(STAGES) == ORDER


@pytest.mark.parametrize("stage", ORDER)
def test_deps_are_exactly_the_code_that_the_stage_imports(stage):
    declared = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert declared == needed(ROOT / f"stages/{stage}.py")


@pytest.mark.parametrize("stage", ORDER)
def test_outputs_survive_a_failed_rerun_and_metrics_stay_in_git(stage):
    for kind in ("outs", "metrics", "plots"):
        for entry in STAGES[stage].get(kind, []):
            ((path, options),) = entry.items()
            assert options["persist"] is True, path
            assert path.startswith("data/")
            if kind == "metrics":
                assert options["cache"] is False


def test_declared_parameters_exist_and_none_is_unused():
    sections = {f.name: {g.name for g in dataclasses.fields(f.type)} for f in dataclasses.fields(config.Parameters)}
    used = set()
    for stage in STAGES.values():
        for key in stage.get("params", []):
            section, _, name = key.partition(".")
            assert section in sections
            assert not name or name in sections[section]
            used |= {f"{section}.{n}" for n in ([name] if name else sections[section])}
    every = {f"{section}.{name}" for section, names in sections.items() for name in names}
    assert every - used == {f"runtime.{name}" for name in sections["runtime"]}


def test_a_stage_sees_declared_parameters_only():
    view = program.visible(config.load(ROOT / "params.yaml"), ["data.image_size", "prepare"])
    assert view.data.image_size == 8
    assert view.prepare.shard_size == 1024
    for hidden in (lambda: view.data.path, lambda: view.train):
        with pytest.raises(AttributeError):
            hidden()


@pytest.mark.parametrize("stage", ORDER)
def test_stage_programs_are_thin(stage):
    assert len((ROOT / f"stages/{stage}.py").read_text().splitlines()) < 100
