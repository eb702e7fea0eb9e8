"""Philox 4x32-10: 128 random bits as a function of a 64-bit key and a 128-bit counter.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. It is integer
arithmetic, so NumPy on a CPU and PyTorch on a GPU give equal bits. (On a CPU, NumPy's 32-bit lanes take a quarter of
the time of PyTorch's 64-bit ones.)
"""

from collections.abc import Sequence

import numpy as np
import torch

_ROUNDS = 10
_FIRST, _SECOND = 0xD2511F53, 0xCD9E8D57  # multipliers
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_LOW = 0xFFFFFFFF


def random_bits(keys: Sequence[int], first: int, blocks: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 [K, blocks, 4]: for each of K keys, the blocks of 128 bits with counters first .. first + blocks - 1."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(host_bits(keys, first, blocks))
    return _on_gpu(list(keys), first, blocks, torch.device(device))


def host_bits(keys: Sequence[int], first: int, blocks: int) -> np.ndarray:
    """The bits of `random_bits` as a NumPy array, int32 [K, blocks, 4]."""
    counter = np.arange(first, first + blocks, dtype=np.uint64)
    zero = np.zeros((len(keys), blocks), np.uint32)
    low, high = (zero + half for half in _halves(counter))
    key = [half[:, None] for half in _halves(np.array(keys, dtype=np.uint64))]
    return np.stack(_mix_on_cpu([low, high, zero, zero], key), axis=-1).view(np.int32)


def _mix_on_cpu(counter: list[np.ndarray], key: list[np.ndarray]) -> list[np.ndarray]:
    """Four and two arrays of uint32 => four arrays of random uint32."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(_ROUNDS):
        (low_1, high_1), (low_2, high_2) = _halves(a * np.uint64(_FIRST)), _halves(c * np.uint64(_SECOND))
        a, b, c, d = high_2 ^ b ^ low, low_2, high_1 ^ d ^ high, low_1
        low, high = low + np.uint32(_WEYL[0]), high + np.uint32(_WEYL[1])
    return [a, b, c, d]


def _halves(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 => its low and high 32 bits, as uint32."""
    return words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)


def _on_gpu(keys: list[int], first: int, blocks: int, device: torch.device) -> torch.Tensor:
    counter = torch.arange(first, first + blocks, device=device)
    zero = torch.zeros((len(keys), blocks), dtype=torch.int64, device=device)
    a, b, c, d = zero + (counter & _LOW), zero + (counter >> 32), zero, zero
    low: torch.Tensor | int
    high: torch.Tensor | int
    if len(keys) == 1:  # needs no copy to the device
        low, high = keys[0] & _LOW, keys[0] >> 32
    else:
        key = torch.tensor([[value & _LOW, value >> 32] for value in keys]).to(device, non_blocking=True)
        low, high = key[:, :1], key[:, 1:]
    for _ in range(_ROUNDS):
        # 64-bit products wrap, which leaves their low 64 bits right; the masks undo the sign.
        first_product, second_product = a * _FIRST, c * _SECOND
        a, c = ((second_product >> 32) & _LOW) ^ b ^ low, ((first_product >> 32) & _LOW) ^ d ^ high
        b, d = second_product & _LOW, first_product & _LOW
        low, high = (low + _WEYL[0]) & _LOW, (high + _WEYL[1]) & _LOW
    return torch.stack([a, b, c, d], dim=-1).to(torch.int32)
