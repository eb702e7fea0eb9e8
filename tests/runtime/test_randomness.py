import pytest
import torch

from ear.runtime.randomness import (
    Coins,
    DataOrder,
    Stream,
    derive,
    image_streams,
    integers,
    normal,
    seed_dropout,
    stream,
    uniform,
)


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
    alone = [uniform((3, 2), image_streams(5, [k])) for k in range(4)]
    together = uniform((12, 2), image_streams(5, range(4)))
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(alone[0], alone[1])


def test_draws_have_their_moments():
    u, n = uniform((100_000,), stream(0, "u")), normal((100_000,), stream(0, "n"))
    assert u.dtype == n.dtype == torch.float32
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.001
    assert abs(n.mean()) < 0.01
    assert abs(n.std() - 1) < 0.01
    assert abs((n.abs() > 2).double().mean() - 0.0455) < 0.002
    assert abs((n**4).mean() - 3) < 0.1
    assert abs((n[0::2] * n[1::2]).mean()) < 0.01
    counts = torch.bincount(integers(5, (100_000,), stream(0, "i")), minlength=5) / 100_000
    assert (counts - 0.2).abs().max() < 0.006


def test_a_stream_goes_on_where_it_stopped():
    whole, parts = stream(3), stream(3)
    assert torch.equal(uniform((8,), whole), torch.cat([uniform((4,), parts), uniform((4,), parts)]))
    assert not torch.equal(uniform((4,), stream(3)), uniform((4,), parts))
    assert uniform((5, 0), parts).shape == normal((5, 0), parts).shape == (5, 0)


def test_seeds_that_share_their_low_bits_differ():
    """torch's CPU generator keeps 32 bits of its seed."""
    assert not torch.equal(uniform((4,), Stream([1])), uniform((4,), Stream([1 + 2**32])))


def test_dropout_is_a_function_of_position():
    layer = torch.nn.Dropout(0.5)
    seed_dropout(1, 64)
    first = layer(torch.ones(100))
    seed_dropout(1, 64)
    assert torch.equal(first, layer(torch.ones(100)))
    seed_dropout(1, 128)
    assert not torch.equal(first, layer(torch.ones(100)))


def test_the_programs_own_numbers_are_those_of_the_stream():
    own, drawn = stream(3), stream(3)
    assert [own.fraction() for _ in range(5)] == [uniform((1,), drawn).item() for _ in range(5)]


@pytest.mark.parametrize("start", [0, 5, 2**16 - 3, 2**20 + 1])
def test_coins_are_a_function_of_their_numbers(start):
    found = Coins(1, "mirror").at(start, 2**16 + 9)
    assert [bool(Coins(1, "mirror").at(start + k, 1)[0]) for k in (0, 2, 3, 4, 2**16)] == [
        bool(found[k]) for k in (0, 2, 3, 4, 2**16)
    ]
    assert len(found) == 2**16 + 9


def test_coins_are_fair_and_of_their_key():
    tossed = Coins(1, "mirror").at(0, 2**18)
    assert abs(tossed.mean() - 0.5) < 0.004  # 4 standard deviations
    assert abs((tossed[1:] == tossed[:-1]).mean() - 0.5) < 0.004
    assert abs((tossed == Coins(2, "mirror").at(0, 2**18)).mean() - 0.5) < 0.004
