"""Run the benchmarks of speed one after the other, and print one table.

    python -m benchmarks [--device cuda] [--save] [--only NAME ...]

Each is a program of its own (`python -m benchmarks.NAME --help`). Baselines are the published way of doing it; ratios
are medians over turns, with their smallest and largest value. The last column is the share of the rate of a large
matrix product, measured in the same run; for training on a known GPU, the share of its data sheet's rate. With --save,
the figures are kept in benchmarks/results; those of a GPU in a folder with its name.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import RESULTS, Line

ON = {"cpu": ("training", "sampling", "latents", "prepare"), "cuda": ("training", "sampling", "latents")}
_WITH_DEVICE = ("training", "sampling")


def run(name: str, device: str, folder: Path) -> dict:
    """Run one benchmark => its report."""
    chosen = ["--device", device] if name in _WITH_DEVICE else []
    command = [sys.executable, "-m", f"benchmarks.{name}", *chosen, "--save", "--results", str(folder)]
    print(f"> {' '.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / f"{name}.json").read_text())


def table(reports: Sequence[dict]) -> str:
    """The lines of all benchmarks, in Markdown."""
    rows: list[tuple[str, ...]] = [("what", "size", "ours", "baseline", "ratio (range)", "share of peak"), ("---",) * 6]
    for report in reports:
        module = importlib.import_module(f"benchmarks.{report['benchmark']}")
        rows += [_row(line) for line in module.lines(report["figures"])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(line: Line) -> tuple[str, ...]:
    least, most = line.spread
    share = f"{line.share:.0%}" if line.share else ""
    rates = (f"{_number(line.ours)} {line.unit}", _number(line.baseline))
    return (line.what, line.size, *rates, f"{line.ratio:.2f} ({least:.2f} to {most:.2f})", share)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(ON), default="cpu", help="default: cpu")
    parser.add_argument("--only", nargs="+", choices=ON["cpu"], metavar="NAME", help=", ".join(ON["cpu"]))
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    arguments = parser.parse_args()
    names = arguments.only or ON[arguments.device]
    with tempfile.TemporaryDirectory() as folder:
        reports = [run(name, arguments.device, Path(folder)) for name in names]
        gpus = [report["machine"]["gpu"] for report in reports if report["machine"].get("gpu")]
        gpu = gpus[0] if gpus and arguments.device == "cuda" else None
        if arguments.save:
            kept = RESULTS / re.sub(r"\W+", "-", gpu).lower() if gpu else RESULTS
            kept.mkdir(exist_ok=True)
            for path in Path(folder).iterdir():
                (kept / path.name).write_bytes(path.read_bytes())
    machine = reports[0]["machine"]
    device = gpu or machine["cpu"]
    print(f"\n{device}, {machine['cores']} cores, load {machine['load']}\n")
    print(table(reports))


if __name__ == "__main__":
    main()
