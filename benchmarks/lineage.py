"""What it costs to check every input against its stage's record, as a share of the stage.

    python -m benchmarks.lineage --save

A stage hashes its inputs once, on two threads beside its work, and its outputs at the end, except shards, which it
has hashed itself. Here 1 GiB is hashed from the page cache; the work of an ImageNet stage per image is that of
benchmarks/results/scaling.json, in CPU seconds of one core.
A disk slower than the hash rate limits hashing and work alike.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import RESULTS, arguments, median_seconds, report
from ear.lineage.digests import file_digests

FILES, SIZE = 16, 1 << 26  # 64 MiB each, as shards have
# Stage: bytes of input that are read per image of work, and the work in scaling.json, in CPU seconds per image.
STAGES = {"cache": ("data/prepared", "cache"), "train, one epoch": ("data/latents", "train")}


def rates() -> dict[str, float]:
    """Bytes per second of wall time on two threads, and per CPU second."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            (Path(folder) / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(SIZE))
        start = time.process_time()
        file_digests([Path(folder)])
        cpu = time.process_time() - start
        wall = median_seconds(lambda: file_digests([Path(folder)]))
    return {"bytes_per_second": FILES * SIZE / wall, "bytes_per_cpu_second": FILES * SIZE / cpu}


def main() -> None:
    """The command line."""
    options = arguments(__doc__).parse_args()
    known = json.loads((RESULTS / "scaling.json").read_text())["figures"]
    measured = rates()
    shares = {
        stage: known["bytes"][source] / measured["bytes_per_cpu_second"] / known["cpu_seconds"][work]
        for stage, (source, work) in STAGES.items()
    }
    report("lineage", {**measured, "share_of_cpu_seconds": shares}, options)


if __name__ == "__main__":
    main()
