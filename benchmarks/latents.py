"""Rows per second of cached latents in training order, against the published way to store and read them.

    python -m benchmarks.latents [--rows N] [--workers N] [--save]

Moments of KL-16 at 256 pixels a side with mirror images, 32 KiB per image. Both ways deliver the same batches of 64
rows, half of them mirrored:

    store   files of ear.latents.store, read ahead by threads, as training does
    npz     a folder with one .npz file per image, read by a DataLoader with as many worker processes (MAR's way)

Warm: the files are in the page cache. Cold: they were dropped from it before. `growth` has the store's warm rate and
the time to open it for more and more rows, as far as they fit into half of the memory.
"""

import contextlib
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Line, arguments, report
from ear.files.hdf5 import fill, frame
from ear.files.json_files import write_json
from ear.latents.batches import latent_batches
from ear.latents.store import FORMAT, STATS, LatentStore
from ear.runtime.device import keep_freed_memory
from ear.runtime.randomness import Coins, DataOrder

SHAPE = (2, 32, 16, 16)
ROW_BYTES = 2 * int(np.prod(SHAPE))
BATCH, SEED = 64, 0
_PART = 4096  # rows written at a time
_FILE = 2**17  # rows
_GROWTH = (12_500, 50_000, 200_000)
_SECONDS = 2.0  # of one timing
_REPEATS = 5


