"""Encode prepared images and their mirror images into files of latents; resumable.

Files are large, so that few are open at a time, however many shards the images have. They are filled piece by piece.
Bytes depend on images, tokenizer, batch size, number of threads and machine, not on interruptions.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ear.files.hdf5 import fill, frame, row_offset
from ear.files.json_files import read_json, write_json
from ear.latents.statistics import Statistics
from ear.latents.store import FORMAT, STATS
from ear.runtime import distributed
from ear.runtime.ahead import read_ahead
from ear.runtime.device import prepare_device
from ear.runtime.executor import check_shared, share_shards
from ear.tokenizer import posterior
from ear.tokenizer.autoencoder import Tokenizer, load_tokenizer


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

    @property
    def row(self) -> np.ndarray:
        """Shape and type of an image's moments, as an uninitialised array, float16 [2, 2C, H, W]."""
        side = self.tokenizer.image_size // self.tokenizer.downsample
        return np.empty((2, 2 * self.tokenizer.latent_channels, side, side), np.float16)


@dataclass(frozen=True)
class Layout:
    """How large files and pieces become, at most."""

    file_bytes: int = 4 * 2**30  # ImageNet at 256 pixels: 11 files
    piece_images: int = 256  # but at least one batch


@dataclass(frozen=True)
class Cluster:
    """A Dask cluster to encode on, and what its workers need to build the same encoder."""

    address: str  # of the scheduler
    tokenizer: Path  # the tokenizer's file; workers must be able to read it
    threads: int  # CPU threads of a worker


@dataclass(frozen=True)
class Piece:
    """Rows of one file that are encoded together."""

    split: str
    file: str
    rows: range  # of the split
    first: int  # row of the file at which they begin


def cache(
    prepared: Path,  # the folder of prepared images
    target: Path,  # the folder to write, complete or not at all
    *,
    encoder: Encoder,
    scratch: Path,  # keeps finished pieces from one run to the next
    cluster: Cluster | None = None,  # to use instead of the ranks
    layout: Layout = Layout(),
    noise_limit: float = 1.0,  # of `Statistics.of`
) -> None:
    """Encode all images into `target`: the files, and stats.json; an interrupted run resumes with missing pieces.

    Rank r encodes pieces r, r + world_size, ...; rank 0 writes `target`. The bytes equal a single-process run. The
    statistics are those of the training images, not mirrored. Raises UserError, leaving `target` unchanged, if the
    images do not have the tokenizer's size or moments are not finite in float16.
    """
    splits = {split: PreparedImages(prepared, split) for split in ("train", "val")}
    _check_size(splits["train"], encoder.tokenizer, prepared)
    planned = {
        split: plan(split, len(images), encoder.row.nbytes, encoder.batch_size, layout)
        for split, images in splits.items()
    }
    pieces = [piece for part in planned.values() for piece in part]
    distributed.from_main(lambda: _create_files(planned, splits, encoder, scratch))

    def here(piece: Piece) -> list[float]:
        return write_piece(piece, splits[piece.split], encoder, scratch)

    encoded = share_shards(
        pieces,
        here=here,
        there=_remote_work(prepared, encoder, scratch, cluster) if cluster else here,
        cluster=cluster.address if cluster else "",
    )
    sums = {}
    with Progress("cache", sum(len(piece.rows) for piece in pieces)) as progress:
        for piece, found in encoded:
            sums[piece] = found
            progress.advance(len(piece.rows))
    if distributed.is_main():
        train = torch.tensor([sums[piece] for piece in planned["train"]], dtype=torch.float64)
        statistics = Statistics.of(train.sum(dim=0), noise_limit=noise_limit)
        if statistics.collapsed:
            channels = ", ".join(map(str, statistics.collapsed))
            print(f"cache: noise alone in channel {channels}; models see its mean (cache.noise_limit)", flush=True)
        _publish(target, planned, statistics, splits["train"], encoder, scratch)


