"""`ear doctor` on this machine and in broken repositories."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ear.commands import doctor
from ear.commands.cli import main
from ear.config import edit
from flows import repository

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    for name in ("params.yaml", "dvc.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for command in (["git", "init", "-q"], [*repository.DVC, "init", "-q"]):
        subprocess.run(command, check=True, env=repository.environment())
    return tmp_path


def said(*subjects: str) -> dict[str, str]:
    """Subject => mark, finding and fix, of the command's output."""
    result = CliRunner().invoke(main, ["doctor"])
    lines = result.output.splitlines()
    found = {}
    for number, line in enumerate(lines):
        for subject in subjects:
            if line[6:].startswith(subject + " "):
                fix = lines[number + 1].strip() if number + 1 < len(lines) and "->" in lines[number + 1] else ""
                found[subject] = " ".join(f"{line} {fix}".split())
    return {**found, "code": str(result.exit_code)}


def test_a_fresh_clone_is_well(clone):
    found = said("Python", "torch", "HDF5", "params.yaml", "packages", "DVC", "Prefect")
    assert found["code"] == "0"
    assert found["params.yaml"] == "ok params.yaml valid"
    assert found["packages"] == "ok packages as pinned"
    assert found["HDF5"].endswith("writes and locks files in ./")
    assert "links from its cache: " in found["DVC"]
    assert "hardlink" in found["DVC"]
    assert not any("cannot be checked" in text for text in found.values())
    assert sorted(path.name for path in clone.iterdir() if path.name.startswith(".doctor")) == []


def test_what_keeps_the_pipeline_from_running_is_named_with_its_remedy(clone, monkeypatch):
    edit.apply("params.yaml", {"data.source": "folder", "data.path": "/nowhere", "tokenizer.name": "kl"})
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    pins = Path("requirements.txt").read_text()
    Path("requirements.txt").write_text(pins.replace("\nnumpy==", "\nnumpy==0."))
    edit.apply("params.yaml", {"train.precision": "bfloat16", "runtime.device": "cpu"})
    found = said("data.path", "Prefect", "packages", "runtime")
    assert found["runtime"].startswith("FAIL runtime train.precision is 'bfloat16', which CPUs lack")
    assert found["code"] == "1"
    assert found["data.path"].startswith("FAIL data.path")
    assert "/nowhere" in found["data.path"]
    assert found["Prefect"].startswith("FAIL Prefect nothing answers at http://127.0.0.1:1/api")
    assert found["Prefect"].endswith("or unset PREFECT_API_URL and use `ear serve`")
    assert found["packages"].startswith("note packages numpy ")
    Path("params.yaml").write_text("train: {}\n")
    assert said("params.yaml")["params.yaml"].startswith("FAIL params.yaml params.yaml: ")


def test_a_check_that_fails_itself_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    lines, well = doctor.run()
    assert lines == ["note  broken  cannot be checked (RuntimeError: no such thing)", "              -> report this"]
    assert well


def test_missing_libraries_are_serious(clone, monkeypatch):
    Path("requirements.txt").write_text("torch==2.0\n")
    monkeypatch.setattr(doctor, "_CRITICAL", ("no-such-library",))
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` does without it
    monkeypatch.setattr(doctor, "CHECKS", (doctor.torch_and_gpus, doctor.versions))
    lines, well = doctor.run()
    assert not well
    assert lines[0].startswith("FAIL  torch and gpus  cannot be imported: ")
    assert lines[2] == "FAIL  packages        no-such-library is missing"
    assert len(lines) == 4
    assert lines[1] == lines[3] == f"{'':<22}-> `rm .venv/bin/.ready && make setup` installs the pinned ones"
