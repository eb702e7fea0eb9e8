"""`ear watch` beside a training that writes rows."""

import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import trained
from click.testing import CliRunner
from PIL import Image
from prepared_sets import pixels

from ear.commands import watch
from ear.commands.cli import main
from ear.display import live
from ear.display.live import FOLDER, Live
from ear.evaluation.classifier import Classifier, save_classifier
from ear.evaluation.extractors import open_extractor
from ear.evaluation.reference import Reference
from ear.evaluation.statistics import Moments
from ear.runtime.randomness import generator

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef"


def rows(count: int, stage: str = "train") -> Live:
    shown = Live(FOLDER / stage, key=KEY)
    shown.begin(0, {"total_images": 6400, "parameters": 1000, "device": "cpu"})
    for number in range(1, count + 1):
        shown.training({"images": 64 * number, "loss": 2.0 / number, "images_per_second": 32.0})
    return shown


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_look_shows_figures_time_left_and_pictures():
    rows(4).validation({"images": 256, "loss": 1.25})
    result = CliRunner().invoke(main, ["watch", "--once"])
    assert result.exit_code == 0
    first, second, third, *_ = result.output.splitlines()
    assert first == "train: 256 of 6,400 images, 32.0 img/s, 3 min 12 s left, 1,000 parameters on cpu"
    assert second == "loss 0.5, images_per_second 32"
    assert third == "held out, after 256 images: loss 1.25"
    assert Image.open("work/watch/train.png").size[0] == 1200


def test_a_training_that_was_stopped_is_not_shown_as_running():
    rows(2)
    hours_ago = time.time() - 3 * 3600
    os.utime(FOLDER / "train" / live.TRAINING, (hours_ago, hours_ago))
    (shown,) = watch.run(None, every=0.01, once=True, samples=0, samples_every=0)
    assert "\nno new row for 3 h 0 min: unless its steps take that long, it was stopped; start it again\n" in shown


def test_a_watch_that_begins_before_the_training_says_that_it_waits():
    texts = watch.run(None, every=0.01, once=False, samples=0, samples_every=0)
    assert next(texts) == "waiting for a training to begin"
    rows(1)
    assert next(texts).startswith("train: 64 of 6,400 images")


def test_without_a_training_one_look_says_so():
    result = CliRunner().invoke(main, ["watch", "--once"])
    assert result.exit_code == 1
    assert result.output == "watch: no stage is training; start `dvc repro`, and try again.\n"


def test_the_stage_that_trains_now_is_followed_to_its_end():
    rows(2, "tokenizer")
    texts = watch.run(None, every=0.01, once=False, samples=0, samples_every=0)
    assert next(texts).startswith("tokenizer: 128 of 6,400 images")
    live.archive("tokenizer", 0.0)
    rows(3)
    assert next(texts) == "tokenizer has ended; its rows are in work/live/finished/tokenizer"
    assert next(texts).startswith("train: 192 of 6,400 images")
    threading.Timer(0.2, live.archive, ["train", 0.0]).start()  # while it sleeps
    assert next(texts) == "train has ended; its rows are in work/live/finished/train"
    assert list(texts) == []


def test_the_newest_checkpoint_is_drawn_once(monkeypatch):
    rows(2)
    drawn = []
    monkeypatch.setattr(watch, "draw_samples", lambda path, count: drawn.append((path.name, count)) or "drawn")
    for path in (f"{KEY}/checkpoint-000000000064", f"{KEY}/checkpoint-000000000128", "other/checkpoint-000000000512"):
        checkpoint = Path("work/train") / f"{path}.safetensors"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()  # the last one is unfinished work of other parameters
    texts = watch.run("train", every=0.01, once=False, samples=20, samples_every=0)
    assert next(texts).endswith("\ndrawn")
    live.archive("train", 0.0)
    assert "has ended" in next(texts)
    assert drawn == [("checkpoint-000000000128.safetensors", 20)]


def test_samples_are_drawn_and_compared_with_the_reference(one_thread):
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    trained.publish(Path("data"))
    model = Path("data/finetuned/model.safetensors")
    assert watch.draw_samples(model, 20) == "work/watch/samples.png: 20 images of model.safetensors"
    assert Image.open("work/watch/samples.png").size[0] > 10 * 8
    classifier = Classifier(10, 8).initialise(generator(0, "weights"))
    save_classifier("data/reference/extractor.safetensors", classifier, classes=trained.CLASSES)
    extractor = open_extractor("data/reference/extractor.safetensors", torch.device("cpu"))
    features, _ = extractor(pixels(200))
    moments = Moments()
    moments.add(features)
    source = {"name": "data/prepared", "images": 64, "statistics_sha256": None}
    about = source | {"extractor_sha256": extractor.sha256, "image_size": 8, "classes": list(trained.CLASSES)}
    Reference(moments.gaussian(), features, moments.gaussian(), about).save("data/reference/features.safetensors")
    figures = re.fullmatch(r".*, FID-20 ([\d.e+]+), class accuracy ([\d.]+)", watch.draw_samples(model, 20))
    assert figures, "no figures"
    assert float(figures[1]) > 0
    assert 0 <= float(figures[2]) <= 1


def test_samples_that_cannot_be_drawn_do_not_end_the_watch():
    rows(2)
    path = Path(f"work/train/{KEY}/checkpoint-000000000064.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    texts = watch.run("train", every=0.01, once=True, samples=20, samples_every=0)
    assert "no samples of checkpoint-000000000064.safetensors: " in next(texts)
