"""Features and logits of many images, batch by batch: shared by ranks, saved so that a killed pass resumes.

N images, D features, K classes, side S in pixels.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ear.data.prepared import PreparedImages
from ear.display.progress import Progress
from ear.errors import UserError
from ear.evaluation.extractors import Extractor
from ear.files.tensors import read_tensors, write_tensors
from ear.runtime import distributed


class LabelledImages(Protocol):
    """Labelled images, such as `PreparedImages`, `Reconstructions` and `GeneratedImages`."""

    labels: np.ndarray  # int64 [N]

    def __len__(self) -> int: ...

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3] of consecutive images."""


class Selection:
    """Some rows of prepared images, in the order given."""

    def __init__(self, source: PreparedImages, rows: Tensor):
        self._source, self._rows = source, rows.numpy()
        self.labels = source.labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3]."""
        return self._source.images(self._rows[rows.start : rows.stop])


class Batch(NamedTuple):
    """An extractor's output for n consecutive images."""

    features: Tensor  # float32 [n, D]
    logits: Tensor  # float32 [n, K]
    labels: Tensor  # int64 [n]


def extract(
    source: LabelledImages,
    *,
    extractor: Extractor,
    batch_size: int,
    title: str,
    folder: Path,  # keeps finished batches, from which a killed pass resumes
) -> Iterator[Batch]:
    """Yield features, logits and labels of all images in order.

    Rank r extracts batches r, r + world_size, ...; rank 0 yields all of them in order, so the result does not depend on
    the world size. `folder` keeps finished batches; use it only for this source, order and batch size (other extractors
    get their own subfolder). Raises UserError if there is no image, or a feature is infinite or NaN.
    """
    if not len(source):
        raise UserError(f"{title}: there are no images; run the stage that writes them again.")
    kept = folder / extractor.sha256[:16]
    kept.mkdir(parents=True, exist_ok=True)

    def extract_batch(first: int) -> Batch:
        file = kept / f"{first:010d}.safetensors"
        with contextlib.suppress(UserError):  # absent or damaged: extracted again
            return Batch(**read_tensors(file)[0])
        rows = range(first, min(first + batch_size, len(source)))
        features, logits = extractor(source.images(rows))
        finite = features.isfinite().all(1) & logits.isfinite().all(1)
        if not finite.all():
            bad = first + int((~finite).nonzero()[0])
            raise UserError(f"{title}: the features of image {bad} are infinite or NaN; check the extractor's weights.")
        batch = Batch(features, logits, torch.from_numpy(source.labels[rows.start : rows.stop]))
        write_tensors(file, batch._asdict(), {})
        return batch

    with Progress(title, len(source)) as progress:
        for batch in distributed.in_turns(range(0, len(source), batch_size), extract_batch):
            yield batch
            progress.advance(len(batch.labels))


def gather(batches: Iterable[Batch], images: int) -> Batch:
    """Concatenate batches of `images` rows in total, without holding them twice in memory."""
    gathered: Batch | None = None
    done = 0
    for batch in batches:
        gathered = gathered or Batch(*(part.new_empty(images, *part.shape[1:]) for part in batch))
        for target, part in zip(gathered, batch, strict=True):
            target[done : done + len(part)] = part
        done += len(batch.labels)
    assert gathered is not None
    assert done == images, f"{done} rows for {images} images"
    return gathered
