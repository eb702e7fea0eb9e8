"""Random rows per second of cached latents, against two usual ways to store them.

    python -m benchmarks.latents --rows 4096 --save

All three hold the same float16 moments of KL-16 at 256 pixels a side, with mirror images (32 KiB per image), and return
the same random batches of 64 rows, half of them mirrored. The files were just written, so they are in the page cache if
memory suffices.

    store   ear.latents.store: contiguous HDF5 shards of 1024 rows, memory-mapped
    npz     a folder with one .npz file per image
    h5py    one HDF5 file in chunks of 64 rows, with h5py's list indexing (sorted indices, as it requires)
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.measure import arguments, median_seconds, report
from ear.files.json_files import write_json
from ear.latents.store import FORMAT, STATS, LatentStore

SHAPE = (2, 32, 16, 16)
SHARD, CHUNK, BATCH = 1024, 64, 64  # rows
BATCHES = 8  # per timing


def write(folder: Path, rows: int) -> None:
    """Write the same random moments three times: store/, npz/, chunked.h5."""
    source, entries = np.random.default_rng(0), []
    (folder / "store").mkdir()
    (folder / "npz").mkdir()
    with h5py.File(folder / "chunked.h5", "w") as chunked:
        every = chunked.create_dataset("moments", (rows, *SHAPE), np.float16, chunks=(CHUNK, *SHAPE))
        for start in range(0, rows, SHARD):
            moments = source.standard_normal((min(SHARD, rows - start), *SHAPE), np.float32).astype(np.float16)
            every[start : start + len(moments)] = moments
            for row, pair in enumerate(moments, start):
                np.savez(folder / f"npz/{row:08d}.npz", moments=pair[0], mirrored=pair[1])
            name = f"train-{start // SHARD:05d}-of-{-(-rows // SHARD):05d}.h5"
            entries.append(shard(folder / "store" / name, moments))
    stats = {
        "format": FORMAT,
        "tokenizer": "",
        "shape": [SHAPE[1] // 2, *SHAPE[2:]],
        "classes": ["a"],
        "statistics": {"mean": 0.0, "std": 1.0, "channel_mean": [], "channel_std": []},
        "shards": {"train": entries},
    }
    write_json(folder / "store" / STATS, stats)


def shard(path: Path, moments: np.ndarray) -> dict:
    """Write one shard => its entry in stats.json."""
    with h5py.File(path, "w") as file:
        file["moments"], file["labels"] = moments, np.zeros(len(moments), np.int32)
        file.attrs.update({"format": FORMAT, "tokenizer": ""})
    return {"file": path.name, "rows": len(moments), "bytes": path.stat().st_size}


def readers(folder: Path) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Readers by name: (rows [64], mirrored [64]) => float16 [64, 32, 16, 16]."""
    store, chunked = LatentStore(folder / "store", "train"), h5py.File(folder / "chunked.h5", "r")["moments"]

    def npz(rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        names = [("moments", "mirrored")[which] for which in mirrored]
        return np.stack([np.load(folder / f"npz/{row:08d}.npz")[name] for row, name in zip(rows, names, strict=True)])

    def fancy(rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        order = np.argsort(rows)
        out = np.empty((len(rows), *SHAPE[1:]), np.float16)
        out[order] = chunked[rows[order]][np.arange(len(rows)), mirrored[order]]
        return out

    def stored(rows: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        return store.rows(torch.from_numpy(rows), torch.from_numpy(mirrored))[0]

    return {"store": stored, "npz": npz, "h5py": fancy}


def _read_all(read: Callable[[np.ndarray, np.ndarray], np.ndarray], batches: list) -> None:
    for batch in batches:
        read(*batch)


def measure(folder: Path, rows: int) -> dict:
    """Rows per second of each, and the ratio of the store's rate to each of the others."""
    source = np.random.default_rng(1)
    batches = [(source.choice(rows, BATCH, replace=False), np.arange(BATCH) % 2) for _ in range(BATCHES)]
    found = readers(folder)
    expected = [found["npz"](*batch) for batch in batches]
    rates = {}
    for name, read in found.items():
        assert all(np.array_equal(read(*batch), part) for batch, part in zip(batches, expected, strict=True))
        seconds = median_seconds(partial(_read_all, read, batches), repeats=9)
        rates[name] = BATCH * BATCHES / seconds
    ratios = {f"store over {name}": rates["store"] / rates[name] for name in ("npz", "h5py")}
    return {"rows": rows, "rows per second": rates, **ratios}


def main() -> None:
    """Write, read, report."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="images; 96 KiB of disk each (default: 4096)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.rows)
        figures = measure(Path(folder), options.rows)
    report("latents", figures, save=options.save)


if __name__ == "__main__":
    main()
