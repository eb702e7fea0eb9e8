"""Tests of the reference, reconstruct and evaluate stages, also after a kill and in two processes."""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import one_stage
import pytest
import torch
from processes import together
from safetensors.numpy import load_file

from ear.evaluation.classifier import Classifier, save_classifier
from ear.evaluation.extractors import Extractor, open_extractor
from ear.files.digests import sha256
from ear.files.json_files import read_json

ROOT = Path(__file__).parents[2]
SHORT = {"reference.images": 16_000, "reference.batch_size": 32, "reference.learning_rate": 5e-3}
DEFAULT = {"reference.images": 38_400}
CPU = torch.device("cpu")


def run(stage: str, **changes) -> None:
    """One stage in the current folder, with a shorter training of the classifier than the default."""
    torch.set_num_threads(1)
    one_stage.run(stage, {"compute.threads": 1, "runtime.device": "cpu", **SHORT, **changes})


def images_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    from ear.data.prepared import PreparedImages

    source = PreparedImages("data/prepared", split)
    return source.images(np.arange(len(source))), source.labels


def write_samples(images: np.ndarray, labels: np.ndarray, classes: int = 10) -> None:
    sampling = {
        "count": len(images),
        "steps": 8,
        "guidance": 1.5,
        "schedule": "linear",
        "temperature": 1.0,
        "seed": 0,
        "model_sha256": "ab" * 32,
        "tokenizer_sha256": "cd" * 32,
        "classes": [str(k) for k in range(classes)],
    }
    Path("data/samples").mkdir(parents=True, exist_ok=True)
    with h5py.File("data/samples/samples.h5", "w") as file:
        file["images"], file["labels"] = images, labels.astype(np.int32)
        file["seed"] = np.int64(0)
        file.attrs.update({"format": "ear-samples-1", "sampling": json.dumps(sampling)})


def reference_bytes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("data/reference").iterdir())}


def evaluated() -> dict:
    return json.loads(Path("data/evaluation/metrics.json").read_text())


def link_code(folder: Path) -> Path:
    for name in ("ear", "stages", "dvc.yaml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A repository with a reference and a tokenizer, whose samples are the held-out digits themselves."""
    folder, before = link_code(tmp_path_factory.mktemp("repository")), Path.cwd()
    os.chdir(folder)
    try:
        for stage in ("fetch", "prepare", "reference", "tokenizer", "reconstruct"):
            run(stage, **{"tokenizer.name": "identity"})
        write_samples(*images_of("val"))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def repository(finished, tmp_path, monkeypatch) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished / "data", tmp_path / "data")
    monkeypatch.chdir(link_code(tmp_path))
    return tmp_path


def test_reference_describes_all_training_images(repository):
    extractor = open_extractor("data/reference/extractor.safetensors", CPU)
    images, labels = images_of("train")
    found, logits = extractor(images)
    reference = load_file("data/reference/features.safetensors")
    np.testing.assert_allclose(reference["features"], found, atol=1e-5)
    np.testing.assert_allclose(reference["mu"], found.double().mean(0), atol=1e-6)
    np.testing.assert_allclose(reference["sigma"], np.cov(found.double().numpy(), rowvar=False), atol=1e-6)
    figures = json.loads(Path("data/reference/metrics.json").read_text())
    assert figures["train_images"] == len(labels) == 1438
    assert figures["val_images"] == 359
    assert figures["train_accuracy"] == pytest.approx((logits.argmax(1).numpy() == labels).mean(), abs=1e-5)
    assert figures["val_accuracy"] > 0.95
    assert 0 < figures["fid"] < 1
    assert figures["kid_subset_size"] == 359


