"""The pipeline's declarations against the code: packages cover imports, parameters match, outputs are safe."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ear import config
from stages import program

ROOT = Path(__file__).parent.parent
STAGES = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"))["stages"]
BEFORE_TRAINING = ["fetch", "prepare", "reference", "tokenizer", "reconstruct", "cache"]
ORDER = [*BEFORE_TRAINING, "train", "finetune", "sample", "evaluate"]
# Code that cannot change a result is no dependency: parameters are tracked by value, the rest is text for people.
WITHOUT_INFLUENCE = {
    "ear/config",
    "ear/display",
    "ear/commands",
    "ear/errors.py",
    "ear/__init__.py",
    "stages/__init__.py",
}


def source_of(module: str) -> Path | None:
    """The file of a module of this project."""
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(path: Path) -> set[Path]:
    """Files of this project that one file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {source for name in names if name.split(".")[0] in ("ear", "stages") and (source := source_of(name))}
    return found


def room(path: Path) -> str:
    """ear/PACKAGE for a file inside a package of ear/, else the file itself."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2])


def needed(start: Path) -> set[str]:
    """Packages of ear/, and files of stages/, that a program imports."""
    seen, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in seen and path != ROOT / "ear/__init__.py":  # which imports on first use only
            seen.add(path)
            waiting += imported(path)
    return {room(path) for path in seen} - WITHOUT_INFLUENCE


def test_the_stages_and_their_order():
    assert list(STAGES) == ORDER


def test_dvc_yaml_fits_on_a_few_screens():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) < 200


@pytest.mark.parametrize("stage", ORDER)
def test_deps_are_exactly_the_packages_that_the_stage_imports(stage):
    declared = {dep for dep in STAGES[stage]["deps"] if not dep.startswith("data/")}
    assert declared == needed(ROOT / f"stages/{stage}.py")


@pytest.mark.parametrize("stage", ORDER)
def test_declared_parameters_are_exactly_those_that_the_stage_sees(stage):
    kind = importlib.import_module(f"stages.{stage}").Parameters
    assert sorted(program.tracked_keys(kind)) == sorted(STAGES[stage]["params"])


@pytest.mark.parametrize("stage", ORDER)
def test_outputs_reach_the_run_cache_and_metrics_stay_in_git(stage):
    for kind in ("outs", "metrics", "plots"):
        for entry in STAGES[stage].get(kind, []):
            path, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
            assert path.startswith("data/")
            assert options == ({"cache": False} if kind == "metrics" else {}), path  # persist would hide it from DVC


@pytest.mark.parametrize("stage", ORDER)
def test_every_stage_declares_its_record_and_none_depends_on_one(stage):
    assert f"data/lineage/{stage}.json" in STAGES[stage]["outs"]
    assert not any(path.startswith("data/lineage") for path in STAGES[stage]["deps"])


def test_declared_parameters_exist_and_none_is_unused():
    sections = {name: set(field.annotation.model_fields) for name, field in config.Parameters.model_fields.items()}
    used = set()
    for stage in STAGES.values():
        for key in stage.get("params", []):
            section, _, name = key.partition(".")
            assert section in sections
            assert not name or name in sections[section]
            used |= {f"{section}.{n}" for n in ([name] if name else sections[section])}
    keys = {f"{section}.{name}" for section, names in sections.items() for name in names}
    assert keys - used == {f"runtime.{name}" for name in sections["runtime"]}


def test_the_page_says_what_a_change_reruns():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/pipeline.md").read_text(), re.M)
    assert {stage: sorted(re.findall(r"`([\w.]+)`", keys)) for stage, keys in rows} == {
        stage: sorted(entry["params"]) for stage, entry in STAGES.items()
    }


def test_a_stage_sees_declared_parameters_only():
    from stages.prepare import Parameters

    view = program.visible(config.load(ROOT / "params.yaml"), Parameters)
    assert view.image_size == 8
    assert view.prepare.shard_size == 1024
    assert set(vars(view)) == {"image_size", "prepare", "runtime"}


@pytest.mark.parametrize("stage", ORDER)
def test_stage_programs_are_thin(stage):
    assert len((ROOT / f"stages/{stage}.py").read_text().splitlines()) < 120
