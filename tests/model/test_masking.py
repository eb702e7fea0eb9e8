import itertools

import pytest
import torch

from ear.model.masking import mask_first, masked_after, masked_count, random_orders
from ear.runtime.randomness import stream


def revealed(tokens: int, steps: int) -> list[int]:
    left = [tokens, *masked_after(tokens, steps)]
    return [a - b for a, b in itertools.pairwise(left)]


def test_published_schedule():
    counts = revealed(256, 64)
    assert counts[:13] == [1] * 13
    assert counts[13:18] == [2, 3, 2, 2, 3]
    assert max(counts) == 7
    assert sum(counts) == 256


@pytest.mark.parametrize("steps", [1, 16, 256, 300])
def test_every_token_is_revealed_once(steps):
    counts = revealed(256, steps)
    assert len(counts) == steps
    assert sum(counts) == 256
    assert min(counts) >= 0


def test_one_step_reveals_all():
    assert masked_after(16, 1) == [0]


def test_orders_are_independent_uniform_permutations():
    orders = random_orders(4000, 5, stream(0, "orders"))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(5).expand(4000, 5))
    first = torch.bincount(orders[:, 0], minlength=5) / 4000
    assert (first - 0.2).abs().max() < 0.03


def test_masked_counts_follow_the_truncated_gaussian():
    source = stream(0, "ratio")
    counts = torch.tensor([masked_count(256, 0.7, source) for _ in range(4000)])
    assert counts.min() >= 180
    assert counts.max() <= 256
    assert abs(counts.double().mean() - 222.46) < 1
    assert abs(counts.double().std() / 256 - 0.084) < 0.004


def test_full_masking_where_the_minimum_is_one():
    assert masked_count(16, 1.0, stream(0)) == 16


def test_mask_covers_the_start_of_the_order():
    orders = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert mask_first(orders, 2).tolist() == [[True, False, True], [False, True, True]]
