"""From listed image files to HDF5 shards: decoded in parallel, resumable, every rejected image reported.

The images of a split are ordered by the digests of their paths, so reading in order mixes the classes. A shard holds
the readable images of its slice of that order. Bytes depend on images, parameters and library versions, not on the
number of workers or on interruptions.
"""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ear.data import linked
from ear.data.images import Encoding
from ear.data.linked import decoded
from ear.data.manifest import Contents, Manifest, Row, read_rows, write_rows
from ear.data.prepared import FORMAT
from ear.display.progress import Progress
from ear.errors import UserError
from ear.files.atomic import link, whole_file, whole_folder
from ear.files.digests import sha256
from ear.files.disk import require_space
from ear.files.hdf5 import frame
from ear.files.json_files import read_json, write_json
from ear.files.tables import csv_writer
from ear.runtime.executor import map_shards
from ear.runtime.versions import versions

_NAMED = 20  # rejected images that an error message names


@dataclass(frozen=True)
class Layout:
    """How prepared images are laid out in files."""

    image_size: int  # side S in pixels
    shard_size: int  # images per file
    compression: str  # none, gzip, or links: no pixels (ear.data.linked)


@dataclass(frozen=True)
class Shard:
    """One file to write: everything its content depends on except library versions."""

    name: str
    root: str  # folder of the image files, absolute
    place: str  # the same folder relative to the repository's root, or absolute if the user named it so
    encoding: Encoding  # of the bytes of each image
    images: tuple[Row, ...]
    image_size: int
    compression: str  # of Layout

    def digest(self) -> str:
        """A digest of everything the content depends on, library versions included."""
        return hashlib.sha256(repr((self, versions())).encode()).hexdigest()


def prepare(
    manifest: Manifest,
    *,
    scratch: Path,  # keeps finished shards from one run to the next
    target: Path,  # the folder to write, complete or not at all
    rejected_list: Path,  # CSV file to write if too many images are unreadable
    layout: Layout,
    max_rejected: int,
    workers: int,  # processes; 0 and 1: decode in this one. Each holds one image in memory (gzip: one shard)
    cluster: str = "",  # address of a Dask scheduler to use instead of processes
) -> None:
    """Decode, crop and store all images; an interrupted run resumes with the missing shards.

    Writes the shards, classes.json, rejected.csv (path, reason) and index.json (rows and SHA-256 of every shard).
    Raises UserError, leaving `target` unchanged, if the root is gone, the disk is too small, more than `max_rejected`
    images are unreadable, or a class or split has no readable image; OSError if a file cannot be written or a worker
    dies.
    """
    _check_source(manifest)
    shards = {split: plan(manifest, split, layout) for split in ("train", "val")}
    with whole_folder(target) as folder:  # first, so that an unwritable target fails at once
        all_shards = [shard for part in shards.values() for shard in part]
        _tidy(scratch, all_shards)
        summaries = write_shards(all_shards, scratch, workers, cluster)
        rejected = sorted(tuple(entry) for summary in summaries.values() for entry in summary["rejected"])
        if len(rejected) > max_rejected:
            _write_rejected(rejected_list, rejected)
            raise UserError(_complaint(rejected, max_rejected, rejected_list))
        _check_classes(manifest, {path for path, _ in rejected})
        for shard in all_shards:
            link(scratch / shard.name, folder / shard.name)
        _write_rejected(folder / "rejected.csv", rejected)
        write_json(folder / "classes.json", {"classes": manifest.classes, "names": manifest.names})
        write_json(folder / "index.json", _index(shards, summaries, layout.image_size))


def _check_source(manifest: Manifest) -> None:
    """Check root and archive sizes before decoding."""
    if not manifest.root.is_dir():
        raise UserError(f"the folder of the images, {manifest.root}, is gone; set data.path and run fetch again.")
    for file, size in manifest.archives.items():
        path = manifest.root / file
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise UserError(
                f"{path} has {found} bytes, but had {size} when it was listed; list it again with `dvc repro "
                "--single-item --force fetch`."
            )


