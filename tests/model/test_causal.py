"""The causal model: what each prediction depends on, and generation through the cache of keys and values."""

import pytest
import torch
from factories import tiny_model

from ear import scores
from ear.model.causal import CausalModel
from ear.model.files import load_model, save_model
from ear.model.masking import random_orders
from ear.model.tokens import patchify, pick, unpatchify
from ear.runtime.randomness import generator, image_streams, stream
from ear.sampling.sampler import network_evaluations, sample
from ear.sampling.settings import SamplingSettings

LABELS = torch.tensor([0, 1, 2, 0])
KINDS = [("raster", False, "vit"), ("raster", True, "modern"), ("random", True, "vit"), ("random", True, "modern")]


def causal_model(order="random", target_positions=True, **options) -> CausalModel:
    model = tiny_model(attention="causal", order=order, target_positions=target_positions, **options)
    assert isinstance(model, CausalModel)
    return model


def inputs(model, seed=0):
    latents = torch.randn(len(LABELS), *model.shape.latent, generator=generator(seed, "latents"))
    return patchify(latents, model.patch), model.draw_orders(len(LABELS), stream(seed, "orders"))


@torch.no_grad()
@pytest.mark.parametrize(("order", "target_positions", "blocks"), KINDS)
def test_a_token_changes_only_the_predictions_after_it(order, target_positions, blocks):
    model = causal_model(order, target_positions, blocks=blocks)
    tokens, orders = inputs(model)
    hidden = model.predict(tokens, orders, LABELS)
    for place in (0, 5, 14, 15):
        changed = tokens.scatter_add(
            1, orders[:, place, None, None].expand(-1, 1, 3), torch.full((len(LABELS), 1, 3), 3.0)
        )
        differs = (model.predict(changed, orders, LABELS) - hidden).abs().amax(dim=(0, 2)) > 1e-6
        assert differs.nonzero()[:, 0].tolist() == list(range(place + 1, model.tokens))


@torch.no_grad()
def test_predictions_depend_on_class_order_and_target():
    model = causal_model()
    tokens, orders = inputs(model)
    hidden = model.predict(tokens, orders, LABELS)
    assert not torch.allclose(hidden, model.predict(tokens, orders, LABELS.flip(0)))
    null = torch.tensor([True, False, False, True])
    without = model.predict(tokens, orders, LABELS, null)
    assert torch.equal(without[1:3], hidden[1:3])
    assert not torch.allclose(without[0], hidden[0])
    swapped = orders.clone()  # the same tokens up to place 10, another target there
    swapped[:, [10, 15]] = orders[:, [15, 10]]
    other = model.predict(tokens, swapped, LABELS)
    torch.testing.assert_close(other[:, :10], hidden[:, :10])
    assert not torch.allclose(other[:, 10], hidden[:, 10])


@torch.no_grad()
@pytest.mark.parametrize(("order", "target_positions", "blocks"), KINDS)
def test_cached_passes_equal_the_full_one(order, target_positions, blocks):
    model = causal_model(order, target_positions, blocks=blocks)
    tokens, orders = inputs(model)
    full = model.predict(tokens, orders, LABELS)
    caches = model.caches()
    rows = [model.states(model.start(LABELS, None, orders[:, :1]), caches)[:, -1:]]
    for i in range(model.tokens - 1):
        at, next_at = orders[:, i : i + 1], orders[:, i + 1 : i + 2]
        rows.append(model.states(model.slots(pick(tokens, at), at, next_at), caches))
    torch.testing.assert_close(torch.cat(rows, dim=1), full, atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="in a cache for 17"):
        model.states(model.slots(pick(tokens, at), at, at), caches)


