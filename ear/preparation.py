"""From listed image files to the shards of `ear.prepared`: decoded in parallel, resumable, nothing left out unsaid.

The rows of a split lie in an order shuffled by the digests of their paths, so that reading in order mixes the classes;
a shard holds the readable ones of its slice of that order. Bytes depend on the images, the parameters and the
libraries' versions, not on the number of workers or on interruptions.
"""

import csv
import functools
import hashlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ear import records
from ear.images import center_crop, decode
from ear.manifest import Contents, Manifest, Row
from ear.parallel import map_shards
from ear.prepared import FORMAT
from ear.progress import Progress

_NAMED = 20  # rejected images that an error message names
_TOGETHER = 1 << 18  # bytes to write and to digest while they are in the processor's cache
_MOST_BYTES = 1 << 30  # of an encoded image: more than the limit on its pixels leaves room for


@dataclass(frozen=True)
class Shard:
    """One file to write; all that its content depends on."""

    name: str
    root: str  # where the files of the images start
    upright: bool  # whether to rotate as a camera's EXIF entry says
    images: tuple[Row, ...]
    image_size: int
    compression: str  # none or gzip

    def digest(self) -> str:
        """Changes with whatever the file's content depends on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def prepare(
    manifest: Manifest,
    *,
    scratch: Path,  # keeps finished shards from one run to the next
    target: Path,  # the folder to write, whole or not at all
    rejected_list: Path,  # the csv that an error about unreadable images refers to
    image_size: int,
    shard_size: int,  # images per file
    compression: str,
    max_rejected: int,
    workers: int,  # processes; 0 and 1 decode in this one. Each holds one shard in memory
    cluster: str = "",  # address of a Dask scheduler to use instead of processes
) -> None:
    """Decode, crop and store all images; run again after an interruption, go on with the shards that are missing.

    Writes the shards, classes.json, rejected.csv (path, reason) and index.json (rows and SHA-256 of every shard).
    Raises ValueError, and leaves `target` as it was, where the root is gone, the disk is too small, more than
    `max_rejected` images are unreadable or none of a class or split is left; OSError where a file cannot be written
    or a worker dies.
    """
    _check_source(manifest)
    shards = {
        split: plan(manifest, split, image_size=image_size, shard_size=shard_size, compression=compression)
        for split in ("train", "val")
    }
    with records.whole_folder(target) as folder:  # first, so that a target which cannot be written costs no time
        every = [shard for part in shards.values() for shard in part]
        _tidy(scratch, every)
        summaries = write_shards(every, scratch, workers, cluster)
        rejected = sorted(tuple(entry) for summary in summaries.values() for entry in summary["rejected"])
        if len(rejected) > max_rejected:
            _write_rejected(rejected_list, rejected)
            raise ValueError(_complaint(rejected, max_rejected, rejected_list))
        _check_classes(manifest, {path for path, _ in rejected})
        for shard in every:
            records.link(scratch / shard.name, folder / shard.name)
        _write_rejected(folder / "rejected.csv", rejected)
        records.write_json(folder / "classes.json", {"classes": manifest.classes, "names": manifest.names})
        records.write_json(folder / "index.json", _index(shards, summaries, image_size))


def _check_source(manifest: Manifest) -> None:
    """Say at once what would otherwise be said of every single image."""
    if not manifest.root.is_dir():
        raise ValueError(f"the folder of the images, {manifest.root}, is gone; set data.path and run fetch again.")
    for file, size in manifest.archives.items():
        path = manifest.root / file
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(
                f"{path} has {found} bytes, but had {size} when it was listed; list it again with `dvc repro "
                "--single-item --force fetch`."
            )


def plan(manifest: Manifest, split: str, *, image_size: int, shard_size: int, compression: str) -> list[Shard]:
    """The shards of one split: its images in the order of their paths' digests, cut every `shard_size`."""
    order = sorted(manifest.split(split), key=lambda row: hashlib.sha256(b"order/" + os.fsencode(row.path)).digest())
    slices = [tuple(order[k : k + shard_size]) for k in range(0, len(order), shard_size)]
    root = os.path.abspath(manifest.root)  # the workers of a cluster start elsewhere
    return [
        Shard(f"{split}-{k:05d}-of-{len(slices):05d}.h5", root, manifest.upright, part, image_size, compression)
        for k, part in enumerate(slices)
    ]


def write_shards(shards: Sequence[Shard], folder: Path, workers: int, cluster: str = "") -> dict[str, dict]:
    """Summaries by name of all shards, which then stand in `folder`; see `write_shard` and `parallel.map_shards`."""
    write = functools.partial(write_shard, folder=folder.resolve())
    with Progress("prepare", sum(len(shard.images) for shard in shards)) as progress:
        summaries = {}
        for shard, summary in map_shards(write, shards, workers=workers, cluster=cluster):
            summaries[shard.name] = summary
            progress.advance(len(shard.images))
    return summaries


def write_shard(shard: Shard, folder: Path) -> dict:
    """Write folder/NAME and, beside it, its summary: the shard's digest, rows, sha256, rejected [path, reason].

    What an earlier run finished is kept if it is the same shard, whole, and its rejected images are still unreadable.
    """
    path, note = folder / shard.name, folder / f"{shard.name}.json"
    if path.is_file() and note.is_file():
        summary = records.read_json(note)
        if _is_good(summary, shard, path):
            return summary
    images, labels, rejected = decode_shard(shard)
    digest = hashlib.sha256()
    with records.whole_file(path) as partial, partial.open("wb") as file:
        for part in _encode(images, labels, shard):
            for start in range(0, len(part), _TOGETHER):
                file.write(part[start : start + _TOGETHER])
                digest.update(part[start : start + _TOGETHER])
    summary = {"shard": shard.digest(), "rows": len(labels), "sha256": digest.hexdigest(), "rejected": rejected}
    records.write_json(note, summary)
    return summary


