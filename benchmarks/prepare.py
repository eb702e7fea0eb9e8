"""Speed of preparing images against plain Pillow, and size of the result: python -m benchmarks.prepare [--save]

Uses real photographs (from scikit-image) in ImageNet's usual size and quality, as JPEG files and in a tar archive.
Plain Pillow is the usual loop: open, convert, crop, keep the array. All ways take turns on the same images, so other
work on the machine slows all of them. Speed per core is by CPU time (user and system). `decoded` does the same work as
plain Pillow; `files` and `archive` also store the images in HDF5, with a digest, synced to disk.
"""

import functools
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from benchmarks import measure
from ear.data import preparation
from ear.data.images import Encoding
from ear.data.manifest import Manifest, Row
from ear.data.preparation import Layout

SIZE = 256
SHARD = 128
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def pictures(count: int) -> list[bytes]:
    """JPEG files of 500 x 375 pixels, every fourth in portrait format, cut at random from the photographs."""
    photographs = [Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS]
    generator = np.random.default_rng(0)
    return [_picture(photographs[k % len(photographs)], k % 4 == 3, generator) for k in range(count)]


def _picture(photograph: Image.Image, upright: bool, generator: np.random.Generator) -> bytes:
    width, height = (375, 500) if upright else (500, 375)
    share = generator.uniform(0.7, 1) * min(photograph.width / width, photograph.height / height)
    left = generator.uniform(0, photograph.width - share * width)
    top = generator.uniform(0, photograph.height - share * height)
    box = (left, top, left + share * width, top + share * height)
    content = io.BytesIO()
    photograph.resize((width, height), Image.Resampling.LANCZOS, box).save(content, "JPEG", quality=95)
    return content.getvalue()


def write(folder: Path, contents: list[bytes]) -> dict[str, Manifest]:
    """Write the same images as separate files and as members of an archive."""
    ends = np.cumsum([len(content) for content in contents])
    files, members = [], []
    for k, content in enumerate(contents):
        (folder / f"{k}.jpg").write_bytes(content)
        files.append(Row("train", 0, f"{k}.jpg", len(content), f"{k}.jpg"))
        members.append(Row("train", 0, f"{k}.jpg", len(content), "all.tar", int(ends[k]) - len(content)))
    (folder / "all.tar").write_bytes(b"".join(contents))
    return {
        name: Manifest(folder, ("photograph",), ("photograph",), Encoding(upright=False), {}, rows)
        for name, rows in (("files", files), ("archive", members))
    }


def plain(paths: list[Path]) -> list[np.ndarray]:
    """The published crop in plain Pillow."""
    arrays = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        while min(image.size) >= 2 * SIZE:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        array = np.array(image)
        top, left = (array.shape[0] - SIZE) // 2, (array.shape[1] - SIZE) // 2
        arrays.append(array[top : top + SIZE, left : left + SIZE])
    return arrays


def decode(shard: preparation.Shard) -> None:
    """The work of `prepare` before it stores a shard."""
    list(preparation.images(shard.images, shard, []))


def store(shard: preparation.Shard) -> None:
    """The work of `prepare` for one shard.

    The file is deleted at once, so the next one reuses memory, as in a run that writes more than memory holds: on a
    virtual machine, the first use of memory costs more than writing.
    """
    with tempfile.TemporaryDirectory(dir=shard.root) as folder:
        preparation.write_shard(shard, Path(folder))


def cpu_seconds(function: Callable, argument: object) -> float:
    """CPU time of one call in this process; its result is dropped (prepare does not send arrays either)."""
    before = time.process_time()
    function(argument)
    return time.process_time() - before


def in_turns(pool: ProcessPoolExecutor, work: dict[str, tuple[Callable, list]], repeats: int) -> dict[str, np.ndarray]:
    """[repeats, 2]: (wall, CPU) seconds by name, after one turn that is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, (function, arguments) in work.items():
            start = time.perf_counter()
            cpu = sum(pool.map(functools.partial(cpu_seconds, function), arguments))
            times[name].append((time.perf_counter() - start, cpu))
    return {name: np.array(part[1:]) for name, part in times.items()}


def compared(times: dict[str, np.ndarray], count: int) -> dict:
    """Medians over the turns; ratios to plain Pillow are taken between neighbouring turns."""
    return {
        name: {
            "images_per_second": count / np.median(part[:, 0]),
            "images_per_cpu_second": count / np.median(part[:, 1]),
            "speed_per_core_against_plain": np.median(times["plain"][:, 1] / part[:, 1]),
            "range_against_plain": spread(times["plain"][:, 1] / part[:, 1]),
        }
        for name, part in times.items()
    }


def spread(ratios: np.ndarray) -> list[float]:
    """The smallest and the largest."""
    return [float(ratios.min()), float(ratios.max())]


def stored_bytes(manifest: Manifest, compression: str) -> dict:
    """Size and CPU time of one shard per image."""
    (shard,) = preparation.plan(manifest, "train", Layout(SIZE, SHARD, compression))[:1]
    folder = Path(tempfile.mkdtemp(dir=shard.root))
    seconds = cpu_seconds(functools.partial(preparation.write_shard, shard), folder)
    return {
        "bytes_per_image": (folder / shard.name).stat().st_size / len(shard.images),
        "cpu_milliseconds_per_image": 1e3 * seconds / len(shard.images),
    }


def lines(figures: dict) -> list[measure.Line]:
    """The table's lines: per core, by CPU time."""
    found = figures["processes_1"]
    return [
        measure.Line(
            f"prepare, {name}",
            f"{figures['images']} photographs to {SIZE} pixels",
            "images per CPU second",
            found[name]["images_per_cpu_second"],
            found["plain"]["images_per_cpu_second"],
            found[name]["speed_per_core_against_plain"],
            tuple(found[name]["range_against_plain"]),
        )
        for name in ("files", "archive")
    ]


def main() -> None:
    """Measure and report."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--images", type=int, default=512, help="images per turn (default: 512)")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the median is reported (default: 7)")
    arguments = parser.parse_args()
    contents = pictures(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        listed = write(Path(folder), contents)
        paths = [Path(folder, row.path) for row in listed["files"].rows]
        work: dict[str, tuple[Callable, list]] = {
            "plain": (plain, [paths[k : k + SHARD] for k in range(0, len(paths), SHARD)])
        }
        for name, manifest, function in (
            ("decoded", listed["files"], decode),
            ("files", listed["files"], store),
            ("archive", listed["archive"], store),
        ):
            shards = preparation.plan(manifest, "train", Layout(SIZE, SHARD, "none"))
            work[name] = (function, shards)
        times = {}
        for workers in (1, 2):
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                times[workers] = in_turns(pool, work, arguments.repeats)
        stored = {kind: stored_bytes(listed["files"], kind) for kind in ("none", "gzip")}
    figures = {
        "images": len(contents),
        "jpeg_bytes_per_image": np.mean([len(content) for content in contents]).item(),
        **{f"processes_{workers}": compared(part, len(contents)) for workers, part in times.items()},
        "speed_of_two_processes_against_one": {
            name: np.median(times[1][name][:, 0]) / np.median(times[2][name][:, 0]) for name in work
        },
        "stored": stored,
    }
    measure.report("prepare", figures, arguments)


if __name__ == "__main__":
    main()