def plan(manifest: Manifest, split: str, layout: Layout) -> list[Shard]:
    """The shards of one split: its images in the order of their paths' digests, `shard_size` per shard."""
    order = sorted(manifest.split(split), key=lambda row: hashlib.sha256(b"order/" + os.fsencode(row.path)).digest())
    slices = [tuple(order[k : k + layout.shard_size]) for k in range(0, len(order), layout.shard_size)]
    root = os.path.abspath(manifest.root)  # workers of a cluster run in another folder
    return [
        Shard(
            f"{split}-{k:05d}-of-{len(slices):05d}.h5",
            root,
            str(manifest.root),
            manifest.encoding,
            part,
            layout.image_size,
            layout.compression,
        )
        for k, part in enumerate(slices)
    ]


def write_shards(shards: Sequence[Shard], folder: Path, workers: int, cluster: str = "") -> dict[str, dict]:
    """Write all shards into `folder` => their summaries by name; see `write_shard` and `map_shards`."""
    by_name = {shard.name: shard for shard in shards}
    for shard in shards:  # tasks carry only a name; a worker reads the rows of its shard from a file
        write_rows(_rows_file(folder, shard.name), shard.images)
    plan = dataclasses.replace(shards[0], name="", images=())
    write = functools.partial(_write_named, plan=plan, folder=folder.resolve())
    with Progress("prepare", sum(len(shard.images) for shard in shards)) as progress:
        summaries = {}
        for name, summary in map_shards(write, list(by_name), workers=workers, cluster=cluster):
            summaries[name] = summary
            progress.advance(len(by_name[name].images))
    return summaries


def _write_named(name: str, *, plan: Shard, folder: Path) -> dict:
    """`write_shard` for a shard whose rows are in a file; `plan` has what all shards share."""
    rows = tuple(read_rows(_rows_file(folder, name)))
    return write_shard(dataclasses.replace(plan, name=name, images=rows), folder)


def _rows_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.csv"


def write_shard(shard: Shard, folder: Path) -> dict:
    """Write folder/NAME and its summary, folder/NAME.json: the shard's digest, rows, sha256, rejected [path, reason].

    Keeps a file that an earlier run finished, if it is complete, of the same shard, and its rejected images are still
    unreadable.
    """
    path, summary_path = folder / shard.name, folder / f"{shard.name}.json"
    if path.is_file() and summary_path.is_file():
        summary = read_json(summary_path)
        if _is_good(summary, shard, path):
            return summary
    rows, rejected = list(shard.images), []
    with whole_file(path) as partial:
        # The start of the file depends on the number of images, so a shard with unreadable images is written again
        # without them. This keeps one image in memory: allocating a shard costs more than writing it.
        while True:
            digest, unreadable = _write(partial, rows, shard)
            rejected += unreadable
            bad = {name for name, _ in unreadable}
            rows = [row for row in rows if row.path not in bad]
            if not bad or shard.compression == "links":  # whose file has left them out already
                break
    summary = {"shard": shard.digest(), "rows": len(rows), "sha256": digest, "rejected": rejected}
    write_json(summary_path, summary)
    return summary


def _is_good(summary: dict, shard: Shard, path: Path) -> bool:
    if summary["shard"] != shard.digest() or summary["sha256"] != sha256(path):
        return False
    rejected = {path for path, _ in summary["rejected"]}
    with Contents(shard.root) as contents:
        again = (_read(row, contents, shard) for row in shard.images if row.path in rejected)
        return all(isinstance(found, str) for found in again)


def _write(path: Path, rows: Sequence[Row], shard: Shard) -> tuple[str, list[list[str]]]:
    """Write the file as if all rows were readable => (its SHA-256, [path, reason] of those that are not)."""
    rejected: list[list[str]] = []
    with path.open("wb") as file:
        digest = hashlib.sha256()

        def write(part: bytes | memoryview) -> None:
            file.write(part)
            digest.update(part)

        if shard.compression == "links":
            write(_linked(rows, shard, rejected))
        elif shard.compression == "gzip":
            write(_compressed(rows, shard, images(rows, shard, rejected)))
        else:
            write(_frame(rows, shard))
            for image in images(rows, shard, rejected):
                write(image.data)
    return digest.hexdigest(), rejected


def images(rows: Sequence[Row], shard: Shard, rejected: list[list[str]]) -> Iterator[np.ndarray]:
    """Yield uint8 [S, S, 3] for each readable row; append [path, reason] of the others to `rejected`."""
    with Contents(shard.root) as contents:
        for row in rows:
            outcome = _read(row, contents, shard)
            if isinstance(outcome, str):
                rejected.append([row.path, outcome])
            else:
                yield outcome


