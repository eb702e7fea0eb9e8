"""What every stage program shares: errors as sentences, and what happens after the results are published."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import one_stage
import pytest
import torch
from repositories import ROOT

from ear.errors import UserError
from stages import program


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch) -> None:
    """A folder with the pipeline's declaration."""
    monkeypatch.chdir(tmp_path)
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)


def test_a_full_gpu_is_a_sentence_with_the_keys_to_lower():
    sentence = program._sentence(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert sentence.startswith("the GPU's memory is full; lower the stage's batch, one of tokenizer.micro_batch_size, ")
    parameters = one_stage.parameters({})
    for key in program._SIZES:
        section, _, name = key.partition(".")
        assert getattr(getattr(parameters, section), name) > 0


def test_a_full_memory_is_a_sentence_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert program._sentence(caught.value).startswith("the memory is full; lower the stage's batch, one of ")
    assert program._sentence(MemoryError("Unable to allocate 1 TiB")).startswith(
        "the memory is full; lower the stage's"
    )
    damaged = UserError(f"x.safetensors is not a readable file ({caught.value}); get it again.")
    assert program._sentence(damaged).startswith("x.safetensors is not a readable file (")


def test_a_damaged_lock_does_not_hide_why_a_stage_failed(monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "prepare")
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("dvc.lock").write_text("<<<<<<< HEAD\nstages:\n")
    assert one_stage.main("prepare") == 1
    sentence, details = capsys.readouterr().err.splitlines()
    assert sentence.startswith("prepare: dvc.lock is not a readable list of stages (")
    assert sentence.endswith("; restore it with `git checkout HEAD dvc.lock`.")
    assert details == "(details: work/logs/prepare.log)"


def test_code_that_is_edited_while_a_stage_starts_is_refused(tmp_path):
    """The edit is made by the first module that the stage imports, long before the stage looks at the code."""
    for name in ("ear", "stages"):
        (tmp_path / name).unlink()
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "stages.fetch"]
    first, edited = tmp_path / "ear/errors.py", tmp_path / "ear/data/manifest.py"
    edit = f"\nwith open({str(edited)!r}, 'a') as file:\n    file.write('# an edit\\n')\n"
    first.write_text(first.read_text() + edit)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stderr.splitlines()[0] == (
        "fetch: ear/data/manifest.py was edited while the stage's program started; run it again."
    )
    assert done.returncode == 1
    assert not Path("data/raw").exists()


def test_what_fails_after_publishing_is_a_note(monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError(28, "No space left on device", "work/times/fetch.json")

    monkeypatch.setattr(program, "write_json", full)
    one_stage.run("fetch", {})
    assert "note: [Errno 28] No space left on device: 'work/times/fetch.json'; the results are published" in (
        capsys.readouterr().out
    )
    assert Path("data/raw/manifest.csv").is_file()