def write_store(folder: Path, rows: int) -> None:
    """Write files of random moments as the cache stage does, with their stats.json."""
    folder.mkdir()
    files = [range(start, min(start + _FILE, rows)) for start in range(0, rows, _FILE)]
    entries = [
        _file(folder / f"train-{k:05d}-of-{len(files):05d}.h5", len(part), seed=k) for k, part in enumerate(files)
    ]
    stats = {
        "format": FORMAT,
        "tokenizer": "",
        "shape": [SHAPE[1] // 2, *SHAPE[2:]],
        "classes": ["a"],
        "statistics": {"mean": 0.0, "std": 1.0, "channel_mean": [], "channel_std": []},
        "shards": {"train": entries},
    }
    write_json(folder / STATS, stats)


def _file(path: Path, rows: int, seed: int) -> dict:
    """Write a file => its entry in stats.json."""

    def describe(file: h5py.File) -> None:
        file.attrs.update({"format": FORMAT, "tokenizer": ""})
        file["labels"] = np.zeros(rows, np.int32)

    path.write_bytes(frame("moments", (rows, *SHAPE), np.float16, describe))
    source = np.random.default_rng(seed)
    os.truncate(path, path.stat().st_size + rows * ROW_BYTES)
    for start in range(0, rows, _PART):
        bits = source.integers(0, 2**14, (min(_PART, rows - start), *SHAPE), np.uint16)  # finite halves
        fill(path, "moments", start, bits.view(np.float16))
    return {"file": path.name, "rows": rows, "bytes": path.stat().st_size}


def write_npz(folder: Path, store: LatentStore) -> None:
    """Write every row of the store as a file."""
    folder.mkdir()
    for row in range(len(store)):
        plain, mirrored = store.rows([row, row], np.array([False, True]))[0].numpy()
        np.savez(_npz(folder, row), moments=plain, moments_flip=mirrored)


def _npz(folder: Path, row: int) -> Path:
    return folder / f"{row:08d}.npz"


class Folder(Dataset[tuple[Tensor, int]]):
    """Position of the training => (moments, label), as the store's batches have them at that position."""

    def __init__(self, folder: Path, rows: int):
        self.folder, self.order, self.coins = folder, DataOrder(rows, SEED), Coins(SEED, "mirror")

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        row = int(self.order.indices(position, 1))
        name = "moments_flip" if self.coins.at(position, 1)[0] else "moments"
        return torch.from_numpy(np.load(_npz(self.folder, row))[name]), 0


def from_store(store: LatentStore, workers: int) -> Any:
    """Batches as training reads them."""
    return latent_batches(
        store,
        order=DataOrder(len(store), SEED),
        positions=itertools.count(0, BATCH),
        micro_batch_size=BATCH,
        mirror=True,
        seed=SEED,
        workers=workers,
    )


def from_npz(folder: Path, rows: int, workers: int) -> Iterable[tuple]:
    """The same batches from the folder of .npz files."""
    return DataLoader(Folder(folder, rows), batch_size=BATCH, sampler=itertools.count(), num_workers=workers)


def rate(batches: Iterable[tuple], seconds: float = _SECONDS) -> float:
    """Rows per second, from the first batch on, as workers take their time to start."""
    stream, rows = iter(batches), 0
    next(stream)
    start = now = time.perf_counter()
    for moments, *_ in stream:
        rows, now = rows + len(moments), time.perf_counter()
        if now > start + seconds:
            break
    return rows / (now - start)


def drop(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compared(folder: Path, rows: int, workers: int) -> dict:
    """Both ways, warm and cold, in turns; ratios are taken between neighbouring turns."""
    places = {"store": folder / "store", "npz": folder / "npz"}
    write_store(places["store"], rows)
    store = LatentStore(places["store"], "train")
    write_npz(places["npz"], store)
    ways: dict[str, Callable[[], Iterable[tuple]]] = {
        "store": functools.partial(from_store, store, workers),
        "npz": functools.partial(from_npz, places["npz"], rows, workers),
    }
    for (ours, *_), (theirs, *_) in itertools.islice(zip(*(way() for way in ways.values()), strict=False), 9):
        assert torch.equal(ours, theirs)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(_REPEATS):
        for name, way in ways.items():
            found.setdefault("warm", {}).setdefault(name, []).append(rate(way()))
    store.close()  # pages of a mapped file stay in the cache
    for _ in range(_REPEATS):
        for name, place in places.items():
            drop(place)
            with contextlib.ExitStack() as closing:
                if name == "store":
                    again = closing.enter_context(contextlib.closing(LatentStore(place, "train")))
                    batches: Iterable[tuple] = closing.enter_context(contextlib.closing(from_store(again, workers)))
                else:
                    batches = from_npz(place, rows, workers)
                cold = found.setdefault("cold", {}).setdefault(name, [])
                cold.append(rate(itertools.islice(batches, rows // BATCH), seconds=_SECONDS / 4))
    return {kind: _summary(rates) for kind, rates in found.items()}


def _summary(rates: dict[str, list[float]]) -> dict:
    ratios = [ours / theirs for ours, theirs in zip(rates["store"], rates["npz"], strict=True)]
    medians = {f"{name} rows per second": float(np.median(each)) for name, each in rates.items()}
    return medians | {"store over npz": float(np.median(ratios)), "range": [min(ratios), max(ratios)]}


def grown(folder: Path, rows: int, workers: int) -> dict:
    """Opening time and warm rate of a store of that many rows."""
    write_store(folder, rows)
    start = time.perf_counter()
    store = LatentStore(folder, "train")
    opened = time.perf_counter() - start
    rates = [rate(from_store(store, workers)) for _ in range(_REPEATS)]
    return {
        "rows": rows,
        "gigabytes": rows * ROW_BYTES / 1e9,
        "files": len(list(folder.glob("*.h5"))),
        "opening seconds": opened,
        "rows per second": float(np.median(rates)),
    }


def lines(figures: dict) -> list[Line]:
    """The table's lines."""
    return [
        Line(
            f"latents, {kind}",
            f"{figures['rows']:,} rows of {figures['row bytes'] // 1024} KiB, {figures['workers']} threads or workers",
            "rows/s",
            figures[kind]["store rows per second"],
            figures[kind]["npz rows per second"],
            figures[kind]["store over npz"],
            tuple(figures[kind]["range"]),
        )
        for kind in ("warm", "cold")
    ]


def main() -> None:
    """Write, read, report."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the comparison (default: 4096)")
    parser.add_argument("--workers", type=int, default=2, help="threads, and processes of the baseline (default: 2)")
    options = parser.parse_args()
    if options.rows < 2 * BATCH:
        parser.error(f"--rows is {options.rows}, but must be at least {2 * BATCH}, two batches.")
    keep_freed_memory()  # as all stages do; the workers of the baseline inherit it
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    figures = {"rows": options.rows, "workers": options.workers, "row bytes": ROW_BYTES // 2, "growth": []}
    with tempfile.TemporaryDirectory() as folder:
        figures |= compared(Path(folder), options.rows, options.workers)
    for rows in (count for count in _GROWTH if 2 * count * ROW_BYTES < memory):
        with tempfile.TemporaryDirectory() as folder:
            figures["growth"].append(grown(Path(folder) / "store", rows, options.workers))
    report("latents", figures, options)


if __name__ == "__main__":
    main()
