"""Encode prepared images and their mirror images into shards of latents; resumable.

Each shard of images with at least one row becomes one shard of latents with the same rows. Bytes depend on images,
tokenizer, batch size, number of threads and machine, not on interruptions.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from ear.data.images import to_signed
from ear.data.prepared import PreparedImages
from ear.display.progress import Progress
from ear.errors import UserError
from ear.files.atomic import link, whole_file, whole_folder
from ear.files.digests import sha256
from ear.files.disk import require_space
from ear.files.json_files import read_json, write_json
from ear.latents.statistics import Statistics
from ear.latents.store import FORMAT, STATS
from ear.runtime import distributed
from ear.runtime.device import prepare_device
from ear.runtime.executor import check_shared, share_shards
from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Tokenizer, load_tokenizer

_HALF = 2  # bytes of a float16


@dataclass(frozen=True)
class Encoder:
    """A tokenizer on its device, with its batch size."""

    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 of the tokenizer's file
    batch_size: int
    device: torch.device

    @torch.inference_mode()
    def moments(self, images: np.ndarray) -> Tensor:
        """uint8 [n, S, S, 3] => moments of images and mirror images, float16 [n, 2, 2C, H, W] on the CPU."""
        signed = to_signed(torch.from_numpy(images).to(self.device))
        both = [self.tokenizer.encode(view) for view in (signed, signed.flip(-1))]
        return torch.stack(both, dim=1).half().cpu()


@dataclass(frozen=True)
class Cluster:
    """A Dask cluster to encode on, and what its workers need to build the same encoder."""

    address: str  # of the scheduler
    tokenizer: Path  # the tokenizer's file; workers must be able to read it
    threads: int  # CPU threads of a worker


def cache(
    prepared: Path,  # the folder of prepared images
    target: Path,  # the folder to write, complete or not at all
    *,
    encoder: Encoder,
    scratch: Path,  # keeps finished shards from one run to the next
    cluster: Cluster | None = None,  # to use instead of the ranks
) -> None:
    """Encode all images into `target`: the shards, and stats.json; an interrupted run resumes with missing shards.

    Rank r encodes shards r, r + world_size, ...; rank 0 writes `target`. The bytes equal a single-process run. The
    statistics are those of the training images, not mirrored. Raises UserError, leaving `target` unchanged, if the
    images do not have the tokenizer's size or moments are not finite in float16.
    """
    splits = {split: PreparedImages(prepared, split) for split in ("train", "val")}
    _check_size(splits["train"], encoder.tokenizer, prepared)
    shards = _shards(prepared)
    if distributed.is_main():
        missing = sum(len(shard.rows) for shard in shards if not (scratch / shard.file).exists())
        size = missing * _bytes_per_image(encoder.tokenizer)
        require_space(scratch, size, what="the latents", fix="free some space, or choose a larger tokenizer.downsample")

    def here(shard: _Shard) -> dict:
        return write_shard(shard.file, splits[shard.split], shard.rows, encoder, scratch)

    encoded = share_shards(
        shards,
        here=here,
        there=_remote_work(prepared, encoder, scratch, cluster) if cluster else here,
        cluster=cluster.address if cluster else "",
    )
    entries = {}
    with Progress("cache", sum(len(shard.rows) for shard in shards)) as progress:
        for shard, entry in encoded:
            entries[shard] = entry
            progress.advance(len(shard.rows))
    if distributed.is_main():
        _publish(target, {shard: entries[shard] for shard in shards}, splits["train"], encoder, scratch)


def _publish(
    target: Path, entries: dict["_Shard", dict], images: PreparedImages, encoder: Encoder, scratch: Path
) -> None:
    """Write the folder of latents from the finished shards."""
    of_split = {
        split: [entry for shard, entry in entries.items() if shard.split == split] for split in ("train", "val")
    }
    with whole_folder(target) as folder:
        for shard in entries:
            link(scratch / shard.file, folder / shard.file)
        write_json(folder / STATS, _stats(of_split, images, encoder))


def _remote_work(prepared: Path, encoder: Encoder, scratch: Path, cluster: Cluster) -> Callable[["_Shard"], dict]:
    """What a worker of the cluster runs for each shard."""
    return functools.partial(
        _write_remotely,
        prepared=prepared.resolve(),
        index=sha256(prepared / "index.json"),
        scratch=scratch.resolve(),
        cluster=dataclasses.replace(cluster, tokenizer=cluster.tokenizer.resolve()),
        fingerprint=encoder.fingerprint,
        batch_size=encoder.batch_size,
        device=encoder.device.type,
    )


def _write_remotely(
    shard: "_Shard",
    *,
    prepared: Path,
    index: str,  # SHA-256 of index.json
    scratch: Path,
    cluster: Cluster,
    fingerprint: str,
    batch_size: int,
    device: str,
) -> dict:
    """`write_shard` in a worker of a cluster."""
    encoder = Encoder(
        _tokenizer(cluster.tokenizer, fingerprint).to(device),
        fingerprint,
        batch_size,
        prepare_device(device, cluster.threads),
    )
    return write_shard(shard.file, _images(prepared, index)[shard.split], shard.rows, encoder, scratch)


@functools.lru_cache(maxsize=1)  # once per worker, not once per shard
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    check_shared(path, fingerprint)
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def _images(prepared: Path, index: str) -> dict[str, PreparedImages]:
    check_shared(prepared / "index.json", index)
    return {split: PreparedImages(prepared, split) for split in ("train", "val")}


@dataclass(frozen=True)
class _Shard:
    """One file of prepared images, and of latents."""

    split: str
    file: str
    rows: range  # of the split


def _shards(prepared: Path) -> list[_Shard]:
    shards = []
    for split, entries in read_json(prepared / "index.json")["shards"].items():
        ends = itertools.accumulate(entry["rows"] for entry in entries)
        shards += [
            _Shard(split, entry["file"], range(end - entry["rows"], end))
            for entry, end in zip(entries, ends, strict=True)
            if entry["rows"]  # none if every image of a shard was rejected
        ]
    return shards


def _bytes_per_image(tokenizer: Tokenizer) -> int:
    """Of the moments of an image and of its mirror image."""
    side = tokenizer.image_size // tokenizer.downsample
    return 2 * 2 * tokenizer.latent_channels * side**2 * _HALF


def _check_size(images: PreparedImages, tokenizer: Tokenizer, prepared: Path) -> None:
    if images.image_size != tokenizer.image_size:
        raise UserError(
            f"the images of {prepared} have {images.image_size} pixels a side, but the tokenizer was made for "
            f"{tokenizer.image_size}; run the tokenizer stage again."
        )


def write_shard(name: str, images: PreparedImages, rows: range, encoder: Encoder, folder: Path) -> dict:
    """Write the shard folder/NAME and its entry, folder/NAME.json: file, rows, bytes, sha256, sums (`posterior.sums`).

    Keeps a shard that an earlier run finished, if its digest is right.
    """
    path, entry_path = folder / name, folder / f"{name}.json"
    if path.is_file() and entry_path.is_file():
        entry = read_json(entry_path)
        if entry["sha256"] == sha256(path):
            return entry
    moments = np.concatenate(list(_encoded(name, images, rows, encoder)))
    with whole_file(path) as partial:
        partial.write_bytes(_encode_file(moments, images.labels[rows.start : rows.stop], encoder.fingerprint))
    entry = {
        "file": name,
        "rows": len(rows),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "sums": _plain_sums(moments, encoder.batch_size).tolist(),
    }
    write_json(entry_path, entry)
    return entry


def _encoded(name: str, images: PreparedImages, rows: range, encoder: Encoder) -> Iterator[np.ndarray]:
    """Moments of the rows, batch by batch."""
    for start in range(rows.start, rows.stop, encoder.batch_size):
        part = np.arange(start, min(start + encoder.batch_size, rows.stop))
        moments = encoder.moments(images.images(part)).numpy()
        finite = np.isfinite(moments).reshape(len(part), -1).all(axis=1)
        if not finite.all():
            bad = int(part[np.argmin(finite)]) - rows.start
            raise UserError(
                f"the latents of image {bad} of {name} are infinite or NaN in float16 (limit 65504); the tokenizer "
                "diverged: train it with a lower tokenizer.learning_rate or a higher tokenizer.kl_weight."
            )
        yield moments


def _plain_sums(moments: np.ndarray, batch_size: int) -> Tensor:
    """`posterior.sums` of the images (not mirrored) as stored, one batch at a time."""
    plain = torch.from_numpy(moments[:, 0])
    return sum((posterior.sums(part) for part in plain.split(batch_size)), start=torch.zeros(()))


def _encode_file(moments: np.ndarray, labels: np.ndarray, fingerprint: str) -> memoryview:
    """The shard's file, made in memory: HDF5 crashes the process if a disk is full."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("moments", data=moments)  # contiguous, so rows can be read at their offset
        file.create_dataset("labels", data=labels.astype(np.int32))
        file.attrs["format"] = FORMAT
        file.attrs["tokenizer"] = fingerprint
    return content.getbuffer()


def _stats(entries: dict[str, list[dict]], images: PreparedImages, encoder: Encoder) -> dict:
    sums = torch.zeros((), dtype=torch.float64)
    for entry in entries["train"]:
        sums = sums + torch.tensor(entry["sums"], dtype=torch.float64)
    side = images.image_size // encoder.tokenizer.downsample
    kept = ("file", "rows", "bytes", "sha256")
    return {
        "format": FORMAT,
        "tokenizer": encoder.fingerprint,
        "image_size": images.image_size,
        "shape": [encoder.tokenizer.latent_channels, side, side],
        "classes": list(images.classes),
        "rows": {split: sum(entry["rows"] for entry in part) for split, part in entries.items()},
        "statistics": Statistics.of(sums).as_dict(),
        "shards": {split: [{key: entry[key] for key in kept} for entry in part] for split, part in entries.items()},
    }
