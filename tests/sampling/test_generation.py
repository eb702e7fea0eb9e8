"""Tests of `ear.load` and `ear.generate`: which labels and checkpoints they take, and that seeds decide the images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from trained import CLASSES, publish

import ear
from ear.latents.statistics import Statistics
from ear.sampling import generation
from ear.sampling.generation import ImageSampler
from ear.sampling.settings import SamplingOptions, SamplingSettings
from ear.tokenizer.autoencoder import Identity

pytestmark = pytest.mark.usefixtures("one_thread")

DRAW = {"steps": 16, "guidance": 2.0, "temperature": 0.9, "seed": 0}


@pytest.fixture
def data(tmp_path) -> Path:
    return publish(tmp_path / "data")


def test_the_contract(data):
    images = ear.generate(str(data), labels=[3, 7], **DRAW)
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.std() > 5
    assert np.array_equal(images, ear.generate(data, labels=["3", "7"], **DRAW))
    model = ear.load(data / "finetuned")
    assert not model.training
    assert model.shape.classes == CLASSES


def test_image_k_depends_on_its_number_its_label_and_the_seed_alone(data):
    images = ear.generate(data, labels=[3, 7, 3, 1, 1], **DRAW)
    apart = ear.generate(data, labels=[3, 7, 3, 1, 1], batch_size=2, **DRAW)
    # Another batch size changes last bits, which rounding to 256 levels may show.
    assert np.abs(images.astype(int) - apart).max() <= 1
    assert not np.array_equal(images[0], images[2])
    other = ear.generate(data, labels=[3, 7, 3, 1, 0], **DRAW)
    assert np.array_equal(images[:4], other[:4])
    assert not np.array_equal(images[4], other[4])
    assert not np.array_equal(images, ear.generate(data, labels=[3, 7, 3, 1, 1], **{**DRAW, "seed": 1}))


def test_latents_are_denormalised_before_they_are_decoded(data):
    """With the head at 0 every latent is the mean, 0.1, which is grey level 127.5 * 1.1."""
    model = tiny_model(latent=(12, 4, 4), classes=CLASSES, trained=False)
    statistics = Statistics(0.1, 0.5, (0.1,) * 12, (0.5,) * 12)
    sampler = ImageSampler(model, Identity(image_size=8, downsample=2), statistics)
    assert sampler.image_shape == (8, 8, 3)
    images = sampler.images([0, 1], SamplingSettings(**DRAW), first=0)
    assert np.unique(images).tolist() == [140]


def test_class_names_are_told_from_class_numbers(tmp_path):
    data = publish(tmp_path, classes=("cat", "dog"))
    assert np.array_equal(ear.generate(data, labels=["dog", "cat"], **DRAW), ear.generate(data, labels=[1, 0], **DRAW))
    for label in ("bird", 2, -1, 0.5):
        with pytest.raises(ValueError, match=f"label {label!r} is none of the model's 2 classes, 'cat' to 'dog'"):
            ear.generate(data, labels=[label], **DRAW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0, but must be at least 0"),
        ({"guidance": float("nan")}, "guidance is nan, but must be a number"),
        ({"steps": 8.0}, r"steps is 8\.0, but must be a whole number"),
        ({"schedule": "cosine"}, "schedule is 'cosine', but must be 'linear' or 'constant'"),
        ({"precision": "bf16"}, "precision is 'bf16', but must be 'float32', 'tfloat32' or 'bfloat16'"),
    ],
)
def test_settings_that_params_yaml_would_refuse_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**changes)


def test_a_batch_size_of_zero_is_refused(data):
    with pytest.raises(ValueError, match=r"^batch_size is 0, but must be at least 1\.$"):
        ear.generate(data, [0], batch_size=0)


def test_settings_may_be_numpy_numbers():
    assert SamplingSettings(steps=np.int64(4), guidance=np.float32(2)).steps == 4


@pytest.mark.parametrize("labels", [[], np.zeros(0, dtype=int)])
def test_empty_labels_are_refused(data, labels):
    with pytest.raises(ValueError, match=r"labels is empty; give one class per image\."):
        ear.generate(data, labels, **DRAW)


@pytest.mark.parametrize(("label", "shown"), [("37", "'37'"), (3, "3")])
def test_a_single_label_is_refused(data, label, shown):
    message = rf"^labels is {shown}, but must hold one class per image; give \[{shown}\]"
    with pytest.raises(ear.UserError, match=message):
        ear.generate(data, label, **DRAW)


def test_images_go_on_from_a_number(data):
    whole = ear.generate(data, [3, 7, 3], batch_size=3, **DRAW)
    rest = ear.generate(data, [7, 3], first=1, **DRAW)
    assert np.abs(whole[1:].astype(int) - rest).max() <= 1  # of another batch size
    assert not np.array_equal(rest, ear.generate(data, [7, 3], **DRAW))


def test_the_automatic_device_is_the_cpu_without_a_gpu(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert np.array_equal(ear.generate(data, [3], device="auto", **DRAW), ear.generate(data, [3], **DRAW))


@pytest.mark.parametrize("device", ["gpu", "xpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(data, device):
    with pytest.raises(ear.UserError, match=rf"^device is '{device}', which torch does not find here; use 'auto' or"):
        ear.generate(data, [3], device=device, **DRAW)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(data, steps):
    message = rf"^steps is {steps}, but must be at least 1\.$"
    with pytest.raises(ValueError, match=message):
        ear.generate(data, [1], **DRAW | {"steps": steps})
    with pytest.raises(ValueError, match=message):
        ear.inpaint(
            np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8), bool), [1], data=data, **DRAW | {"steps": steps}
        )


def test_a_model_of_another_tokenizer_is_refused(tmp_path):
    data = publish(tmp_path, tokenizer="0" * 64)
    with pytest.raises(ValueError, match=r"was trained on latents of tokenizer 000000000000, but .* run the stages"):
        ear.generate(data, labels=[0], **DRAW)


def test_absent_models_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"finetuned/model\.safetensors does not exist; run the stage"):
        ear.generate(tmp_path, labels=[0], **DRAW)
    data = publish(tmp_path)
    (data / generation.TOKENIZER).unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.safetensors does not exist; run the stage"):
        ear.generate(data, labels=[0], **DRAW)


def test_what_the_package_offers_is_listed():
    assert dir(ear) == ["Pipeline", "UserError", "generate", "inpaint", "interop", "load", "load_pipeline"]
    assert all(hasattr(ear, name) for name in dir(ear))


def test_images_that_are_not_finite_are_named(data):
    sampler = ImageSampler.open(data / generation.MODEL, data / generation.TOKENIZER)
    sampler.model.class_embedding.weight.data[4] = torch.nan
    with pytest.raises(ValueError, match="image 102 is not finite; the model diverged"):
        sampler.images([1, 2, 4], SamplingSettings(**DRAW), first=100)


def test_bfloat16_moves_images_a_little(data):
    sampler = ImageSampler.open(data / generation.MODEL, data / generation.TOKENIZER)
    exact, rounded = (
        sampler.images([1, 2], SamplingSettings(**DRAW, precision=p), first=0) for p in ("float32", "bfloat16")
    )
    difference = np.abs(exact.astype(int) - rounded)
    assert 0 < difference.mean() < 5


def test_labels_are_balanced():
    assert generation.balanced_labels(5, 2) == [0, 1, 0, 1, 0]
    assert [list(part) for _, part in generation.batches([0, 1, 0, 1, 0], 2)] == [[0, 1], [0, 1], [0]]


def test_options_are_the_fields_of_the_settings():
    fields = {name: kind for name, kind in SamplingSettings.__annotations__.items() if name != "seed"}
    assert SamplingOptions.__annotations__ == fields
    with pytest.raises(TypeError, match="guidence"):
        ear.generate("data", [0], guidence=2.0)
