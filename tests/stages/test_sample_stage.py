"""The sample stage with a tiny model over pixels, in a repository of its own."""

import itertools
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import one_stage
import pytest
from factories import tiny_model
from PIL import Image
from processes import together

from ear.files.digests import sha256
from ear.latents.statistics import Statistics
from ear.model.files import save_model
from ear.sampling.generation import ImageSampler
from ear.sampling.sampler import network_evaluations
from ear.sampling.settings import SamplingSettings
from ear.tokenizer.autoencoder import Identity, save_tokenizer

ROOT = Path(__file__).parents[2]
CLASSES = tuple("abc")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*, cluster: str = "", **changes) -> bytes:
    """The stage, 23 images in batches of 5; returns the bytes of samples.h5."""
    options = {"count": 23, "batch_size": 5, "steps": 4, "guidance": 2.0, **changes}
    machine = {"compute.threads": 1, "runtime.device": "cpu", "runtime.cluster": cluster}
    machine["evaluate.kid_subset_size"] = 20
    one_stage.run("sample", machine | {f"sample.{name}": value for name, value in options.items()})
    return Path("data/samples/samples.h5").read_bytes()


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch) -> Path:
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    save_tokenizer("data/tokenizer/tokenizer.safetensors", Identity(image_size=8, downsample=2))
    statistics = Statistics(0.0, 0.5, (0.0,) * 12, (0.5,) * 12)
    tokenizer = sha256("data/tokenizer/tokenizer.safetensors")
    description = {"statistics": statistics.as_dict(), "tokenizer": tokenizer}
    save_model("data/finetuned/model.safetensors", tiny_model(latent=(12, 4, 4), classes=CLASSES), description)
    return tmp_path


def test_the_file_tells_how_it_was_made():
    run(seed=5)
    with h5py.File("data/samples/samples.h5") as file:
        assert file["images"].shape == (23, 8, 8, 3)
        assert file["labels"][:].tolist() == [k % 3 for k in range(23)]
        assert file["seed"][()] == 5
        sampling = json.loads(file.attrs["sampling"])
        sampler = ImageSampler.open("data/finetuned/model.safetensors", "data/tokenizer/tokenizer.safetensors")
        settings = {name: sampling[name] for name in ("steps", "guidance", "schedule", "temperature", "seed")}
        assert np.array_equal(file["images"][20:], sampler.images([2, 0, 1], SamplingSettings(**settings), first=20))
    assert sampling["classes"] == list(CLASSES)
    assert sampling["evaluations_per_image"] == network_evaluations(sampler.model, SamplingSettings(**settings))
    assert sampling["model_sha256"] == sha256("data/finetuned/model.safetensors")
    assert Image.open("data/samples/grid.png").size == (3 * 66 + 2, 8 * 66 + 2)  # a column for each class


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_leave_the_bytes_of_one(processes):
    """Five batches, the last of them short: neither 2 nor 3 processes share them evenly."""
    one, grid = run(), Path("data/samples/grid.png").read_bytes()
    found = together(run, processes)
    assert found[0] == one
    assert Path("data/samples/grid.png").read_bytes() == grid


def test_a_cluster_leaves_the_bytes_of_this_machine(cluster, monkeypatch):
    one, grid = run(), Path("data/samples/grid.png").read_bytes()
    Path("data/samples/samples.h5").unlink()
    shutil.rmtree("work")
    monkeypatch.setattr(ImageSampler, "images", None)  # this process draws nothing
    assert run(cluster=cluster) == one
    assert Path("data/samples/grid.png").read_bytes() == grid


def test_a_killed_run_goes_on_with_the_missing_batches(monkeypatch):
    whole = run()
    Path("data/samples/samples.h5").unlink()
    shutil.rmtree("work")
    drawn, images = [], ImageSampler.images

    def stopping(self, labels, settings, *, first):
        drawn.append(first)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return images(self, labels, settings, first=first)

    monkeypatch.setattr(ImageSampler, "images", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not Path("data/samples/samples.h5").exists()
    assert run() == whole
    assert drawn == [0, 5, 10, 10, 15, 20]


def test_images_of_a_deleted_file_are_drawn_again(monkeypatch):
    """Its marks of finished batches are still there."""
    whole = run()
    (kept,) = Path("work/sample").glob("*/samples.h5")
    kept.unlink()
    Path("data/samples/samples.h5").unlink()
    assert run() == whole


def test_low_precision_is_for_cuda():
    with pytest.raises(ValueError, match=r"sample\.precision is 'bfloat16', which CPUs lack"):
        run(precision="bfloat16")


def test_other_parameters_start_afresh():
    found = []
    for changes in ({}, {"temperature": 0.5}, {"seed": 1}):
        run(**changes)
        with h5py.File("data/samples/samples.h5") as file:
            found.append(file["images"][:])
    assert not any(np.array_equal(*pair) for pair in itertools.combinations(found, 2))


def test_a_failure_of_one_process_leaves_the_earlier_samples(monkeypatch):
    before, images = run(), ImageSampler.images

    def failing(self, labels, settings, *, first):
        if first == 5:
            raise ValueError("image 7 is not finite")
        return images(self, labels, settings, first=first)

    monkeypatch.setattr(ImageSampler, "images", failing)
    errors = together(lambda: run(seed=9))
    assert str(errors[1]) == "image 7 is not finite"
    assert Path("data/samples/samples.h5").read_bytes() == before
