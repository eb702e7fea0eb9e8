"""The description of a parameter file, as a user reads it."""

import json
import sys

import pytest

from ear.commands import costs, describe
from ear.commands.cli import main
from ear.config.compose import compose
from ear.config.document import to_yaml


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty but for params.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(to_yaml(compose(["sample.steps=2"]), "test"))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ear", "describe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_description_from_parameters_alone(folder, monkeypatch, capsys):
    run(monkeypatch, "--teraflops", "0.1")
    text = capsys.readouterr().out
    assert "classes and images: digits" in text
    assert "10 classes, 1,797 images" in text
    rows = {line[2:30].strip(): line[30:].strip() for line in text.splitlines() if line.startswith("  ")}
    assert "  tokenizer                          675,143\n" in text
    assert rows["tokenizer"].startswith("38,400 images x ")
    assert "memory of the tokenizer's training (counted in float32, 64 images at once)\n" in text
    images, _, flops = rows["train"].partition(" images x ")
    per_image, total = float(flops.split()[0]) * 1e6, float(flops.split("= ")[1].split()[0])
    assert int(images.replace(",", "")) * per_image == pytest.approx(total, rel=0.01)
    assert rows["data/samples"].endswith("kB")
    assert all(
        rows[stage].endswith(("seconds", "minutes")) for stage in ("tokenizer", "cache", "train", "finetune", "sample")
    )


def test_only_an_autoencoder_that_is_trained_costs_training(folder, monkeypatch, capsys):
    monkeypatch.setattr(costs, "training_flops", lambda *_: {"forward and backward": 1})  # seconds each, and
    monkeypatch.setattr(costs, "sampling_flops", lambda *_: {"all": 1})  # not asked for here
    imported = ["preset=imagenet256_base_smoke", "data.path=/images", "tokenizer.weights=/kl.ckpt", "sample.steps=2"]
    for name, trained in (("published", False), ("kl", True)):
        (folder / "params.yaml").write_text(to_yaml(compose([*imported, f"tokenizer.name={name}"]), "test"))
        run(monkeypatch)
        assert ("the tokenizer's training" in capsys.readouterr().out) == trained


def test_classes_and_images_come_from_the_latents_or_from_options(folder, monkeypatch):
    data = compose(["preset=folder64", "data.path=/images"]).data
    assert describe.data_facts(data, classes=None, images=None)[:2] == (1000, 1_331_167)
    (folder / "data/latents").mkdir(parents=True)
    stats = {"classes": ["a", "b", "c"], "rows": {"train": 30, "val": 7}, "image_size": 64}
    (folder / "data/latents/stats.json").write_text(json.dumps(stats))
    assert describe.data_facts(data, classes=None, images=None) == (3, 37, "data/latents/stats.json")
    found = describe.data_facts(data, classes=5, images=None)
    assert found == (5, 37, "classes as given, otherwise data/latents/stats.json")
    assert describe.data_facts(data, classes=5, images=6) == (5, 6, "as given")
    larger = data.model_copy(update={"image_size": 128})
    assert describe.data_facts(larger, classes=None, images=None)[:2] == (1000, 1_331_167)
    assert describe.data_facts(compose(["preset=digits"]).data, classes=None, images=None) == (10, 1797, "digits")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--params", "absent.yaml"], "absent.yaml does not exist"),
        (["--classes", "0"], "--classes is 0, but must be above 0"),
        (["--teraflops", "-1"], "--teraflops is -1.0, but must be above 0"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_units_for_a_reader():
    assert describe.size(261.72e9) == "261.7 GB"
    assert describe.size(12) == "0.0 kB"
    assert describe.operations(14.88e12) == "14.9 TFLOP"
    assert describe.duration(90) == "1.5 minutes"
    assert describe.duration(14.7 * 86400) == "14.7 days"
