import pytest
import torch

from ear.runtime.randomness import DataOrder, ImageStreams, derive, generator, normal, seed_dropout, uniform


def test_derived_seeds_are_fixed_for_ever():
    assert derive(0, "weights") == derive(0, "weights")
    assert len({derive(s, name) for s in range(4) for name in ("a", "b", "ab")}) == 12
    assert derive(0, "order", 1) != derive(0, "order", 2)
    # A value that must never change: every recorded run depends on it.
    assert derive(0, "order", 0) == 0x36E5703597F5E537


def test_epochs_are_exact_shuffles():
    order = DataOrder(rows=10, seed=3)
    first, second = order.indices(0, 10), order.indices(10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("start", [0, 3, 9, 10, 27])
def test_order_is_a_function_of_images_seen(start):
    whole = DataOrder(rows=10, seed=3).indices(0, 40)
    assert DataOrder(rows=10, seed=3).indices(start, 13).tolist() == whole[start : start + 13].tolist()


def test_image_streams_do_not_depend_on_the_batch():
    alone = [uniform((3, 2), ImageStreams(5, [k])) for k in range(4)]
    together = uniform((12, 2), ImageStreams(5, range(4)))
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(alone[0], alone[1])


def test_draws_have_their_moments():
    u, n = uniform((100_000,), generator(0, "u")), normal((100_000,), generator(0, "n"))
    assert u.dtype == n.dtype == torch.float32
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.001
    assert abs(n.mean()) < 0.01
    assert abs(n.std() - 1) < 0.01


def test_dropout_is_a_function_of_position():
    layer = torch.nn.Dropout(0.5)
    seed_dropout(1, 64)
    first = layer(torch.ones(100))
    seed_dropout(1, 64)
    assert torch.equal(first, layer(torch.ones(100)))
    seed_dropout(1, 128)
    assert not torch.equal(first, layer(torch.ones(100)))