def test_stopped_and_resumed_reference_ends_in_the_same_bytes(repository, monkeypatch):
    whole = reference_bytes()
    shutil.rmtree("data/reference")
    calls, loss = [], Classifier.loss

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 137:  # of 500 steps, between two checkpoints
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(Classifier, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("reference")
    assert not Path("data/reference").exists()
    run("reference")
    assert len(calls) == 137 + 400  # goes on from the checkpoint after 100 steps
    assert reference_bytes() == whole


@pytest.mark.parametrize(
    ("stage", "folder", "first"),
    [("reference", "reference", 1438), ("reconstruct", "reconstructions", 0), ("evaluate", "evaluation", 0)],
)
def test_a_killed_pass_goes_on_to_the_same_bytes(repository, monkeypatch, stage, folder, first):
    """Killed while it looks at a set of 359 images, the reference's second: only its last batch is looked at again."""
    short, folder = {"reference.images": 320}, Path("data", folder)
    run("reference", **short)
    run(stage, **short)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    shutil.rmtree("work")
    looked, look = [], Extractor.__call__

    def stopping(self, images):
        before = sum(looked)
        looked.append(len(images))
        if before < first + 100 <= sum(looked):
            raise KeyboardInterrupt
        return look(self, images)

    monkeypatch.setattr(Extractor, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(stage, **short)
    assert not folder.exists()
    run(stage, **short)
    assert sum(looked) == first + 359 + 32
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_held_out_digits_score_as_the_floor(repository, capsys):
    run("evaluate")
    figures, real = evaluated(), json.loads(Path("data/reference/metrics.json").read_text())
    assert figures["fid"] == pytest.approx(real["fid"], rel=1e-4)
    assert figures["fid_ratio"] == pytest.approx(1, rel=1e-4)
    assert figures["nearest_ratio"] == pytest.approx(1, rel=1e-4)
    assert figures["class_accuracy"] == pytest.approx(real["val_accuracy"], abs=1e-5)
    assert figures["inception_score"] > 6
    assert figures["precision"] > 0.7
    assert figures["recall"] > 0.7
    out = capsys.readouterr().out
    assert "guidance: 1.5" in out
    assert "Do not compare with published figures: 359 generated images, not 50000; " in out


def test_protocol_names_what_the_figures_depend_on(repository):
    run("evaluate")
    protocol = read_json("data/evaluation/protocol.json")
    assert protocol["comparable_with_published"] is False
    assert len(protocol["why"]) == 5
    counts = np.bincount(images_of("val")[1])
    assert protocol["images"] == 359
    assert protocol["images_per_class"] == {"least": counts.min(), "most": counts.max()}
    assert protocol["sampling"]["model_sha256"] == "ab" * 32
    assert protocol["extractor"]["name"] == "ear-classifier"
    assert protocol["extractor"]["sha256"] == sha256("data/reference/extractor.safetensors")
    assert protocol["extractor"]["features"] == 64
    assert protocol["reference"]["images"] == 1438
    assert protocol["reference"]["sha256"] == sha256("data/reference/features.safetensors")


def test_two_processes_leave_the_bytes_of_one(repository):
    """359 held-out and 1438 training images in batches of 32: the last batches are short, the last rounds uneven."""
    short = {"reference.images": 320}
    run("reference", **short)
    run("evaluate")
    figures, reference = Path("data/evaluation/metrics.json").read_bytes(), reference_bytes()
    for folder in ("data/reference", "data/evaluation", "work"):
        shutil.rmtree(folder)
    assert together(lambda: run("reference", **short)) == [None, None]
    assert reference_bytes() == reference
    assert together(lambda: run("evaluate")) == [None, None]
    assert Path("data/evaluation/metrics.json").read_bytes() == figures


def test_seed_blocks_have_figures_of_their_own(repository):
    images, labels = images_of("train")
    write_samples(images[:400], labels[:400])
    changes = {"evaluate.repeats": 4, "evaluate.kid_subset_size": 100}
    run("evaluate", **changes)
    blocks, protocol = evaluated(), read_json("data/evaluation/protocol.json")
    alone = []
    for start in range(0, 400, 100):
        write_samples(images[start : start + 100], labels[start : start + 100])
        run("evaluate", **{"evaluate.kid_subset_size": 100})
        alone.append(evaluated())
    assert (protocol["blocks"], protocol["metric"], protocol["images"]) == (4, "FID-100", 100)
    assert protocol["why"][0] == "100 generated images, not 50000"
    for name in ("fid", "kid", "inception_score", "class_accuracy"):
        values = [each[name] for each in alone]
        assert blocks["range"][name] == pytest.approx([min(values), max(values)], rel=1e-5)
        assert blocks[name] == pytest.approx(sum(values) / 4, rel=1e-5)
        assert min(values) < max(values)
    assert "range" not in alone[0]


def test_repeats_must_divide_the_samples(repository):
    with pytest.raises(ValueError, match=r"evaluate\.repeats is 2, but must divide the 359 images"):
        run("evaluate", **{"evaluate.repeats": 2})


def test_the_identity_costs_nothing(repository):
    cost, real = (
        json.loads(Path(f"data/{name}/metrics.json").read_text()) for name in ("reconstructions", "reference")
    )
    assert cost["rfid"] == pytest.approx(0, abs=1e-6)
    assert cost["rfid_train"] == pytest.approx(real["fid"], rel=1e-4)
    assert (cost["images"], cost["psnr"]) == (359, 100)
    run("evaluate")
    assert evaluated()["reconstruction"] == cost


def test_bad_images_score_badly(repository):
    images, labels = images_of("val")
    write_samples(np.random.RandomState(0).randint(0, 256, images.shape, dtype=np.uint8), labels)
    run("evaluate")
    figures = evaluated()
    assert figures["fid_ratio"] > 20
    assert figures["class_accuracy"] < 0.3
    assert figures["recall"] < 0.2


def spoil_size(images, labels):
    write_samples(images.repeat(2, axis=1).repeat(2, axis=2), labels)


def spoil_classes(images, labels):
    write_samples(images, labels, classes=9)


def spoil_count(images, labels):
    write_samples(images[:0], labels[:0])


def spoil_extractor(images, labels):
    classifier = Classifier(10, 8)
    save_classifier("data/reference/extractor.safetensors", classifier, classes=[str(k) for k in range(10)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, "the generated images have 16 pixels a side, but the reference images 8"),
        (spoil_classes, "the generated images have 9 classes .*, but the reference images 10"),
        (spoil_count, "holds no images"),
        (spoil_extractor, "the reference features were made by extractor"),
    ],
)
def test_refused_samples_leave_the_earlier_figures(repository, spoil, message):
    run("evaluate")
    before = Path("data/evaluation/metrics.json").read_bytes()
    spoil(*images_of("val"))
    with pytest.raises(ValueError, match=message):
        run("evaluate")
    assert Path("data/evaluation/metrics.json").read_bytes() == before


def test_too_large_subsets_are_named(repository):
    with pytest.raises(ValueError, match=r"evaluate\.kid_subset_size is 361, .* 359 generated and 1438 real"):
        run("evaluate", **{"evaluate.kid_subset_size": 361})


def test_failed_reference_leaves_the_earlier_one(repository):
    before = reference_bytes()
    with pytest.raises(FileNotFoundError, match=r"reference\.weights is 'nowhere\.pth'"):
        run("reference", **{"reference.extractor": "inception", "reference.weights": "nowhere.pth"})
    assert reference_bytes() == before


@pytest.mark.slow
def test_default_classifier_knows_held_out_digits(repository):
    run("reference", **DEFAULT)
    assert json.loads(Path("data/reference/metrics.json").read_text())["val_accuracy"] >= 0.98
