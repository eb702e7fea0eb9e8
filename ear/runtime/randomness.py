"""Randomness as an argument: seeds derived by name, streams of numbers that are the same on every device.

Initial weights and permutations come from torch's CPU generators, all other numbers from a `Stream`. Only dropout reads
torch's global random state; `seed_dropout` seeds it for every micro-batch. Draws are float32: low precision has too few
distinct values.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from ear.runtime.philox import host_bits, random_bits

_BLOCK = 4  # numbers of 32 bits that a counter gives


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose: the same (seed, names) give the same 63 bits on every machine."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of torch, for initial weights and permutations; it uses the low 32 bits of its seed only."""
    return torch.Generator().manual_seed(derive(seed, *names))


class Stream:
    """Random numbers as a function of a key and of how many were drawn before: the same on CPU and GPU.

    With several keys, each key gives an equal share of the rows of a draw, in order; its numbers do not depend on the
    other keys. All numbers are drawn on the device that needs them, without waiting for it.
    """

    def __init__(self, keys: Sequence[int]):  # 64-bit
        self._keys, self._block = list(keys), 0

    def bits(self, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """int32 of this shape, all 32 bits random; shape[0] must be a multiple of the number of keys."""
        count = math.prod(shape)
        assert shape[0] % len(self._keys) == 0, f"{shape[0]} rows cannot be shared by {len(self._keys)} keys"
        each = count // len(self._keys)
        blocks = -(-each // _BLOCK)
        drawn = random_bits(self._keys, self._block, blocks, device)
        self._block += blocks
        return drawn.flatten(1)[:, :each].reshape(tuple(shape))

    def fraction(self) -> float:
        """One uniform number in [0, 1), drawn on the host; only for a stream with a single key."""
        assert len(self._keys) == 1
        bits = host_bits(self._keys, self._block, 1)
        self._block += 1
        return int(bits[0, 0, 0] >> 8 & 0xFFFFFF) * 2.0**-24


def stream(seed: int, *names: object) -> Stream:
    """The random numbers of one purpose."""
    return Stream([derive(seed, *names)])


def image_streams(seed: int, numbers: Sequence[int]) -> Stream:
    """One key per image: what image k draws depends on (seed, k) alone, not on the rest of the batch."""
    return Stream([derive(seed, "image", int(k)) for k in numbers])


def uniform(shape: Sequence[int], source: Stream, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform float32 numbers in [0, 1) on `device`: multiples of 2^-24."""
    return ((source.bits(shape, device) >> 8) & 0xFFFFFF).float() * 2.0**-24


def normal(shape: Sequence[int], source: Stream, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 numbers on `device` (Box and Muller), at most 6.7 from 0; devices round differently."""
    rows, each = shape[0], math.prod(shape[1:])
    bits = source.bits((rows, 2, -(-each // 2)), device)
    radius = (((bits[:, 0].long() & 0xFFFFFFFF) + 1).float() * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = ((bits[:, 1] >> 8) & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :each].reshape(tuple(shape))


def integers(high: int, shape: Sequence[int], source: Stream, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform int64 numbers in 0 .. high - 1, for high up to 2^16 (the bias is below 2^-8 of a probability)."""
    return (uniform(shape, source, device) * high).long()


def choose(logits: torch.Tensor, source: Stream, count: int = 1) -> torch.Tensor:
    """Logits [N, K] => indices, int64 [N, count], with probability softmax(logits), from one uniform number each."""
    threshold = uniform((len(logits), count), source, logits.device)
    cumulative = logits.softmax(-1).cumsum(-1)
    index = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)
    return index.clamp_(max=logits.shape[-1] - 1)  # which NaN exceeds


def seed_dropout(seed: int, position: int) -> None:
    """Seed torch's global generators, used only by dropout, for the micro-batch that starts at image `position`."""
    torch.manual_seed(derive(seed, "dropout", position))


class DataOrder:
    """Global shuffling as a function of images seen: epoch e visits all rows in a permutation given by (seed, e)."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def indices(self, start: int, count: int) -> torch.Tensor:
        """int64 [count]: rows at positions start .. start + count - 1 of the sequence of all epochs."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.rows)
            if epoch != self._epoch:
                order = torch.randperm(self.rows, generator=generator(self.seed, "order", epoch))
                self._epoch, self._permutation = epoch, order
            part = self._permutation[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


class Coins:
    """Fair coins as a function of their numbers, computed many at a time."""

    _EACH = 2**16

    def __init__(self, seed: int, *names: object):
        self._key = derive(seed, *names)
        self._part, self._coins = -1, np.empty(0, bool)

    def at(self, start: int, count: int) -> np.ndarray:
        """bool [count]: coins number start .. start + count - 1."""
        parts = []
        while count:
            part, offset = divmod(start, self._EACH)
            if part != self._part:
                self._part, self._coins = part, self._toss(part)
            found = self._coins[offset : offset + count]
            parts.append(found)
            start, count = start + len(found), count - len(found)
        return np.concatenate(parts) if parts else np.empty(0, bool)

    def _toss(self, part: int) -> np.ndarray:
        blocks = self._EACH // (32 * _BLOCK)
        bits = host_bits([self._key], part * blocks, blocks)
        return np.unpackbits(bits.view(np.uint8).reshape(-1), bitorder="little").astype(bool)
