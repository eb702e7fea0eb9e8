"""Injections in batches: each is run once per state of the code, and its outcomes are counted."""

import functools
import hashlib
import json
import platform
import subprocess
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.repositories import ROOT

RESULTS = ROOT / "work/faults/results.jsonl"
SUMMARY = ROOT / "benchmarks/results/faults.json"
_CODE = ("ear", "stages", "flows", "tests/faults", "conf", "params.yaml", "dvc.yaml")


@functools.cache
def code() -> str:
    """A digest of all code that the faults meet."""
    digest = hashlib.sha256()
    for name in _CODE:
        for path in sorted([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def one(name: str, case: int) -> dict:
    """Inject one batch => its line of the results."""
    from tests.faults.catalogue import FAULTS

    fault = next(fault for fault in FAULTS if fault.name == name)
    start = time.monotonic()
    try:
        outcomes, error = fault.inject(case), ""
    except Exception as failure:
        outcomes, error = {}, "".join(traceback.format_exception(failure)).strip()
    seconds = round(time.monotonic() - start, 1)
    return {"code": code(), "fault": name, "case": case, "outcomes": outcomes, "error": error, "seconds": seconds}


def recorded() -> dict[tuple[str, int], dict]:
    """Results of this code by fault and case; those that failed are tried again."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(e["fault"], e["case"]): e for e in entries if e["code"] == code() and not e["error"]}


def run(wanted: list[tuple[str, int]], jobs: int, *, only_recorded: bool = False) -> list[dict]:
    """Inject the batches that have no result yet, unless `only_recorded` => all results."""
    from tests.faults.pipelines import template

    known = recorded()
    results = [known[key] for key in wanted if key in known]
    missing = [] if only_recorded else [key for key in wanted if key not in known]
    if missing:
        template()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, RESULTS.open("a") as file:
        for future in as_completed([pool.submit(one, *key) for key in missing]):
            entry = future.result()
            results.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            said = entry["error"] or ", ".join(f"{n:,} {what}" for what, n in entry["outcomes"].items())
            print(
                f"[{len(results)}/{len(wanted)}] {entry['fault']} {entry['case']}: {said} ({entry['seconds']} s)",
                flush=True,
            )
    return results


def summary(results: list[dict]) -> dict:
    """Counts by fault and outcome, with the machine and the commit."""
    rows: dict[str, Counter] = {}
    for entry in results:
        rows.setdefault(entry["fault"], Counter()).update(entry["outcomes"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": f"{platform.platform(terse=True)}, {platform.machine()}, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
        "faults": {name: dict(sorted(outcomes.items())) for name, outcomes in sorted(rows.items())},
    }


def page(counts: dict) -> str:
    """docs/reliability.md from the summary."""
    from jinja2 import Environment, StrictUndefined

    from tests.faults.catalogue import FAULTS

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = (Path(__file__).parent / "page.md.j2").read_text()
    return environment.from_string(text).render(faults=FAULTS, counts=counts)
