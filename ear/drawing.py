"""Batches of images drawn into samples.h5: by this process and its peers, or by the workers of a Dask cluster.

What a batch writes depends on the batch alone, so every way gives the same bytes where machines are alike.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ear import device as devices
from ear import distributed, parallel, records, samples
from ear.generation import Generator, batches

Batch = tuple[int, Sequence[int]]  # number of the first image, labels


@dataclass(frozen=True)
class Setup:
    """The files of a generator, and what it computes with."""

    model: Path
    tokenizer: Path
    device: str  # auto, cpu or cuda
    threads: int  # of a CPU
    precision: str
    compile: bool  # the transformer, where the device is CUDA

    def open(self) -> Generator:
        """The generator; raises ValueError where device or precision are not to be had, or the files do not match."""
        device = devices.prepare(self.device, self.threads)
        devices.set_precision(self.precision, device, key="sample.precision")
        generator = Generator.open(self.model, self.tokenizer, device)
        if self.compile and device.type == "cuda":
            devices.compile_in_place(generator.model.transformer)
        return generator


def missing(file: Path, labels: Sequence[int], batch_size: int) -> list[Batch]:
    """The batches of `labels` that the file of `samples.create` still lacks."""
    return [batch for batch in batches(labels, batch_size) if not _mark(file, batch[0]).exists()]


def draw(
    left: Sequence[Batch],
    file: Path,
    *,
    generator: Generator,
    setup: Setup,  # of the generator: a worker of the cluster opens its own
    settings: Mapping[str, object],  # of `Generator.images`
    cluster: str = "",  # address of a Dask scheduler to use instead of this process and its peers
) -> Iterator[int]:
    """Draw the batches into the file; yields the number of images of each one done, in the main process alone.

    All processes of a group have to exhaust the iterator: that is where they work. Raises as `parallel.map_shards` and
    `Generator.images` do.
    """
    if not cluster:
        yield from distributed.in_turns(left, lambda batch: _draw(batch, file, generator, settings))
    elif distributed.is_main():
        paths = {"model": setup.model.resolve(), "tokenizer": setup.tokenizer.resolve()}
        work = functools.partial(
            _remotely,
            file=file.resolve(),
            setup=dataclasses.replace(setup, device=generator.device.type, **paths),
            digests=tuple(records.sha256(path) for path in paths.values()),
            settings=settings,
        )
        for _, count in parallel.map_shards(work, left, workers=0, cluster=cluster):
            yield count


def _draw(batch: Batch, file: Path, generator: Generator, settings: Mapping[str, object]) -> int:
    first, labels = batch
    samples.write(file, first, generator.images(labels, first=first, **settings))
    _mark(file, first).touch()
    return len(labels)


def _mark(file: Path, first: int) -> Path:
    """The empty file that says a batch is finished."""
    return file.with_name(f"finished-{first:09d}")


def _remotely(batch: Batch, *, file: Path, setup: Setup, digests: tuple[str, str], settings: Mapping) -> int:
    """`_draw` in a worker of a cluster."""
    generator = _opened(setup, digests)
    devices.prepare(setup.device, setup.threads)  # each thread of a worker has its own number of CPU threads
    return _draw(batch, file, generator, settings)


@functools.lru_cache(maxsize=1)  # opened once by a worker, not once for every batch
def _opened(setup: Setup, digests: tuple[str, str]) -> Generator:
    for path, digest in zip((setup.model, setup.tokenizer), digests, strict=True):
        parallel.check_shared(path, digest)
    return setup.open()
