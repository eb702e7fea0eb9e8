"""Extra columns of work/live/STAGE/training.tsv for judging a run in progress; the stage's final log lacks them."""

import collections
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ear.model.autoregressive import AutoregressiveModel, MeanLoss
from ear.runtime import distributed
from ear.runtime.device import data_sheet_peak

_PARTS = 4  # intervals of the predicted share of tokens
_KEPT = 4096  # micro-batches kept between two log rows, at most; the newest ones


class Monitor:
    """Watches the losses of this rank's micro-batches.

    tokens: [images x L, D], training tokens image by image, for losses to compare with. temperature, device: of the
    training.
    """

    def __init__(self, model: AutoregressiveModel, tokens: Tensor, temperature: float, device: torch.device):
        self._seen: collections.deque[tuple[float, Tensor]] = collections.deque(maxlen=_KEPT)
        self._references = model.score.references(tokens.unflatten(0, (-1, model.tokens)), temperature)
        least, masked = model.shape.model.mask_ratio_min, model.shape.model.attention == "bidirectional"
        self._edges = _edges(least) if masked and least < 1 else []
        peak = data_sheet_peak(device)
        self._share_of_peak = _training_flops(model) / peak if peak else 0.0

    def saw(self, loss: MeanLoss) -> None:
        """Note the loss of a micro-batch; does not wait for the device."""
        self._seen.append((loss.predicted, loss.value.detach()))

    def figures(self, row: Mapping[str, float]) -> dict[str, float | None]:
        """Extra figures for a log row, from the micro-batches since the last call.

        These are the mean loss per range of the predicted share of tokens (None for a range without micro-batches) and
        the losses of `Score.references`. Known GPUs add the model FLOPs utilisation (MFU): the operations per second
        that the model needs, divided by the bfloat16 peak of all GPUs.
        """
        seen, figures = [*self._seen], {}
        self._seen.clear()
        if self._edges:
            losses = torch.stack([loss for _, loss in seen]).tolist() if seen else []
            figures = by_share([share for share, _ in seen], losses, self._edges)
        if self._share_of_peak:
            figures["mfu"] = row["images_per_second"] * self._share_of_peak / distributed.size()
        return figures | self._references


def _training_flops(model: AutoregressiveModel) -> int:
    from ear.model.flops import training_flops  # counts with tensors without data, which takes seconds to import

    return training_flops(model.shape)["forward and backward"]


def _edges(least: float) -> list[float]:
    return [least + (1 - least) * part / _PARTS for part in range(_PARTS + 1)]


def by_share(shares: Sequence[float], losses: Sequence[float], edges: Sequence[float]) -> dict[str, float | None]:
    """Mean loss of the micro-batches whose share of predicted tokens lies between neighbouring edges.

    None for an interval without micro-batches.
    """
    figures: dict[str, float | None] = {}
    digits = 0 if edges[1] - edges[0] >= 0.01 else 2  # of percent, so that no two intervals share a name
    for low, high in itertools.pairwise(edges):
        last = high == edges[-1]
        found = zip(shares, losses, strict=True)
        inside = [loss for share, loss in found if low <= share and (share < high or last)]
        name = f"loss_masked_{low:.{digits}%}_{high:.{digits}%}".replace("%", "")
        figures[name] = sum(inside) / len(inside) if inside else None
    return figures
