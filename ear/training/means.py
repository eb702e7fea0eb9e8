"""Means of figures over steps and processes, read without making the device wait at each step."""

import torch
from torch import Tensor

from ear.runtime import distributed


class Means:
    """Sums of named figures, kept on the device; every process adds its part."""

    def __init__(self):
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Tensor], weight: float) -> None:
        """Add scalars; the weights of one step, over all its micro-batches and processes, come to 1 for each name."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * weight

    def read(self) -> dict[str, float]:
        """The means over the steps counted, the same in every process; starts anew."""
        sums = distributed.total(torch.stack(list(self._sums.values()))).tolist()
        means = {name: value / self.steps for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self.steps = {}, 0
        return means

    def state(self) -> tuple[Tensor, dict]:
        """(sums [processes, figures], description), from which `restore` goes on exactly."""
        sums = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(0)
        return distributed.gathered(sums), {"steps": self.steps, "figures": list(self._sums)}

    def restore(self, sums: Tensor, description: dict) -> None:
        """Take up the sums of the same number of processes; of another number, all go to the main process."""
        if len(sums) == distributed.size():
            own = sums[distributed.rank()]
        else:
            own = sums.sum(0) * float(distributed.is_main())
        self._sums = dict(zip(description["figures"], own, strict=True))
        self.steps = description["steps"]
