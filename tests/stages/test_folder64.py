"""A user's own class folders, as the folder64 preset takes them, through all stages: crops of real photographs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from photographs import PHOTOGRAPHS, write_class_folders
from PIL import Image
from test_wiring import ORDER

from ear import config
from ear.commands import costs
from ear.config.compose import compose
from ear.config.document import to_yaml
from stages import program

ROOT = Path(__file__).parents[2]
TINY = {
    "compute.threads": 1,
    "data.image_size": 16,
    "tokenizer.block_channels": "[8,8,8,16]",
    "tokenizer.images": 320,
    "model.width": 24,
    "train.images": 640,
    "train.global_batch_size": 32,
    "train.validate_images": 320,
    "runtime.checkpoint_images": 320,
    "train.warmup_images": 64,
    "finetune.images": 64,
    "reference.images": 320,
    "sample.count": 12,
    "sample.steps": 2,
    "evaluate.kid_subset_size": 6,
    "runtime.workers": 0,
    "runtime.device": "cpu",
}

LONGER = {
    "tokenizer.images": 9_600,
    "model.width": 96,
    "model.depth": 4,
    "model.head_width": 96,
    "train.images": 48_000,
    "finetune.images": 3_200,
    "reference.images": 12_800,
}


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder that stages run in."""
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path / "repository"


def write_parameters(images: Path, **overrides) -> config.Parameters:
    """params.yaml of the smoke preset for the images there."""
    parameters = compose(
        ["preset=folder64_smoke", f"data.path={images}", *(f"{key}={value}" for key, value in overrides.items())]
    )
    Path("params.yaml").write_text(to_yaml(parameters, "test"))
    return parameters


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.h5"))


def test_all_stages_on_real_pictures(repository, tmp_path, one_thread):
    images = write_class_folders(tmp_path / "images", each=16, classes=3, least_side=20)
    parameters = write_parameters(images, **TINY)
    for stage in ORDER:
        module = importlib.import_module(f"stages.{stage}")
        program.perform(stage, module.work, module.Parameters, lambda: parameters)

    assert read("data/prepared/classes.json")["classes"] == sorted(list(PHOTOGRAPHS)[:3])
    latents = read("data/latents/stats.json")
    assert latents["shape"] == [16, 2, 2]
    assert sum(latents["rows"].values()) == 48
    metrics = read("data/evaluation/metrics.json")
    assert read("data/evaluation/protocol.json")["images_per_class"] == {"least": 4, "most": 4}
    assert np.isfinite([metrics[name] for name in ("fid", "kid", "precision", "recall", "class_accuracy")]).all()
    tokenizer = costs.build_tokenizer(parameters)
    shape = costs.model_shape(parameters, tokenizer, classes=3)
    counted = costs.count_parameters(shape)["all"]
    disk = costs.disk_bytes(parameters, shape, images=48, weights=4 * counted)
    assert read("data/model/metrics.json")["parameters"] == counted
    assert read("data/tokenizer/metrics.json")["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    for folder in ("data/prepared", "data/latents"):
        assert 0 < size(folder) - disk[folder] < 2 * 8192, folder  # HDF5's own, in two files
    weights = sum(path.stat().st_size for path in Path("data/model").glob("*.safetensors"))
    assert weights == pytest.approx(disk["data/model"], rel=0.1)


@pytest.mark.slow
def test_a_longer_smoke_form_paints_the_classes(repository, tmp_path):
    """The whole program, as a user runs it, for ten minutes; the pictures carry their class's colours, if no detail."""
    images = write_class_folders(tmp_path / "images", each=60)
    write_parameters(images, **LONGER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for stage in ORDER:
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], env=environment, check=True, timeout=3600)
    metrics = read("data/evaluation/metrics.json")
    assert read("data/reference/metrics.json")["val_accuracy"] > 0.9
    assert read("data/tokenizer/metrics.json")["psnr"] > 20
    assert metrics["class_accuracy"] > 0.5  # an eighth by chance
    with Image.open("data/samples/grid.png") as grid:
        assert np.asarray(grid).std() > 20
