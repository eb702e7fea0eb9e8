"""Philox against the published answers, and the two implementations against each other."""

import numpy as np
import pytest
import torch

from ear.runtime import philox
from ear.runtime.philox import random_bits

# Known answers of Random123, the authors' library: counter, key, output.
ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KEYS = [0, 1, 2**63 - 1, 0xA4093822299F31D0 >> 1, 2**32]


@pytest.mark.parametrize(("counter", "key", "output"), ANSWERS)
def test_known_answers(counter, key, output):
    words = [[np.array([word], np.uint32) for word in part] for part in (counter, key)]
    assert [int(word[0]) for word in philox._mix_on_cpu(*words)] == output


@pytest.mark.parametrize("keys", [KEYS, KEYS[3:4]])
@pytest.mark.parametrize("first", [0, 7, 2**32 - 3, 2**40])
def test_both_implementations_give_equal_bits(keys, first):
    on_cpu = random_bits(keys, first, 50)
    assert torch.equal(philox._on_gpu(keys, first, 50, torch.device("cpu")), on_cpu)
    assert (on_cpu.dtype, on_cpu.shape) == (torch.int32, (len(keys), 50, 4))


def test_keys_and_counters_have_numbers_of_their_own():
    bits = random_bits(range(1000), 0, 250)
    assert torch.equal(random_bits([5], 200, 50)[0], bits[5, 200:])
    assert len(bits.unique()) > 0.999 * bits.numel()  # of 10^6 words of 32 bits, about 116 pairs are equal
    ones = torch.stack([(bits >> bit) & 1 for bit in range(32)]).double().mean(dim=(1, 2))
    assert (ones - 0.5).abs().max() < 0.003  # 6 standard deviations: for every bit and lane


@pytest.mark.gpu
def test_the_gpu_gives_equal_bits():
    assert torch.equal(random_bits(KEYS, 2**32 - 3, 50, "cuda").cpu(), random_bits(KEYS, 2**32 - 3, 50))