def _is_good(summary: dict, shard: Shard, path: Path) -> bool:
    if summary["shard"] != shard.digest() or summary["sha256"] != records.sha256(path):
        return False
    rejected = {path for path, _ in summary["rejected"]}
    with Contents(shard.root) as contents:
        again = (_read(row, contents, shard) for row in shard.images if row.path in rejected)
        return all(isinstance(found, str) for found in again)


def decode_shard(shard: Shard) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """A shard => (uint8 [n, S, S, 3], int32 [n], [path, reason] of the images left out)."""
    images = np.empty((len(shard.images), shard.image_size, shard.image_size, 3), np.uint8)
    labels, rejected = [], []
    with Contents(shard.root) as contents:
        for row in shard.images:
            found = _read(row, contents, shard)
            if isinstance(found, str):
                rejected.append([row.path, found])
            else:
                images[len(labels)] = found
                labels.append(row.label)
    return images[: len(labels)], np.array(labels, np.int32), rejected


def _read(row: Row, contents: Contents, shard: Shard) -> np.ndarray | str:
    """uint8 [S, S, 3], or the reason why the image cannot be read."""
    try:
        if row.bytes > _MOST_BYTES:
            return f"has {row.bytes} bytes, and {_MOST_BYTES} are allowed"
        content = contents.read(row)
        if len(content) != row.bytes:
            return f"has {len(content)} bytes, but had {row.bytes} when it was listed"
        return center_crop(decode(io.BytesIO(content), upright=shard.upright), shard.image_size)
    except (FileNotFoundError, PermissionError) as error:  # other OSErrors are the machine's: they stop the run
        return str(error.strerror)
    except ValueError as error:
        return str(error)


def _encode(images: np.ndarray, labels: np.ndarray, shard: Shard) -> tuple[bytes, memoryview]:
    """The bytes of the shard's file, in two parts. Its frame is made in memory, for HDF5 crashes where a disk is full.

    Uncompressed images end the file, and are written from where they are: a copy costs as much as a tenth of decoding.
    """
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["image_size"] = shard.image_size
        file.create_dataset("labels", data=labels)
        if shard.compression == "gzip" and len(images):
            file.create_dataset("images", data=images, chunks=(1, *images.shape[1:]), compression="gzip")
        else:
            file.create_dataset("images", images.shape, np.uint8, dcpl=_room_without_values())
            file.flush()
            offset = file["images"].id.get_offset()
    if shard.compression == "gzip" or not len(images):
        return content.getvalue(), memoryview(b"")
    assert len(content.getbuffer()) <= offset, "HDF5 put something behind the images"
    return content.getvalue().ljust(offset, b"\0"), images.data.cast("B")


def _room_without_values() -> h5py.h5p.PropDCID:
    """Properties of a data set whose place in the file is fixed, and whose values are written by somebody else."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return properties


def _tidy(scratch: Path, shards: Sequence[Shard]) -> None:
    """Remove what no shard of this run can use; raise ValueError where the rest will not fit on the disk."""
    expected = {f"{shard.name}{ending}" for shard in shards for ending in ("", ".json")}
    for path in scratch.iterdir():
        if path.name not in expected:
            path.unlink()
    missing = [shard for shard in shards if shard.compression == "none" and not (scratch / shard.name).exists()]
    needed = sum(len(shard.images) * shard.image_size**2 * 3 for shard in missing)
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise ValueError(
            f"the prepared images need {needed / 1e9:.1f} GB, but {scratch.resolve()} has {free / 1e9:.1f} GB left; "
            "free some space, or set prepare.compression to gzip."
        )


def _complaint(rejected: Sequence[tuple[str, str]], allowed: int, whole: Path) -> str:
    named = "; ".join(f"{path}: {reason}" for path, reason in rejected[:_NAMED])
    more = f"; and {len(rejected) - _NAMED} more" if len(rejected) > _NAMED else ""
    return (
        f"{len(rejected)} images cannot be read, and prepare.max_rejected allows {allowed}: {named}{more} (all of them "
        f"are in {whole}); repair or remove them and list the images again with `dvc repro --single-item --force "
        "fetch`, or raise prepare.max_rejected."
    )


def _write_rejected(path: Path, rejected: Sequence[tuple[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "reason"), *rejected])
    with records.whole_file(path) as partial:
        partial.write_bytes(text.getvalue().encode(errors="surrogateescape"))


def _check_classes(manifest: Manifest, rejected: set[str]) -> None:
    for split in ("train", "val"):
        left = {row.label for row in manifest.split(split) if row.path not in rejected}
        if not left:
            raise ValueError(f"split {split} has no readable image; repair some, or give another source.")
        missing = set(range(len(manifest.classes))) - left
        if split == "train" and missing:
            name = manifest.classes[min(missing)]
            raise ValueError(f"class {name!r} has no readable training image; repair or remove it.")


def _index(shards: Mapping[str, Sequence[Shard]], summaries: Mapping[str, dict], image_size: int) -> dict:
    splits = {
        split: [{"file": s.name, **{key: summaries[s.name][key] for key in ("rows", "sha256")}} for s in part]
        for split, part in shards.items()
    }
    return {"format": FORMAT, "image_size": image_size, "shards": splits}
