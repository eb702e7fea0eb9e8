"""Shared by all benchmarks: timings by turns, the matmul peak, facts about the machine, reports."""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ear.files.json_files import rounded, write_json

if TYPE_CHECKING:
    import torch

_PEAK_SIDE = {"cpu": 1536, "cuda": 8192}
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


def turns(ways: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each way, turn by turn, so that other work slows all of them; the first turn is not counted.

    A function that starts work on a GPU must wait until it ends.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                way()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: times[1:] for name, times in seconds.items()}


@contextlib.contextmanager
def elsewhere(make: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """Yield a function that runs the result of `make(*arguments)` in a child process and waits until it ends.

    `make` is called once, in the child. For baselines on a CPU, which then run without this process's allocator
    settings (ear.runtime.device.keep_freed_memory). `make` and its arguments must pickle.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_answer, args=(there, make, arguments), daemon=True)
    child.start()
    there.close()  # so that the end of the child is the end of the pipe

    def call() -> None:
        try:
            here.send(True)
            error = here.recv()
        except (EOFError, BrokenPipeError):
            child.join()
            error = f"it ended with code {child.exitcode}"
        if error:
            raise RuntimeError(f"the baseline failed in its process: {error}")

    try:
        yield call
    finally:
        child.kill()
        child.join()


def _answer(pipe: Any, make: Callable[..., Callable[[], object]], arguments: Sequence[Any]) -> None:
    """Call the function that `make` returns whenever something arrives; answer with its error, or with ''."""
    try:
        function = make(*arguments)
        while pipe.recv():
            function()
            pipe.send("")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def speedup(ours: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The median and the range of the ratios of neighbouring turns; above 1: ours takes less time."""
    ratios = [theirs / own for own, theirs in zip(ours, baseline, strict=True)]
    return {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}


def matmul_peak(device: "torch.device", precision: str) -> float:
    """Operations per second of a large square matrix product, measured: what a program can get at most."""
    import torch

    side = _PEAK_SIDE[device.type]
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.ones(side, side, device=device, dtype=kind) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / min(turns({"mm": multiply}, rounds=9, calls=3)["mm"])


@dataclass(frozen=True)
class Line:
    """One line of the table of `python -m benchmarks`."""

    what: str
    size: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    spread: tuple[float, float]  # smallest and largest ratio
    share: float | None = None  # of the machine's matmul peak

    @classmethod
    def of_images(cls, what: str, size: str, figures: Mapping[str, Any]) -> "Line":
        """The line of a benchmark in images per second."""
        return cls(
            what,
            size,
            "images/s",
            figures["images_per_second"],
            figures["baseline_images_per_second"],
            figures["speedup"],
            tuple(figures["speedup_range"]),
            figures.get("mfu") or figures["share_of_peak"],
        )


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
    """A parser with `--save` and `--results`; a benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--results", type=Path, help="another folder for it")
    return parser


def device_of(name: str) -> "torch.device":
    """The device to measure, for "auto", "cpu" or "cuda", with the threads and kernels of the stages."""
    from ear.config.compose import compose
    from ear.runtime.device import prepare_device

    return prepare_device(name, compose([]).compute.threads)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is")


def report(name: str, figures: dict, options: argparse.Namespace) -> None:
    """Print figures and machine facts as JSON; with --save, also write NAME.json into --results (default: RESULTS)."""
    content = {"benchmark": name, "figures": rounded(figures), "machine": machine()}
    print(json.dumps(content, indent=1))
    if options.save:
        write_json((options.results or RESULTS) / f"{name}.json", content)