def plan(split: str, count: int, row_bytes: int, batch_size: int, layout: Layout) -> list[Piece]:
    """The pieces of `count` images. All but the last one consist of complete batches."""
    per_piece = batch_size * max(layout.piece_images // batch_size, 1)
    per_file = per_piece * max(layout.file_bytes // (row_bytes * per_piece), 1)
    files = -(-count // per_file)
    return [
        Piece(split, f"{split}-{file:05d}-of-{files:05d}.h5", range(start, min(start + per_piece, end)), start - begin)
        for file in range(files)
        for begin, end in [(file * per_file, min((file + 1) * per_file, count))]
        for start in range(begin, end, per_piece)
    ]


def _create_files(
    planned: Mapping[str, Sequence[Piece]], splits: Mapping[str, PreparedImages], encoder: Encoder, scratch: Path
) -> None:
    """Create the files in their final sizes, where an earlier run has not; raises UserError if they will not fit."""
    new, missing = {}, 0
    for split, pieces in planned.items():
        for name, rows in _files(pieces).items():
            start = _start(splits[split].labels[rows.start : rows.stop], encoder)
            path, size = scratch / name, len(start) + len(rows) * encoder.row.nbytes
            if _begins(path, start, size):
                missing += max(size - 512 * path.stat().st_blocks, 0)  # it was created without its content
            else:
                new[path] = start, size
                missing += size
    require_space(
        scratch,
        missing,
        what="the latents",
        fix="free some space, or choose a larger tokenizer.downsample",
    )
    for path, (start, size) in new.items():
        with whole_file(path) as partial:
            partial.write_bytes(start)
            os.truncate(partial, size)


def _begins(path: Path, start: bytes, size: int) -> bool:
    """Whether an earlier run created this file."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _start(labels: np.ndarray, encoder: Encoder) -> bytes:
    """A file up to its moments, which end it."""

    def describe(file: h5py.File) -> None:
        file.attrs["format"] = FORMAT
        file.attrs["tokenizer"] = encoder.fingerprint
        file.create_dataset("labels", data=labels.astype(np.int32))

    return frame("moments", (len(labels), *encoder.row.shape), np.float16, describe)


def _files(pieces: Sequence[Piece]) -> dict[str, range]:
    """File => its rows of the split."""
    found: dict[str, range] = {}
    for piece in pieces:
        found[piece.file] = range(found.get(piece.file, piece.rows).start, piece.rows.stop)
    return found


def _publish(
    target: Path,
    planned: Mapping[str, Sequence[Piece]],
    statistics: Statistics,
    images: PreparedImages,
    encoder: Encoder,
    scratch: Path,
) -> None:
    """Write the folder of latents from the filled files; raises UserError if one is not as its pieces were written."""
    with ThreadPoolExecutor() as pool:  # hashing releases the lock
        for _ in pool.map(
            lambda piece: _check(piece, encoder, scratch), (p for part in planned.values() for p in part)
        ):
            pass
    files = {split: _files(pieces) for split, pieces in planned.items()}
    with ThreadPoolExecutor() as pool:  # hashing releases the lock
        entries = {split: list(pool.map(_entry, [scratch / name for name in part])) for split, part in files.items()}
    rows = {split: [len(part) for part in files[split].values()] for split in files}
    stats = {
        "format": FORMAT,
        "tokenizer": encoder.fingerprint,
        "image_size": images.image_size,
        "shape": [encoder.tokenizer.latent_channels, *encoder.row.shape[2:]],
        "classes": list(images.classes),
        "rows": {split: sum(part) for split, part in rows.items()},
        "statistics": statistics.as_dict(),
        "shards": {
            split: [{**entry, "rows": count} for entry, count in zip(part, rows[split], strict=True)]
            for split, part in entries.items()
        },
    }
    with whole_folder(target) as folder:
        for name in (name for part in files.values() for name in part):
            link(scratch / name, folder / name)
        write_json(folder / STATS, stats)


def _entry(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _remote_work(prepared: Path, encoder: Encoder, scratch: Path, cluster: Cluster) -> Callable[[Piece], list[float]]:
    """What a worker of the cluster runs for each piece."""
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
    piece: Piece,
    *,
    prepared: Path,
    index: str,  # SHA-256 of index.json
    scratch: Path,
    cluster: Cluster,
    fingerprint: str,
    batch_size: int,
    device: str,
) -> list[float]:
    """`write_piece` in a worker of a cluster."""
    place = prepare_device(device, cluster.threads)
    encoder = Encoder(_tokenizer(cluster.tokenizer, fingerprint).to(place), fingerprint, batch_size, place)
    return write_piece(piece, _images(prepared, index)[piece.split], encoder, scratch)


@functools.lru_cache(maxsize=1)  # once per worker, not once per piece
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    check_shared(path, fingerprint)
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def _images(prepared: Path, index: str) -> dict[str, PreparedImages]:
    check_shared(prepared / "index.json", index)
    return {split: PreparedImages(prepared, split) for split in ("train", "val")}


def _check_size(images: PreparedImages, tokenizer: Tokenizer, prepared: Path) -> None:
    if images.image_size != tokenizer.image_size:
        raise UserError(
            f"the images of {prepared} have {images.image_size} pixels a side, but the tokenizer was made for "
            f"{tokenizer.image_size}; run the tokenizer stage again."
        )


def write_piece(piece: Piece, images: PreparedImages, encoder: Encoder, folder: Path) -> list[float]:
    """Fill a piece of folder/FILE and note its digest and sums in folder/FILE-FIRST.json => `posterior.sums`.

    Keeps what an earlier run wrote, if its digest is right.
    """
    path, note = folder / piece.file, _note(piece, folder)
    if note.is_file():
        known = read_json(note)
        if known["sha256"] == _digest(path, piece, encoder):
            return known["sums"]
    moments = np.ascontiguousarray(np.concatenate(list(_encoded(piece, images, encoder))))
    fill(path, "moments", piece.first, moments)
    sums = _plain_sums(moments, encoder.batch_size).tolist()
    write_json(note, {"sha256": hashlib.sha256(moments.data.cast("B")).hexdigest(), "sums": sums})
    return sums


def _check(piece: Piece, encoder: Encoder, folder: Path) -> None:
    """Compare a piece with its note: on a shared file system, other machines write next to it and may damage it."""
    path, note = folder / piece.file, _note(piece, folder)
    if read_json(note)["sha256"] != _digest(path, piece, encoder):
        note.unlink()
        raise UserError(f"{path} is damaged: rows from {piece.first} on are not what was written; run the stage again.")


def _note(piece: Piece, folder: Path) -> Path:
    return folder / f"{piece.file}-{piece.first:09d}.json"


def _digest(path: Path, piece: Piece, encoder: Encoder) -> str:
    """SHA-256 of the piece's moments as they are in the file."""
    rows = np.broadcast_to(encoder.row, (len(piece.rows), *encoder.row.shape))
    with path.open("rb") as file:
        file.seek(row_offset(path, "moments", piece.first, rows))
        return hashlib.sha256(file.read(rows.nbytes)).hexdigest()


def _encoded(piece: Piece, images: PreparedImages, encoder: Encoder) -> Iterator[np.ndarray]:
    """Moments of the rows, batch by batch; the next images are read meanwhile."""
    starts = range(piece.rows.start, piece.rows.stop, encoder.batch_size)
    parts = [np.arange(start, min(start + encoder.batch_size, piece.rows.stop)) for start in starts]
    for part, pixels in zip(parts, read_ahead(images.images, parts), strict=True):
        moments = encoder.moments(pixels).numpy()
        finite = np.isfinite(moments).reshape(len(part), -1).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the latents of {piece.split} image {part[np.argmin(finite)]} (counted from 0 over all shards of "
                "data/prepared) are infinite or NaN in float16 (limit 65504); the tokenizer diverged: train it with a "
                "lower tokenizer.learning_rate or a higher tokenizer.kl_weight."
            )
        yield moments


def _plain_sums(moments: np.ndarray, batch_size: int) -> Tensor:
    """`posterior.sums` of the images (not mirrored) as stored, one batch at a time."""
    plain = torch.from_numpy(moments[:, 0])
    return sum((posterior.sums(part) for part in plain.split(batch_size)), start=torch.zeros(()))
