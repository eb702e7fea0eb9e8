"""Rotary position embeddings, and the blocks that use them."""

import math

import pytest
import torch
from factories import model_options, tiny_model

from ear.model.files import load_model, save_model
from ear.model.rotary import RotaryTable, rotate
from ear.model.shape import Shape
from ear.model.tokens import patchify
from ear.model.transformer import Transformer
from ear.runtime.randomness import generator, stream
from ear.training.optimizer import Group, adamw

GRID, BUFFER, CHANNELS = (3, 5), 2, 8
AT = torch.arange(BUFFER + 15)[None]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def test_products_depend_on_offsets_in_rows_and_columns_alone():
    table = RotaryTable(GRID, buffer=BUFFER, channels=CHANNELS)
    rotation = table(queries=AT, keys=AT)
    query, key = draw(CHANNELS, seed=1), draw(CHANNELS, seed=2)
    everywhere = (1, 1, AT.shape[1], CHANNELS)
    queries = rotate(query.expand(everywhere), rotation.queries)[0, 0, BUFFER:]
    keys = rotate(key.expand(everywhere), rotation.keys)[0, 0, BUFFER:]
    products = (queries @ keys.T).unflatten(0, GRID).unflatten(2, GRID)
    torch.testing.assert_close(products[0, 1, 1, 3], products[1, 2, 2, 4])
    torch.testing.assert_close(products[2, 4, 0, 3], products[2, 1, 0, 0])
    assert abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-3  # a row is not a column
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(15))


def test_angles_are_the_definition():
    table = RotaryTable(GRID, buffer=BUFFER, channels=CHANNELS)
    x, place = draw(1, 1, 1, CHANNELS), BUFFER + 1 * 5 + 3  # row 1, column 3
    rotated = rotate(x, table(queries=torch.tensor([[place]]), keys=AT).queries).flatten().tolist()
    angles = [1 * 1.0, 1 * 0.1, 3 * 1.0, 3 * 0.1]  # frequencies 100^0 and 100^-1/2
    first, second = x.flatten().chunk(2)
    for i, angle in enumerate(angles):
        turned = complex(first[i], second[i]) * complex(math.cos(angle), math.sin(angle))
        assert complex(rotated[i], rotated[4 + i]) == pytest.approx(turned, abs=1e-6)


def test_buffer_tokens_are_not_rotated():
    table = RotaryTable(GRID, buffer=BUFFER, channels=CHANNELS)
    x = draw(2, 1, BUFFER, CHANNELS)
    assert torch.equal(rotate(x, table(queries=AT[:, :BUFFER], keys=AT).queries), x)


@torch.no_grad()
def test_modern_states_at_wanted_positions_equal_those_of_the_full_pass():
    model = tiny_model(blocks="modern", latent=(3, 4, 6))
    tokens, labels = draw(3, 24, 3), torch.tensor([0, 1, 2])
    mask, wanted = draw(3, 24, seed=3) > 0, torch.tensor([[5, 0, 23], [1, 2, 3], [9, 9, 4]])
    full = model.hidden(tokens, mask, labels)
    states = model.hidden(tokens, mask, labels, wanted=wanted)
    torch.testing.assert_close(states, full.gather(1, wanted[..., None].expand(-1, -1, full.shape[-1])))


def test_modern_blocks_know_positions_without_a_table():
    model = tiny_model(blocks="modern")
    model.positions.data.zero_()
    tokens, labels = draw(1, 16, 3), torch.tensor([0])
    mask = torch.zeros(1, 16, dtype=torch.bool)
    with torch.no_grad():
        hidden, swapped = (model.hidden(each, mask, labels)[0] for each in (tokens, tokens[:, [1, 0, *range(2, 16)]]))
    assert not torch.allclose(hidden[5], swapped[5], atol=1e-4)
    plain = tiny_model()
    plain.positions.data.zero_()
    with torch.no_grad():
        hidden, swapped = (plain.hidden(each, mask, labels)[0] for each in (tokens, tokens[:, [1, 0, *range(2, 16)]]))
    torch.testing.assert_close(hidden[5], swapped[5])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_modern_blocks_train_in_bfloat16_and_with_checkpointing(attention):
    model = tiny_model(blocks="modern", attention=attention).train()
    latents, labels = draw(6, 3, 4, 4), torch.arange(6) % 3

    def gradients(checkpointing: bool, half: bool) -> torch.Tensor:
        model.transformer.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(latents, labels, temperature=1.0, source=stream(4)).value
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradients(checkpointing=False, half=False)
    torch.testing.assert_close(gradients(checkpointing=True, half=False), exact)
    assert (gradients(checkpointing=False, half=True) - exact).norm() < 0.1 * exact.norm()


def test_modern_blocks_learn():
    model = tiny_model(blocks="modern").train()
    latents, labels = draw(16, 3, 4, 4), torch.arange(16) % 3
    optimizer = adamw([Group([*model.parameters()], weight_decay=0.0)], learning_rate=3e-3, beta1=0.9, beta2=0.95)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(latents, labels, temperature=1.0, source=stream(4)).value
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_modern_blocks_have_about_as_many_weights():
    def weights(kind: str) -> int:
        transformer = Transformer(model_options(width=96, mlp_ratio=4.0, blocks=kind))
        return sum(p.numel() for p in transformer.parameters())

    assert weights("modern") == pytest.approx(weights("vit"), rel=0.02)


@torch.no_grad()
def test_modern_models_survive_their_file(tmp_path):
    model = tiny_model(blocks="modern").eval()
    save_model(tmp_path / "model.safetensors", model, {})
    loaded, _ = load_model(tmp_path / "model.safetensors")
    tokens, labels = patchify(draw(2, 3, 4, 4), 1), torch.tensor([0, 2])
    mask = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(loaded.hidden(tokens, mask, labels), model.hidden(tokens, mask, labels))
    assert not any("rotary" in name for name in model.state_dict())


def test_models_of_versions_without_the_option_have_vit_blocks():
    stored = tiny_model().shape.as_dict()
    assert stored["model"].pop("blocks") == "vit"
    assert Shape.from_dict(stored).model.blocks == "vit"
