"""Published weights through the stages: from a checkpoint file to images, without training."""

from pathlib import Path

import h5py
import numpy as np
import one_stage
import pytest
import torch
from prepared_sets import pixels, write_prepared

import ear
from ear.files.digests import sha256
from ear.files.json_files import read_json
from ear.latents.store import LatentStore
from ear.model import interop
from ear.model.autoregressive import AutoregressiveModel
from ear.model.files import build_model, load_model
from ear.model.shape import Shape
from ear.runtime.randomness import generator

ROOT = Path(__file__).parents[2]
TINY = {
    "compute.threads": 1,
    "runtime.device": "cpu",
    "runtime.workers": 0,
    "data.image_size": 8,
    "tokenizer.name": "identity",
    "tokenizer.downsample": 2,
    "model.width": 32,
    "model.depth": 1,
    "model.head_width": 24,
    "model.head_depth": 1,
    "train.weights": "checkpoint-last.pth",
    "train.images": 0,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 4,
    "finetune.images": 0,
    "sample.count": 10,
    "evaluate.kid_subset_size": 10,
    "sample.steps": 4,
    "sample.guidance": 1.5,
    "sample.temperature": 1.0,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def run(stage: str, **changes) -> None:
    one_stage.run(stage, {**TINY, **changes})


def untrained(**changes) -> AutoregressiveModel:
    """A model of the parameters' shape, whose head is not 0."""
    parameters, store = one_stage.parameters({**TINY, **changes}), LatentStore("data/latents", "train")
    shape = Shape(store.shape, store.classes, parameters.model, parameters.score.chosen)
    model = build_model(shape).initialise(generator(5, "weights"))
    for parameter in model.score.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(5, "head"))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> AutoregressiveModel:
    """A folder with latents of three classes and a published checkpoint, the model of which is returned."""
    for name in ("ear", "stages", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data/prepared", pixels(16), (12,), 4)
    run("tokenizer")
    run("cache")
    model = untrained()
    interop.save_published(model, "checkpoint-last.pth")
    return model


def test_a_checkpoint_becomes_images_without_training(checkpoint):
    for stage in ("train", "finetune", "sample"):
        run(stage)
    for folder in ("data/model", "data/finetuned"):
        loaded, description = load_model(f"{folder}/model.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), checkpoint.parameters(), strict=True))
        assert loaded.shape.classes == ("a", "b", "c")
        assert description["statistics"] == interop.published_statistics(12).as_dict()
        figures = read_json(f"{folder}/metrics.json")
        assert figures["images"] == 0
        assert figures["validation_loss"] == figures["validation_loss_averaged"] > 0
    with h5py.File("data/samples/samples.h5") as file:
        options = {"steps": 4, "guidance": 1.5, "temperature": 1.0, "seed": 0}
        assert np.array_equal(file["images"][:3], ear.generate("data", ["a", "b", "c"], **options))


def test_training_can_go_on_from_a_checkpoint(checkpoint):
    run("train", **{"train.images": 8, "train.warmup_images": 0})
    loaded, description = load_model("data/model/model.safetensors")
    assert not torch.equal(loaded.positions, checkpoint.positions)
    torch.testing.assert_close(loaded.positions, checkpoint.positions, atol=0.01, rtol=0)
    assert description["statistics"]["std"] == pytest.approx(1 / 0.2325)


@pytest.mark.parametrize("deviation", [0.02, 0.5])
def test_new_weights_begin_with_the_embeddings_that_the_parameters_ask_for(checkpoint, deviation):
    run("train", **{"train.weights": "", "train.images": 4, "train.warmup_images": 0, "train.embedding_sd": deviation})
    loaded, _ = load_model("data/model/model.safetensors")
    assert loaded.positions.std().item() == pytest.approx(deviation, rel=0.15)
    assert loaded.class_embedding.weight.std().item() == pytest.approx(deviation, rel=0.3)


def test_a_checkpoint_of_another_shape_leaves_the_earlier_model(checkpoint):
    run("train")
    before = sha256("data/model/model.safetensors")
    interop.save_published(untrained(**{"model.width": 64}), "checkpoint-last.pth")
    with pytest.raises(ValueError, match=r"checkpoint-last\.pth holds .* with shape .*another size"):
        run("train")
    Path("checkpoint-last.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-last\.pth does not exist"):
        run("train")
    assert sha256("data/model/model.safetensors") == before


def test_no_training_needs_weights():
    with pytest.raises(ValueError, match=r"train\.images is 0 and train\.weights is empty"):
        run("train", **{"train.weights": ""})
