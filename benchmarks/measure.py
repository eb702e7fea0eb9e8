"""Shared by all benchmarks: medians of timings, facts about the machine, reports."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ear.files.json_files import rounded, write_json

RESULTS = Path(__file__).parent / "results"


def median_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `repeats` calls, after one call that is not counted.

    A function that starts work on a GPU must wait until it ends (`torch.cuda.synchronize()`).
    """
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def machine() -> dict:
    """Facts that timings depend on; `load` is the number of runnable processes, averaged over the last minute."""
    facts = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    if torch := sys.modules.get("torch"):  # only if the benchmark has imported it
        facts["torch"] = torch.__version__
        facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--save`; a benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME.json")
    return parser


def report(name: str, figures: dict, *, save: bool = False) -> None:
    """Print figures and machine facts as JSON; if `save`, also write benchmarks/results/NAME.json."""
    content = {"benchmark": name, "figures": rounded(figures), "machine": machine()}
    print(json.dumps(content, indent=1))
    if save:
        write_json(RESULTS / f"{name}.json", content)