def uncached(model, labels, orders, *, guidance, source):
    """Generation by full passes alone, written out independently: linear guidance."""
    tokens = torch.zeros(len(labels), model.tokens, 3)
    null = torch.ones(len(labels), dtype=torch.bool)
    for i in range(model.tokens):
        with_class, without = (model.predict(tokens, orders, labels, n)[:, i] for n in (None, null))
        scale = 1 + (guidance - 1) * (model.tokens - max(model.tokens - i - 1, 1)) / model.tokens
        drawn = model.score.sample(with_class, source=source, unconditional=without, guidance=scale)
        tokens.scatter_(1, orders[:, i, None, None].expand(-1, 1, 3), drawn[:, None])
    return unpatchify(tokens, 1, model.shape.latent)


@torch.no_grad()
@pytest.mark.parametrize(("order", "blocks"), [("raster", "vit"), ("random", "vit"), ("raster", "modern")])
def test_generation_through_the_cache_equals_full_passes(order, blocks):
    model = causal_model(order, blocks=blocks)
    orders = model.draw_orders(len(LABELS), stream(3, "orders"))
    expected = uncached(model, LABELS, orders, guidance=2.5, source=image_streams(5, range(4)))
    drawn = sample(
        model, LABELS, SamplingSettings(steps=1, guidance=2.5), source=image_streams(5, range(4)), orders=orders
    )
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert (drawn.abs() > 0).all()


def test_generation_takes_one_pass_per_token_whatever_the_steps():
    model = causal_model()
    widths = []
    model.transformer.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[:2]))
    a, b = (sample(model, LABELS, SamplingSettings(steps=s), source=image_streams(5, range(4))) for s in (1, 64))
    assert torch.equal(a, b)
    assert widths == 2 * [(4, model.buffer), *15 * [(4, 1)]]
    assert network_evaluations(model, SamplingSettings(steps=1))["transformer"] == 16


def test_image_k_is_the_same_in_any_batch():
    model = causal_model()
    settings = SamplingSettings(steps=1, guidance=2.0)
    together = sample(model, LABELS, settings, source=image_streams(5, range(4)))
    apart = sample(model, LABELS[2:], settings, source=image_streams(5, [2, 3]))
    torch.testing.assert_close(together[2:], apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[3])  # the same class, another stream


@pytest.mark.parametrize("name", scores.SCORES)
def test_every_score_trains_and_draws(name):
    model = causal_model(name=name)
    latents = torch.randn(32, 3, 4, 4, generator=generator(0))
    model.score.learn(patchify(latents, 1).flatten(0, 1), seed=0)
    loss = model.train().loss(latents, torch.arange(32) % 3, temperature=1.0, source=stream(1)).value
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    drawn = sample(model.eval(), LABELS, SamplingSettings(steps=1, guidance=2.0), source=stream(2))
    assert drawn.shape == (4, 3, 4, 4)
    assert drawn.isfinite().all()


def test_all_tokens_are_predicted():
    model = causal_model()
    tokens, _ = inputs(model)
    positions = model.training_positions(4, stream(7))
    hidden = model.predict(tokens, positions, LABELS)
    assert torch.equal(positions, random_orders(4, 16, stream(7)))
    assert hidden.shape == (4, 16, 32)


def test_untrained_target_table_is_zero_and_raster_can_do_without():
    assert causal_model(trained=False).target_positions.abs().max() == 0
    names = causal_model("raster", target_positions=False).state_dict().keys()
    assert "target_positions" not in names
    assert "mask_token" not in names


def test_saved_model_loads_equal(tmp_path):
    model = causal_model()
    save_model(tmp_path / "model.safetensors", model, {})
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert isinstance(loaded, CausalModel)
    tokens, orders = inputs(model)
    assert torch.equal(model.predict(tokens, orders, LABELS), loaded.predict(tokens, orders, LABELS))


def test_known_tokens_are_refused():
    model = causal_model()
    with pytest.raises(ValueError, match=r"model\.attention is 'causal'"):
        sample(
            model,
            LABELS,
            SamplingSettings(steps=1),
            source=stream(0),
            known=torch.zeros(4, 3, 4, 4),
            mask=torch.ones(4, 16, dtype=torch.bool),
        )
