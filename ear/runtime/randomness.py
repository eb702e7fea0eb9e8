"""Randomness as an argument: seeds derived by name, one stream per image, draws independent of the device.

Only dropout reads torch's global random state; `seed_dropout` seeds it for every micro-batch. All draws are float32 on
the generator's device: low precision has too few distinct values.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose: the same (seed, names) give the same 63 bits on every machine."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *names))


class ImageStreams:
    """One generator per image, used like a single one: the rows of a draw belong to the images in order.

    The numbers of image k depend only on (seed, k), not on the rest of the batch (as EDM's per-image generators).
    """

    def __init__(self, seed: int, indices: Sequence[int]):
        self._generators = [generator(seed, "image", int(k)) for k in indices]

    def draw(self, function, shape: Sequence[int]) -> torch.Tensor:
        """Draw with torch.rand or torch.randn; shape[0] must be a multiple of the number of images."""
        count = len(self._generators)
        rows, rest = divmod(shape[0], count)
        assert rest == 0, f"{shape[0]} rows cannot be shared by {count} images"
        return torch.cat([function((rows, *shape[1:]), generator=g) for g in self._generators])


RandomSource = torch.Generator | ImageStreams


def _draw(function, shape: Sequence[int], source: RandomSource, device) -> torch.Tensor:
    if isinstance(source, torch.Generator):
        return function(tuple(shape), generator=source, device=source.device).to(device)
    return source.draw(function, shape).to(device)


def uniform(shape: Sequence[int], source: RandomSource, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform float32 numbers in [0, 1) on `device`."""
    return _draw(torch.rand, shape, source, device)


def normal(shape: Sequence[int], source: RandomSource, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 numbers on `device`."""
    return _draw(torch.randn, shape, source, device)


def choose(logits: torch.Tensor, source: RandomSource) -> torch.Tensor:
    """Logits [N, K] => one index per row, int64 [N], with probability softmax(logits), from one uniform number."""
    threshold = uniform((len(logits), 1), source, logits.device)
    cumulative = logits.softmax(-1).cumsum(-1)
    return (cumulative < threshold * cumulative[:, -1:]).sum(-1)


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
