"""Published checkpoints: into a model of given sizes, and what is refused."""

import argparse
import pickle

import pytest
import torch
from factories import model_options, score_options, tiny_model

from ear.latents.statistics import normalised
from ear.model import interop
from ear.model.files import build_model
from ear.model.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    interop.save_published(tiny_model(seed=1), path)
    return path


def changed(path, change) -> None:
    """Rewrite the averaged weights of a checkpoint file."""
    content = torch.load(path, weights_only=True)
    content["model_ema"] = dict(content["model_ema"])  # the two entries are one in a file of `save_published`
    change(content["model_ema"])
    torch.save(content, path)


def test_weights_fill_a_model_of_given_sizes(checkpoint):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    interop.load_into(model, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    model = tiny_model(seed=0)
    interop.load_into(model, interop.published_tensors(other))
    assert torch.equal(model.positions, other.positions)


def test_a_checkpoint_of_a_running_training_is_read(checkpoint):
    """MAR's and EAR's programs save the optimiser, the gradient scaler and their command line with the weights."""
    content = torch.load(checkpoint, weights_only=True)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    command_line = argparse.Namespace(lr=8e-4, output_dir="output", dist_url="env://", gpu=0, resume=None)
    content |= {"optimizer": optimizer.state_dict(), "epoch": 799, "scaler": {"scale": 65536.0}, "args": command_line}
    torch.save(content, checkpoint)
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    interop.load_into(model, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_averaged_weights_are_taken_unless_others_are_named(checkpoint):
    changed(checkpoint, lambda averaged: averaged.update(mask_token=torch.full((1, 1, 32), 7.0)))
    model = tiny_model()
    interop.load_into(model, checkpoint)
    assert (model.mask_token == 7).all()
    interop.load_into(model, checkpoint, weights="model")
    assert not (model.mask_token == 7).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("decoder_norm.bias"), r"checkpoint-last\.pth lacks transformer\.norm\.bias"),
        (
            lambda weights: weights.update({"decoder_blocks.2.norm1.bias": torch.zeros(32)}),
            r"has transformer\.blocks\.2\.attention_norm\.bias, which the model lacks",
        ),
        (lambda weights: weights.update({"decoder_norms.bias": torch.zeros(32)}), "decoder_norms.bias is no parameter"),
        (
            lambda weights: weights.update({"z_proj.bias": torch.zeros(31)}),
            r"holds token_embedding\.bias with shape \[31\], the model needs \[32\]",
        ),
        (
            lambda weights: weights.update({"class_emb.weight": torch.zeros(1000, 32)}),
            r"knows 1000 classes, but the latents have 3 \('a' to 'c'\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, change, message):
    changed(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        interop.load_into(tiny_model(), checkpoint)


def test_files_that_are_no_checkpoint_are_refused(tmp_path, capsys):
    path = tmp_path / "file.pth"
    with pytest.raises(FileNotFoundError, match=r"file\.pth does not exist"):
        interop.load_into(tiny_model(), path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"has no entry 'model_ema' \(it holds: state_dict\)"):
        interop.load_into(tiny_model(), path)

    class Harmful:
        def __reduce__(self):
            return (print, ("unpickled",))

    path.write_bytes(pickle.dumps({"model_ema": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match=r"file\.pth cannot be read as plain weights"):
        interop.load_into(tiny_model(), path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("averaged", "message"),
    [
        (None, r"the entry 'model_ema' of .*file\.pth is a NoneType, but must be a dict of tensors by name"),
        ({"class_emb.weight": [1.0]}, r"maps 'class_emb\.weight' to a list, but must map names"),
        ({"class_emb.weight": torch.zeros(3)}, r"lacks class_embedding\.weight \(our name\), or its dimension 1"),
    ],
)
def test_damaged_entries_are_named(tmp_path, averaged, message):
    torch.save({"model_ema": averaged}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        interop.load_published(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "model",
    [
        {"attention": "causal"},
        {"name": "kernel"},
        {"name": "hyvarinen"},
        {"name": "logarithmic"},
        {"name": "categorical"},
    ],
    ids=lambda model: next(iter(model.values())),
)
def test_models_that_a_published_checkpoint_cannot_hold_are_refused(tmp_path, model):
    path = tmp_path / "checkpoint-last.pth"
    wanted = {"name": "energy", "attention": "bidirectional"} | model
    message = f"score.name is '{wanted['name']}' and model.attention is '{wanted['attention']}', but a published"
    with pytest.raises(ValueError, match=message):
        interop.save_published(tiny_model(**model), path)
    assert not path.exists()


def test_published_latents_are_scaled_by_a_constant():
    moments = torch.randn(2, 6, 4, 4)
    moments[:, 3:] = -30  # no variance to speak of
    latents = normalised(moments, torch.zeros(2, 3, 4, 4), interop.published_statistics(3))
    torch.testing.assert_close(latents, 0.2325 * moments[:, :3])


def test_noise_and_heads_that_no_tensor_shows_are_checked():
    with pytest.raises(
        ValueError, match=r"^score\.noise is 'gaussian', but must be 'uniform' for a published checkpoint"
    ):
        interop.published_tensors(tiny_model(noise="gaussian"))
    options = model_options(width=768, heads=16)
    with pytest.raises(ValueError, match=r"^model\.heads is 16, but a published model of width 768 has 12; set it"):
        interop.published_tensors(build_model(Shape((3, 4, 4), ("a", "b"), options, score_options("energy"))))


@pytest.mark.parametrize("changes", [{"name": "kernel"}, {"attention": "causal"}])
def test_weights_are_not_loaded_into_a_model_without_published_weights(changes):
    """The kernel score's head has the same tensors as the energy score's, so no other check would fail."""
    other, before = tiny_model(**changes), tiny_model(**changes).state_dict()
    with pytest.raises(ValueError, match=r"^score\.name is '\w+' and model\.attention is '\w+', but a published"):
        interop.load_into(other, interop.published_tensors(tiny_model()))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_heads_that_do_not_divide_the_width_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"^heads is 5, but must divide the checkpoint's width, 32; give a divisor"):
        interop.load_published(checkpoint, heads=5, buffer_size=tiny_model().shape.model.buffer_size)
