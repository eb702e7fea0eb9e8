"""Statistics of what an extractor returns, D features and K logits: mean, covariance, class accuracy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ear.errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mu: Tensor  # float64 [D]
    sigma: Tensor  # float64 [D, D], unbiased


class Moments:
    """Sums of features in float64, accumulated batch by batch, so a set need not fit in memory."""

    def __init__(self):
        self.count = 0
        self._sum = torch.zeros((), dtype=torch.float64)  # float64 [D] after the first batch
        self._outer = torch.zeros((), dtype=torch.float64)  # float64 [D, D]

    def add(self, features: Tensor) -> None:
        """Add a batch of features [n, D]; equal batches in equal order give equal bits."""
        rows = features.double()
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._outer = self._outer + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all rows added; raises UserError for fewer than 2."""
        if self.count < 2:
            raise UserError(f"a covariance of features needs at least 2 images, and there are {self.count}; add more.")
        mu = self._sum / self.count
        return Gaussian(mu, (self._outer - self.count * torch.outer(mu, mu)) / (self.count - 1))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of images whose largest logit [N, K] is at their label [N]."""
    return (logits.argmax(1) == labels).double().mean().item()
