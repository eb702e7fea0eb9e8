"""The train and the finetune stage as a user runs them, in a repository of their own, in one process and in several."""

import csv
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from prepared_sets import pixels, write_prepared
from processes import together

import ear
from ear import config
from ear.commands import export
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.files.tensors import read_description, read_tensors, write_tensors
from ear.lineage.run import WORK
from ear.model.training import Phase
from ear.runtime import distributed
from stages import program

ROOT = Path(__file__).parents[2]
TINY = {
    "compute.threads": 1,
    "runtime.device": "cpu",
    "runtime.workers": 0,
    "data.image_size": 8,
    "tokenizer.name": "identity",
    "tokenizer.downsample": 2,
    "model.width": 32,
    "model.depth": 2,
    "model.dropout": 0.1,
    "model.head_width": 24,
    "model.head_depth": 1,
    "train.images": 192,
    "train.optimizer": "adamw",
    "train.learning_rate": 0.001,
    "finetune.learning_rate": 0.0002,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 4,
    "train.warmup_images": 32,
    "train.validate_images": 64,
    "runtime.checkpoint_images": 48,
    "finetune.images": 48,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def run(stage: str, *, resume: bool = False, **changes) -> None:
    """One stage in this process, from the start unless told to resume, with the default parameters made tiny."""
    content = OmegaConf.load(ROOT / "params.yaml")
    for key, value in {**TINY, **changes}.items():
        OmegaConf.update(content, key, value)
    if distributed.is_main():
        if not resume:
            shutil.rmtree(WORK / stage, ignore_errors=True)
        OmegaConf.save(content, "params.yaml")
    distributed.barrier()
    module = importlib.import_module(f"stages.{stage}")
    program.perform(stage, module.work, module.Parameters, config.load)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder with the latents of 40 training and 20 held-out images of noise."""
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_prepared(tmp_path / "data/prepared", pixels(60), (40,), 20)
    monkeypatch.chdir(tmp_path)
    run("tokenizer")
    run("cache")
    return tmp_path


def table(path: str) -> list[dict[str, float]]:
    with Path(path).open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file, delimiter="\t")]


def contents(folder: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(Path(folder).iterdir())}


def both(work) -> None:
    """Do the work in two processes, of which none may fail."""
    assert together(work) == [None, None]


def assert_close(rows: list[dict], expected: list[dict]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"runtime.sharded": True, "runtime.checkpointing": True, "model.blocks": "modern"}]
)
def test_two_processes_train_and_finetune_like_one(repository, options):
    """Same global batches: losses, validation and weights within float error, in both phases."""
    one, two = {}, {}
    for result, execute in ((one, lambda work: work()), (two, both)):
        for stage, folder in (("train", "data/model"), ("finetune", "data/finetuned")):
            execute(lambda stage=stage: run(stage, **options))
            result[stage] = [table(f"{folder}/{name}.tsv") for name in ("training", "validation")]
            result[stage].append(read_tensors(f"{folder}/model.safetensors")[0])
    for stage in one:
        for rows, expected in zip(two[stage][:2], one[stage][:2], strict=True):
            assert_close(rows, expected)
        for name, tensor in two[stage][2].items():
            torch.testing.assert_close(tensor, one[stage][2][name], rtol=1e-3, atol=1e-5)
    validation = one["train"][1]
    assert list(validation[0]) == ["images", "loss", "averaged_loss", "averaged_long_loss"]
    assert [row["images"] for row in validation] == [64, 128, 192]


def test_two_processes_train_with_muon_like_one(repository):
    """Up to rounding, which orthogonal updates make larger."""
    figures = []
    for execute in (lambda work: work(), both):
        execute(lambda: run("train", **{"train.optimizer": "muon"}))
        figures.append([row["loss"] for row in table("data/model/validation.tsv")])
    assert figures[1] == pytest.approx(figures[0], rel=0.01)
    moments = {name for name in read_tensors("data/model/state.safetensors")[0] if name.startswith("optimizer.")}
    assert "optimizer.momentum_buffer.transformer.blocks.0.attention.qkv.weight" in moments
    assert "optimizer.exp_avg_sq.token_embedding.weight" in moments
    assert "optimizer.exp_avg.transformer.blocks.0.attention.qkv.weight" not in moments
    run("finetune", **{"train.optimizer": "muon"})


@pytest.mark.parametrize("sharded", [(True, False), (False, True)])
def test_a_stopped_training_resumes_with_other_sharding(repository, monkeypatch, sharded):
    """Checkpoints hold whole tensors; the results agree within float error."""
    first, second = ({"runtime.sharded": value, "runtime.checkpoint_images": 192} for value in sharded)
    run("train")
    expected, rows = read_tensors("data/model/model.safetensors")[0], table("data/model/training.tsv")
    results = together(lambda: stopped(monkeypatch, **first))
    assert any("after 112 images, with a checkpoint" in str(result) for result in results)
    assert together(lambda: run("train", resume=True, **second)) == [None, None]
    assert_close(table("data/model/training.tsv"), rows)
    for name, tensor in read_tensors("data/model/model.safetensors")[0].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("score", ["kernel", "logarithmic", "hyvarinen", "categorical"])
def test_every_score_trains_in_two_processes(repository, score, sharded):
    changes = {"score.name": score, "score.codes": 8, "train.images": 32, "runtime.sharded": sharded}
    run("train", **changes)
    expected = table("data/model/training.tsv")
    both(lambda: run("train", **changes))
    assert_close(table("data/model/training.tsv"), expected)


def test_one_process_publishes_and_speaks(repository, capfd):
    both(lambda: run("train", **{"train.images": 32}))
    output = capfd.readouterr().out
    assert output.count("train: ") == 2  # the introduction and the last line of progress
    assert "2 steps of 16 images = 2 process(es) x 2 micro-batch(es) x 4; peak rate 0.001" in output
    assert "40 images" in output
    assert {"model.safetensors", "state.safetensors", "metrics.json"} <= contents("data/model").keys()
    figures = read_json("data/model/metrics.json")
    assert figures["validation_loss_averaged_long"] == table("data/model/validation.tsv")[-1]["averaged_long_loss"]


def test_recomputed_activations_change_no_bit(repository):
    run("train", **{"train.images": 48})
    expected = contents("data/model")
    run("train", **{"train.images": 48, "runtime.checkpointing": True})
    assert contents("data/model") == expected


def test_a_kept_checkpoint_is_a_model(repository):
    """The newest one holds the published weights; an earlier one generates, and is exported."""
    run("train", **{"runtime.keep_images": 96})
    early, last = sorted(Path("work/kept").glob("train-*/checkpoint-*.safetensors"))
    published = ear.load("data/model").state_dict()
    for weights, equal in ((None, True), ("averaged", True), ("weights", False)):
        loaded = ear.load(last, weights).state_dict()
        assert all(torch.equal(loaded[name], published[name]) for name in published) is equal, weights
    drawn = ear.generate("data", [0, 1], steps=4, model=early)
    assert drawn.shape == (2, 8, 8, 3)
    assert not np.array_equal(drawn, ear.generate("data", [0, 1], steps=4, model=last))
    export.run(Path("early/model.safetensors"), checkpoint=early)
    assert np.array_equal(drawn, ear.generate("data", [0, 1], steps=4, model="early/model.safetensors"))
    with pytest.raises(ear.UserError, match="weights is 'long', but must be averaged, averaged_long or weights"):
        ear.load(last, "long")
    assert ear.load(last, "averaged_long").shape == ear.load(last).shape
    with pytest.raises(ear.UserError, match="is not a training checkpoint"):
        export.run(Path("other"), checkpoint=Path("data/model/model.safetensors"), weights="averaged")
    tokenizer_checkpoint = Path("foreign.safetensors")
    write_tensors(tokenizer_checkpoint, {"weights.a": torch.zeros(1)}, {"images": 1, "about": {}})
    with pytest.raises(ear.UserError, match="give a model file of ear, or a checkpoint of the train or finetune stage"):
        ear.load(tokenizer_checkpoint)


def test_a_global_batch_that_does_not_divide_is_refused_with_the_remedy(repository):
    results = together(lambda: run("train"), 3)
    told = [str(error) for error in results if isinstance(error, ValueError)]
    assert len(told) == 1
    assert "train.global_batch_size is 16, but must be a multiple of 3" in told[0]


def test_low_precision_is_for_cuda(repository):
    for precision in ("bfloat16", "tfloat32"):
        with pytest.raises(ValueError, match=f"train.precision is '{precision}', which CPUs lack"):
            run("train", **{"train.precision": precision})


def stopped(monkeypatch, **changes) -> None:
    """The train stage, stopped at image 100 as torchrun and Slurm do it: by SIGTERM to every process of the group."""
    loss = Phase.loss

    def interrupted(self, batch, position):
        if position == 100:
            os.killpg(0, signal.SIGTERM)
        return loss(self, batch, position)

    if distributed.is_main():
        os.setpgrp()
    monkeypatch.setattr(Phase, "loss", interrupted)
    run("train", **changes)


def test_sigterm_to_training_and_its_readers_leaves_a_checkpoint(repository, monkeypatch):
    changes = {"runtime.workers": 2, "runtime.checkpoint_images": 192}
    (error,) = together(lambda: stopped(monkeypatch, **changes), 1)
    assert str(error) == "train was stopped by SIGTERM after 112 images, with a checkpoint; run it again to resume."
    (saved,) = Path("work/train").glob("*/checkpoint-*.safetensors")
    assert read_description(saved)["images"] == 112


def workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children(recursive=True) if "stages.train" in p.cmdline()]


@pytest.mark.slow
def test_killed_process_ends_the_stage_and_a_restart_ends_in_the_same_bytes(repository):
    """`python -m stages.train` with runtime.processes 2: SIGKILL to one; exit code within 30 s; started again."""
    changes = {"runtime.processes": 2, "train.images": 4800, "runtime.checkpoint_images": 480}
    together(lambda: run("train", **changes))
    expected = contents("data/model")
    shutil.rmtree("work")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.train"]
    launcher = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(Path("work/train").glob("*/checkpoint-*.safetensors")):
        assert launcher.poll() is None
        time.sleep(0.01)
    os.kill(workers(launcher)[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert launcher.returncode == 1
    assert "was ended by SIGKILL" in errors
    assert "Traceback" not in errors
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert contents("data/model") == expected


@pytest.mark.gpu
def test_training_in_bfloat16_and_compiled_follows_float32(repository):
    on_gpu = {"runtime.device": "cuda", "train.images": 1600}
    run("train", **on_gpu)
    expected = table("data/model/validation.tsv")[-1]["loss"]
    run("train", **on_gpu, **{"train.precision": "bfloat16", "runtime.compile": True})
    assert table("data/model/validation.tsv")[-1]["loss"] == pytest.approx(expected, rel=0.02)
    tensors, _ = read_tensors("data/model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.gpu
def test_training_on_the_gpu_repeats_up_to_rounding(repository):
    """Bytes are not promised: the backward pass of attention is not deterministic on CUDA."""
    run("train", **{"runtime.device": "cuda"})
    expected = table("data/model/validation.tsv")
    run("train", **{"runtime.device": "cuda"})
    again = table("data/model/validation.tsv")
    assert [row["images"] for row in again] == [row["images"] for row in expected]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
