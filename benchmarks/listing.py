"""Time to list ImageNet, and to plan its preparation: python -m benchmarks.listing --files N [--save]

Makes a tree of N empty files in a thousand class folders, and a training archive with as many empty members, in a
temporary folder (TMPDIR). Times the steps of the fetch stage, and what prepare does before it reads the first image.
Spinning disks and network file systems are far slower than what is measured here.
"""

import io
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks import measure
from ear.data import preparation, sources
from ear.data.images import Encoding
from ear.data.manifest import read_manifest, write_manifest
from ear.data.preparation import Layout
from ear.data.sources import imagenet

Result = TypeVar("Result")


def wnid(label: int) -> str:
    """A made-up WordNet id."""
    return f"n{10_000_000 + label:08d}"


def write_tree(root: Path, files: int) -> None:
    """train/WNID/WNID_K.JPEG, all empty."""
    for label in range(imagenet.CLASSES):
        folder = root / "train" / wnid(label)
        folder.mkdir(parents=True)
        for k in range(label, files, imagenet.CLASSES):
            (folder / f"{wnid(label)}_{k}.JPEG").touch()


def write_archive(root: Path, files: int) -> None:
    """ILSVRC2012_img_train.tar, all images empty."""
    root.mkdir()
    with tarfile.open(root / imagenet.TRAIN_ARCHIVE, "w", format=tarfile.USTAR_FORMAT) as archive:
        for label in range(imagenet.CLASSES):
            names = (f"{wnid(label)}_{k}.JPEG" for k in range(label, files, imagenet.CLASSES))
            headers = b"".join(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT) for name in names)
            member = tarfile.TarInfo(f"{wnid(label)}.tar")
            member.size = len(headers) + 1024
            archive.addfile(member, io.BytesIO(headers + bytes(1024)))


def listed(root: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of every step; other work on the machine hardly affects the latter."""
    seconds: dict[str, dict[str, float]] = {}

    def step(name: str, function: Callable[[], Result]) -> Result:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        seconds[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return result

    source = step("find", lambda: sources.find(root, val_fraction=0.05))
    step(
        "write_manifest",
        lambda: write_manifest(
            folder, source.images, tree=root, root=root, names=source.names, encoding=Encoding(upright=False)
        ),
    )
    manifest = step("read_manifest", lambda: read_manifest(folder))
    step("plan", lambda: preparation.plan(manifest, "train", Layout(256, 1024, "none")))
    return seconds


def main() -> None:
    """Measure and report."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--files", type=int, default=200_000, help="at least 2000 (default: 200000)")
    arguments = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("tree", write_tree), ("archive", write_archive)):
            write(Path(folder, name), arguments.files)
            seconds[name] = listed(Path(folder, name), Path(folder, f"{name}-list"))
        size = Path(folder, "archive-list/manifest.csv").stat().st_size
    share = imagenet.TRAIN_IMAGES / arguments.files  # each step is linear in the number of files, except a sort
    figures = {
        "files": arguments.files,
        "seconds": seconds,
        "manifest_bytes_per_image": size / arguments.files,
        "seconds_for_imagenet": {
            name: {kind: share * sum(step[kind] for step in steps.values()) for kind in ("wall", "cpu")}
            for name, steps in seconds.items()
        },
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    measure.report("listing", figures, arguments)


if __name__ == "__main__":
    main()
