"""Batches of images drawn into samples.h5, by the ranks of a stage or by the workers of a Dask cluster.

The bytes of a batch depend only on the batch, so both ways give the same file on machines of the same kind.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ear.files.digests import sha256
from ear.runtime.device import check_precision, prepare_device
from ear.runtime.executor import check_shared, share_shards
from ear.sampling import samples
from ear.sampling.generation import ImageSampler, batches
from ear.sampling.settings import SamplingSettings

Batch = tuple[int, Sequence[int]]  # number of the first image, labels


@dataclass(frozen=True)
class Setup:
    """Everything an ImageSampler needs: the files it is loaded from, its settings and its hardware."""

    model: Path
    tokenizer: Path
    settings: SamplingSettings
    device: str  # auto, cpu or cuda
    threads: int  # of a CPU
    compile: bool  # transformer and head, on CUDA

    def open(self) -> ImageSampler:
        """The sampler; raises UserError if device or precision are not available, or the files do not match."""
        device = prepare_device(self.device, self.threads)
        for key in ("precision", "decoder_precision"):
            check_precision(getattr(self.settings, key), device.type == "cuda", key=f"sample.{key}")
        sampler = ImageSampler.open(self.model, self.tokenizer, device)
        if self.compile and device.type == "cuda":
            sampler.model.compile_parts()
        return sampler


def missing(file: Path, labels: Sequence[int], batch_size: int) -> list[Batch]:
    """The batches of `labels` that are not yet in the file of `samples.create`."""
    return [batch for batch in batches(labels, batch_size) if not _mark(file, batch[0]).exists()]


def forget(file: Path) -> None:
    """Delete the marks of an earlier file of this name."""
    for mark in file.parent.glob("finished-*"):
        mark.unlink()


def draw(
    left: Sequence[Batch],
    file: Path,
    *,
    sampler: ImageSampler,
    setup: Setup,  # of the sampler; a worker of the cluster opens its own
    cluster: str = "",  # address of a Dask scheduler to use instead of the ranks
) -> Iterator[int]:
    """Draw the batches into the file; yields the number of images of each finished batch, on rank 0.

    All ranks must exhaust the iterator: that is where they work. Raises as `executor.map_shards` and
    `ImageSampler.images` do.
    """
    absolute = dataclasses.replace(
        setup, device=sampler.device.type, model=setup.model.resolve(), tokenizer=setup.tokenizer.resolve()
    )
    remotely = functools.partial(
        _draw_remotely,
        file=file.resolve(),
        setup=absolute,
        digests=(sha256(setup.model), sha256(setup.tokenizer)) if cluster else (),
    )
    here = functools.partial(_draw, file=file, sampler=sampler, settings=setup.settings)
    for _, count in share_shards(left, here=here, there=remotely, cluster=cluster):
        yield count


def _draw(batch: Batch, file: Path, sampler: ImageSampler, settings: SamplingSettings) -> int:
    first, labels = batch
    samples.write(file, first, sampler.images(labels, settings, first=first))
    _mark(file, first).touch()
    return len(labels)


def _mark(file: Path, first: int) -> Path:
    """The empty file that marks a batch as finished."""
    return file.with_name(f"finished-{first:09d}")


def _draw_remotely(batch: Batch, *, file: Path, setup: Setup, digests: tuple[str, ...]) -> int:
    """`_draw` in a worker of a cluster."""
    sampler = _opened(setup, digests)
    prepare_device(setup.device, setup.threads)  # every time: CPU threads are a per-thread setting
    return _draw(batch, file, sampler, setup.settings)


@functools.lru_cache(maxsize=1)  # once per worker, not once per batch
def _opened(setup: Setup, digests: tuple[str, ...]) -> ImageSampler:
    for path, digest in zip((setup.model, setup.tokenizer), digests, strict=True):
        check_shared(path, digest)
    return setup.open()
