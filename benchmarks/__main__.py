"""``python -m benchmarks``: every subject, each beside its peers; the tables, and JSON in ``benchmarks/results/``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.report import Result, print_table, wide_console, write_json

SUBJECTS = ("checksum", "stream", "incremental", "scheduler", "daemon", "zfs", "rbd")
"""Each is a module ``benchmarks.bench_<subject>`` with ``run(quick) -> list[Result]``."""


def main() -> int:
    """Exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller inputs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/results.json"), metavar="FILE")
    options = parser.parse_args()
    unknown = sorted(set(options.subjects) - set(SUBJECTS))
    if unknown:
        parser.error(f"no such subject: {', '.join(unknown)}")
    console = wide_console()
    results: list[Result] = []
    for subject in options.subjects or SUBJECTS:
        found = importlib.import_module(f"benchmarks.bench_{subject}").run(options.quick)
        print_table(found, console)
        results.extend(found)
    write_json(options.json, results)
    missed = [result for result in results if result.met is False]
    for result in missed:
        console.print(f"missed: {result.subject}, {result.case}: {result.ratio:.2f}, wanted {result.target:g}")
    console.print(f"{len(results)} figures, {len(missed)} targets missed; written to {options.json}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
