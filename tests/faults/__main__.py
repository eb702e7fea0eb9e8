"""Inject faults into the real pipeline, count what happens, and write docs/reliability.md.

    python -m tests.faults                         # quick: at most ten minutes
    python -m tests.faults --full --page           # an hour or more; started again, it resumes where it stopped
    python -m tests.faults --only kill images

Each batch of injections is a function of its number. Results are kept in work/faults until the code changes. Exits with
1 if anything happened that must not.
"""

import argparse
import json
import sys

from tests.faults.catalogue import FAULTS
from tests.faults.run import SUMMARY, page, run, summary
from tests.repositories import ROOT

PAGE = ROOT / "docs/reliability.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--jobs", type=int, default=2, help="batches at a time (default: 2)")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)} and its counts")
    parser.add_argument("--recorded", action="store_true", help="inject nothing more: only what has been recorded")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name in arguments.only]
    counts = {fault.name: fault.full if arguments.full else fault.quick for fault in chosen}
    wanted = [(name, case) for name, count in counts.items() for case in range(count)]
    wanted.sort(key=lambda batch: batch[1] / counts[batch[0]])  # all faults advance alike
    results = run(wanted, arguments.jobs, only_recorded=arguments.recorded)
    failed = [entry for entry in results if entry["error"]]
    for entry in failed:
        print(f"\n{entry['fault']} {entry['case']}:\n{entry['error']}", file=sys.stderr)
    cases = sum(sum(entry["outcomes"].values()) for entry in results)
    print(f"{cases:,} injections in {len(results)} batches; {len(failed)} batches failed")
    if arguments.page and not failed:
        found = summary(results)
        SUMMARY.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(found))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
