"""The tests of tests/test_fuzz.py with many more examples, others each time; not a benchmark, but as long as one.

    python benchmarks/fuzz.py [--examples 10000] [-k NAME] [--out FOLDER]

Writes fuzz.json and fuzz.md: how many examples each test was given, and whether it passed. Ends with pytest's exit code. A
failure prints the example.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from time import perf_counter

import pytest
from record import RESULTS, machine, provenance, table, write

ROOT = Path(__file__).resolve().parents[1]


class Account:
    """A pytest plugin: the outcome and the seconds of every test."""

    def __init__(self) -> None:
        self.tests: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            name = report.nodeid.partition("::")[2].removeprefix("test_")
            self.tests.append({"test": name, "outcome": report.outcome, "seconds": round(report.duration, 1)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="of each test (%(default)s)")
    parser.add_argument("-k", default="not kinds_of_files", help="only the tests that match this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args()
    about = machine()
    os.environ["FEWSTEP_FUZZ"] = str(options.examples)
    account, begin = Account(), perf_counter()
    arguments = ["--rootdir", str(ROOT), "-q", str(ROOT / "tests" / "test_fuzz.py"), "-k", options.k]
    code = int(pytest.main(arguments, plugins=[account]))
    passed = sum(one["outcome"] == "passed" for one in account.tests)
    rows = [[str(one["test"]), str(one["outcome"]), str(one["seconds"])] for one in account.tests]
    page = (
        "# Fuzzing the sweep file, specs and loaders\n\n"
        f"{passed} of {len(rows)} tests pass with {options.examples} random inputs each, "
        f"{options.examples * len(rows)} in all, in {perf_counter() - begin:.0f} s: a right result or one clear error.\n\n"
        + table(["inputs", "outcome", "s"], rows)
        + "\n"
        + provenance(about)
    )
    body = {"machine": about, "examples": options.examples, "tests": account.tests}
    write(options.out, "fuzz", body, page)
    return code


if __name__ == "__main__":
    sys.exit(main())
