import pytest
import torch
from factories import tiny_model

from ear.files.tensors import read_tensors, write_tensors
from ear.model.files import load_model, save_model
from ear.model.masking import mask_first, random_orders
from ear.model.tokens import patchify, unpatchify
from ear.runtime.device import compile_in_place
from ear.runtime.randomness import generator, seed_dropout, stream


def inputs(model, images=3, seed=0):
    latents = torch.randn(images, *model.shape.latent, generator=generator(seed, "latents"))
    labels = torch.arange(images) % len(model.shape.classes)
    return latents, labels


@pytest.mark.parametrize(("latent", "patch"), [((3, 4, 4), 1), ((3, 4, 4), 2), ((2, 6, 4), 2)])
def test_patchify_round_trip_and_order(latent, patch):
    latents = torch.arange(2 * latent[0] * latent[1] * latent[2]).reshape(2, *latent)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, latent[1] * latent[2] // patch**2, latent[0] * patch**2)
    assert torch.equal(unpatchify(tokens, patch, latent), latents)
    assert torch.equal(tokens[0, 0], latents[0, :, :patch, :patch].flatten())


def test_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"model\.patch_size is 3, .* 4 x 4"):
        tiny_model(patch_size=3)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_initial_embeddings_have_the_given_deviation_and_all_other_weights_do_not_change(attention):
    model = tiny_model(attention=attention, trained=False)
    small, large = (
        {name: value.clone() for name, value in model.initialise(generator(3), *sd).state_dict().items()}
        for sd in ((), (0.5,))
    )
    tables = {"class_embedding.weight", "null_class", "positions"}
    tables |= {"mask_token"} if attention == "bidirectional" else set()
    for name, value in large.items():
        torch.testing.assert_close(value, small[name] * (25 if name in tables else 1), rtol=1e-5, atol=0)
    assert large["positions"].std().item() == pytest.approx(0.5, rel=0.1)


@torch.no_grad()
def test_hidden_states_ignore_masked_tokens_and_see_visible_ones():
    model = tiny_model()
    latents, labels = inputs(model)
    tokens = patchify(latents, 1)
    mask = mask_first(random_orders(3, model.tokens, stream(1)), 9)
    hidden = model.hidden(tokens, mask, labels)
    assert torch.equal(hidden, model.hidden(tokens + 100 * mask[..., None], mask, labels))
    assert not torch.allclose(hidden, model.hidden(tokens + 100 * ~mask[..., None], mask, labels))


@torch.no_grad()
def test_hidden_states_follow_the_batch_and_the_class():
    model = tiny_model()
    latents, labels = inputs(model)
    tokens, mask = patchify(latents, 1), torch.ones(3, model.tokens, dtype=torch.bool)
    hidden = model.hidden(tokens, mask, labels)
    torch.testing.assert_close(model.hidden(tokens.flip(0), mask, labels.flip(0)), hidden.flip(0))
    assert not torch.allclose(hidden[0], hidden[1])
    null = torch.tensor([True, True, False])
    without = model.hidden(tokens, mask, labels, null)
    torch.testing.assert_close(without[0], without[1])  # all masked, no class: nothing tells them apart
    torch.testing.assert_close(without[2], hidden[2])


def test_loss_is_a_function_of_its_generator():
    model = tiny_model()
    latents, labels = inputs(model)
    first = model.loss(latents, labels, temperature=1.0, source=stream(4)).value
    assert torch.equal(first, model.loss(latents, labels, temperature=1.0, source=stream(4)).value)
    assert not torch.equal(first, model.loss(latents, labels, temperature=1.0, source=stream(5)).value)
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p is not model.null_class)


@pytest.mark.parametrize("name", ["energy", "kernel"])
def test_several_draws_of_the_target_share_the_context_of_the_first(name):
    """The loss of two draws is the mean of each one's loss, given the context of the first."""
    model = tiny_model(name=name)
    (a, labels), (b, _) = inputs(model), inputs(model, seed=1)
    loss = lambda latents: model.loss(latents, labels, temperature=1.0, source=stream(4)).value  # noqa: E731
    of_a, of_both = loss(a), loss(torch.stack([a, b]))
    context, predict = patchify(a, 1), model.predict
    model.predict = lambda _, *others: predict(context, *others)
    of_b = loss(b)
    assert abs(of_a - of_b) > 1e-3
    torch.testing.assert_close(of_both, (of_a + of_b) / 2)


def test_labels_are_dropped_in_training_only():
    model = tiny_model()
    model.label_dropout = 1.0
    latents, labels = inputs(model)

    def gradient(mode: bool):
        model.zero_grad()
        model.train(mode).loss(latents, labels, temperature=1.0, source=stream(4)).value.backward()
        return model.null_class.grad

    assert gradient(True).abs().sum() > 0
    assert gradient(False).abs().sum() == 0


def test_initial_weights_are_reproducible_and_the_head_starts_at_zero():
    a, b, other = (tiny_model(seed=s, trained=False) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.positions, other.positions)
    hidden = torch.randn(5, 32, generator=generator(0))
    assert a.score.sample(hidden, source=stream(0)).abs().max() == 0


def test_saved_model_loads_equal_and_bytes_repeat(tmp_path):
    model = tiny_model()
    for name in ("a", "b"):
        save_model(tmp_path / name, model, {"tokenizer": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, description = load_model(tmp_path / "a")
    assert loaded.shape == model.shape
    assert description["tokenizer"] == "x"
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro"):
        load_model(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors is not a readable safetensors file"):
        load_model(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("width", 400_000, "has long, which"),  # 10^12 weights: no machine could build them
        (
            "head_width",
            40_000,
            "has long, which",
        ),  # fewer than the longest tensor has values
        ("depth", 90_000, "describes 90000 layers, but has"),
    ],
)
def test_a_file_that_lies_about_its_size_costs_no_memory(tmp_path, key, value, said):
    path = tmp_path / "model.safetensors"
    save_model(path, tiny_model(), {})
    tensors, description = read_tensors(path)
    description["shape"]["model"][key] = value
    write_tensors(path, {**tensors, "long": torch.zeros(50_000)}, description)
    with pytest.raises(ValueError, match=said):
        load_model(path)


@pytest.mark.slow
def test_compiling_keeps_the_masks_of_dropout():
    model = tiny_model().train()
    latents, labels = inputs(model)

    def loss() -> torch.Tensor:
        seed_dropout(0, 5)
        return model.loss(latents, labels, temperature=1.0, source=stream(4)).value

    expected = loss()
    compile_in_place(model.transformer)
    torch.testing.assert_close(loss(), expected)
    with pytest.raises(AssertionError):  # the tolerance is finer than what other masks change
        torch.testing.assert_close(
            model.eval().loss(latents, labels, temperature=1.0, source=stream(4)).value, expected
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["energy", "kernel", "logarithmic", "hyvarinen", "categorical"])
def test_loss_and_gradients_on_the_gpu_are_those_of_the_cpu(name):
    gradients = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(name=name)
        latents, labels = (part.to(device) for part in inputs(model))
        model.to(device)
        loss = model.loss(latents, labels, temperature=1.0, source=stream(4)).value
        loss.backward()
        gradients[device] = [loss.cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    torch.testing.assert_close(gradients["cuda"], gradients["cpu"], rtol=1e-3, atol=1e-5)
