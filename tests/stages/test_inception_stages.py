"""Reference and evaluate with Inception and published statistics: generated weights and an npz in the real formats."""

import json
from pathlib import Path

import numpy as np
import one_stage
import pytest
import torch
from prepared_sets import pixels, write_prepared
from published_files import write_inception

from ear.evaluation.reference import Reference
from ear.files.digests import sha256
from ear.sampling import samples

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "compute.threads": 1,
    "runtime.device": "cpu",
    "data.image_size": 8,
    "tokenizer.name": "identity",
    "tokenizer.downsample": 2,
    "sample.count": 10,
    "reference.extractor": "inception",
    "reference.weights": "inception.pth",
    "reference.statistics": "adm.npz",
    "reference.batch_size": 5,
    "evaluate.kid_subset_size": 4,
    "evaluate.neighborhood": 1,
}


def run(stage: str, **changes) -> None:
    one_stage.run(stage, {**PARAMETERS, **changes})


def test_published_statistics_replace_the_training_images(tmp_path, monkeypatch, one_thread):
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    images = pixels(10)
    # More held-out than generated images: no FID at equal numbers, of which each in 2,048 features takes seconds.
    write_prepared(tmp_path / "data/prepared", pixels(17), (6,), 11)
    write_inception(Path("inception.pth"))
    np.savez("adm.npz", mu=np.full(2048, 0.5), sigma=np.eye(2048), arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    run("tokenizer")
    run("reference")
    run("reconstruct")
    reference = Reference.load("data/reference/features.safetensors")
    assert torch.equal(reference.gaussian.sigma, torch.eye(2048, dtype=torch.float64))
    assert reference.features.shape == (6, 2048)
    assert reference.features.std(dim=0).mean() > 0

    sampling = {"seed": 0, "classes": ["a", "b", "c"]}
    samples.create("data/samples/samples.h5", labels=[0] * 10, image_shape=(8, 8, 3), sampling=sampling)
    samples.write("data/samples/samples.h5", 0, images)
    run("evaluate")
    figures = json.loads(Path("data/evaluation/metrics.json").read_text())
    protocol = json.loads(Path("data/evaluation/protocol.json").read_text())
    assert protocol["reference"] == {
        "name": "adm.npz",
        "images": None,
        "sha256": sha256("adm.npz"),
        "rows": 6,
    }
    assert protocol["extractor"]["features"] == 2048
    assert len(protocol["why"]) == 5  # few images, unbalanced, not ImageNet's classes, other weights, not ADM's file
    assert protocol["why"][-1] == "no figures of images of 8 pixels are known to be published"
    assert "class_accuracy" not in figures
    cost = figures["reconstruction"]
    assert abs(cost["rfid"]) < 1e-3 * cost["rfid_train"]  # of equal images, whose few features leave sigma singular
    assert figures["fid"] > 100  # sigma is the identity, which 10 images are far from
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"mu has shape \[3\], but the extractor has 2048 features"):
        run("reference", **{"reference.statistics": "other.npz"})
