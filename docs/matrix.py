"""Write docs/matrix.md, suites by tests, from the reports of the runs (as root: make matrix)."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdtool.sandbox.rootfs import SUITES

HERE = Path(__file__).parent
REPORTS = HERE.parent / "build" / "reports"

HEAD = """\
# What was tested where

Made by `make matrix` from the reports of the runs; not written by hand. A number is how many
cases of a test passed, a letter why others did not run.
"""

INSIDE = """\
## The system tests

`host` is a private `systemd --user` manager in the machine's own namespaces. The others ran inside
a booted container of the suite, as units of it: as root on its system manager, as an ordinary user
on that user's own manager.
"""

OUTSIDE = """\
## The containers and hostile hosts

Driven from outside, with root and an ordinary user inside; most boot a container of their own with
something missing, broken or in the way. `machine` is for what needs no suite.
"""

NO_SUITE = "machine"
"""The column of what is tested once: the cache, say, or what is told where packages lack."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a test in one column: passed, failed, or skipped with a reason."""

    file: str
    test: str
    column: str
    outcome: str
    reason: str = ""


Table = dict[tuple[str, str], dict[str, list[Case]]]


def main() -> int:
    """Write the matrix; 1 when something failed or a report is missing."""
    columns = ["host", *(f"{suite}-{user}" for suite in SUITES for user in ("root", "tester"))]
    missing = [name for name in (*columns, "containers") if not report(name).exists()]
    if missing:
        sys.stderr.write(f"There is no report of {', '.join(missing)}: run make matrix.\n")
        return 1
    inside = [case for name in columns for case in read_report(report(name), name)]
    outside = list(read_report(report("containers"), ""))
    notes: dict[str, str] = {}
    parts = [HEAD, versions(columns), INSIDE, *render(inside, columns, notes)]
    parts += [OUTSIDE, *render(outside, [*SUITES, NO_SUITE], notes)]
    parts += [f"- ({letter}) {reason}" for reason, letter in notes.items()]
    (HERE / "matrix.md").write_text("\n".join(parts) + "\n")
    failed = [case for case in (*inside, *outside) if case.outcome == "failed"]
    for case in failed:
        sys.stderr.write(f"{case.column}: {case.file} {case.test} failed\n")
    return 1 if failed else 0


def report(name: str) -> Path:
    """The file of a report."""
    return REPORTS / f"{name}.xml"


def read_report(path: Path, column: str) -> Iterator[Case]:
    """The cases of a JUnit report; where it is about several suites, each case names its own."""
    for node in ET.parse(path).getroot().iter("testcase"):
        test, _, parameters = node.attrib["name"].partition("[")
        words = re.split(r"[-\]]", parameters)
        own = column or next((word for word in words if word in SUITES), NO_SUITE)
        skipped = node.find("skipped")
        outcome = "passed" if skipped is None else "skipped"
        if node.find("failure") is not None or node.find("error") is not None:
            outcome = "failed"
        reason = "" if skipped is None else skipped.attrib["message"]
        file = node.attrib["classname"].rpartition(".")[2]
        yield Case(file, test, own, outcome, reason)


def versions(columns: Iterable[str]) -> str:
    """A line with the systemd of each run."""
    found = {}
    for name in columns:
        for node in ET.parse(report(name)).getroot().iter("property"):
            if node.attrib["name"] == "systemd":
                found[name.partition("-")[0]] = node.attrib["value"]
    listed = ", ".join(f"{suite}: {version}" for suite, version in found.items())
    return f"systemd of each: {listed}.\n"


def render(cases: Iterable[Case], columns: list[str], notes: dict[str, str]) -> list[str]:
    """One table for each file of tests; columns without any case are left out."""
    table: Table = {}
    for case in cases:
        table.setdefault((case.file, case.test), {}).setdefault(case.column, []).append(case)
    used = [name for name in columns if any(name in row for row in table.values())]
    lines = []
    for file in dict.fromkeys(file for file, _ in table):
        lines += [f"| {file} | {' | '.join(used)} |", "|--" * (len(used) + 1) + "|"]
        for (owner, test), row in table.items():
            if owner == file:
                cells = (render_cell(row.get(name, []), notes) for name in used)
                lines.append(
                    f"| {test.removeprefix('test_').replace('_', ' ')} | {' | '.join(cells)} |"
                )
        lines.append("")
    return lines


def render_cell(cases: list[Case], notes: dict[str, str]) -> str:
    """How many passed, and what became of the others."""
    outcomes = Counter(case.outcome for case in cases)
    words = [str(outcomes["passed"])] if outcomes["passed"] else []
    words += [f"**{outcomes['failed']} FAILED**"] if outcomes["failed"] else []
    for reason in dict.fromkeys(case.reason for case in cases if case.outcome == "skipped"):
        letter = notes.setdefault(reason, chr(ord("a") + len(notes)))
        words.append(f"({letter})")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
