"""Means of logged values over steps and ranks, without waiting for the device at each step."""

import torch
from torch import Tensor

from ear.runtime import distributed


class Means:
    """Running sums of named scalars, kept on the device; every rank adds its part."""

    def __init__(self):
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Tensor], weight: float) -> None:
        """Add scalars. For each name, the weights of one step, over all its micro-batches and ranks, must sum to 1."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * weight

    def read(self) -> dict[str, float]:
        """The means over the steps since the last call, the same on every rank; resets the sums."""
        sums = distributed.total(torch.stack(list(self._sums.values()))).tolist()
        means = {name: value / self.steps for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self.steps = {}, 0
        return means

    def state(self) -> tuple[Tensor, dict]:
        """(sums [world size, names], description), from which `restore` continues exactly."""
        sums = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(0)
        return distributed.gathered(sums), {"steps": self.steps, "figures": list(self._sums)}

    def restore(self, sums: Tensor, description: dict) -> None:
        """Load the sums of the same world size; with another world size, rank 0 gets all of them."""
        if len(sums) == distributed.size():
            own = sums[distributed.rank()]
        else:
            own = sums.sum(0) * float(distributed.is_main())
        self._sums = dict(zip(description["figures"], own, strict=True))
        self.steps = description["steps"]