def _read(row: Row, contents: Contents, shard: Shard, digest: Any = None) -> np.ndarray | str:
    """uint8 [S, S, 3], or the reason why the image cannot be read; `digest` is updated with its raw bytes."""
    try:
        content = contents.read(row)
        if digest:
            digest.update(content)
        return decoded(content, row, encoding=shard.encoding, image_size=shard.image_size)
    except (FileNotFoundError, PermissionError) as error:  # other OSErrors are not the image's fault: they stop the run
        return str(error.strerror)
    except ValueError as error:
        return str(error)


def _frame(rows: Sequence[Row], shard: Shard) -> bytes:
    """The part of the shard's file before its images, which are uncompressed and end the file."""
    return frame("images", _shape(rows, shard), np.uint8, lambda file: _describe(file, rows, shard))


def _compressed(rows: Sequence[Row], shard: Shard, images: Iterator[np.ndarray]) -> memoryview:
    """The complete file of a shard, one chunk per image; made in memory: HDF5 crashes the process if a disk is full."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _describe(file, rows, shard)
        shape = _shape(rows, shard)
        chunks = (1, *shape[1:]) if rows else None
        data = file.create_dataset("images", shape, np.uint8, chunks=chunks, compression="gzip" if rows else None)
        for k, image in enumerate(images):
            data[k] = image
    return content.getbuffer()


def _linked(rows: Sequence[Row], shard: Shard, rejected: list[list[str]]) -> memoryview:
    """The complete file of a shard of links; every image is decoded once, to reject those that cannot be."""
    good, digests = [], []
    with Contents(shard.root) as contents:
        for row in rows:
            digest = hashlib.sha256()
            outcome = _read(row, contents, shard, digest)
            if isinstance(outcome, str):
                rejected.append([row.path, outcome])
            else:
                good.append(row)
                digests.append(digest.digest())
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _describe(file, good, shard)
        linked.write(file, good, digests, root=shard.place, encoding=shard.encoding)
    return content.getbuffer()


def _describe(file: h5py.File, rows: Sequence[Row], shard: Shard) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["image_size"] = shard.image_size
    file.create_dataset("labels", data=np.array([row.label for row in rows], np.int32))


def _shape(rows: Sequence[Row], shard: Shard) -> tuple[int, int, int, int]:
    return len(rows), shard.image_size, shard.image_size, 3


def _tidy(scratch: Path, shards: Sequence[Shard]) -> None:
    """Delete files that no shard of this run uses; raise UserError if the missing shards will not fit on the disk."""
    expected = {f"{shard.name}{ending}" for shard in shards for ending in ("", ".json", ".csv")}
    for path in scratch.iterdir():
        if path.name not in expected:
            path.unlink()
    missing = [shard for shard in shards if shard.compression == "none" and not (scratch / shard.name).exists()]
    needed = sum(len(shard.images) * shard.image_size**2 * 3 for shard in missing)
    require_space(
        scratch, needed, what="the prepared images", fix="free some space, or set prepare.compression to gzip"
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
    writer = csv_writer(text)
    writer.writerows([("path", "reason"), *rejected])
    with whole_file(path) as partial:
        partial.write_bytes(text.getvalue().encode(errors="surrogateescape"))


def _check_classes(manifest: Manifest, rejected: set[str]) -> None:
    for split in ("train", "val"):
        left = {row.label for row in manifest.split(split) if row.path not in rejected}
        if not left:
            raise UserError(f"split {split} has no readable image; repair some, or give another source.")
        missing = set(range(len(manifest.classes))) - left
        if split == "train" and missing:
            name = manifest.classes[min(missing)]
            raise UserError(f"class {name!r} has no readable training image; repair or remove it.")


def _index(shards: Mapping[str, Sequence[Shard]], summaries: Mapping[str, dict], image_size: int) -> dict:
    splits = {
        split: [{"file": s.name, **{key: summaries[s.name][key] for key in ("rows", "sha256")}} for s in part]
        for split, part in shards.items()
    }
    return {"format": FORMAT, "image_size": image_size, "shards": splits}
