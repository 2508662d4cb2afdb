"""Whole commands against their peers, in the same private manager, in the same run (make bench).

Prints the medians in milliseconds and the ratio; the runs alternate, so that both meet the same
machine. What sdtool adds (processes, ports, a timeline) its peers do not do. Questions about ports
are in ``ports.py``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from sdtool.sandbox import PrivateManager

RUNS = 15
SDTOOL = [sys.executable, "-m", "sdtool"]

PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "start-up: --version": ([*SDTOOL, "--version"], [sys.executable, "-c", "import typer"]),
    "list": ([*SDTOOL, "list", "--user"], ["systemctl", "--user", "list-units"]),
    "list --json": (
        [*SDTOOL, "list", "--user", "--json"],
        ["systemctl", "--user", "list-units", "--output=json"],
    ),
    "trace": (
        [*SDTOOL, "trace", "sdtool-forks", "--user"],
        ["systemctl", "--user", "status", "sdtool-forks"],
    ),
}


def main() -> None:
    """Run every pair, then the stops, and print a line for each."""
    print(f"{'':24}{'sdtool':>10}{'peer':>10}{'ratio':>8}   (ms, median of {RUNS})")
    with PrivateManager() as manager:
        manager.run(["systemctl", "--user", "start", "sdtool-graceful", "sdtool-forks"])
        for name, (ours, theirs) in PAIRS.items():
            compare(name, manager.argv(ours), manager.argv(theirs))
        compare_stops(manager)


def compare(name: str, ours: list[str], theirs: list[str]) -> None:
    """Time both in turn."""
    pairs = [(clock(ours), clock(theirs)) for _ in range(RUNS)]
    report(name, [ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def compare_stops(manager: PrivateManager) -> None:
    """The same unit stopped by both in turn; starting it is not timed."""
    start = manager.argv(["systemctl", "--user", "start", "sdtool-graceful"])
    ours = manager.argv([*SDTOOL, "stop", "sdtool-graceful", "--user"])
    theirs = manager.argv(["systemctl", "--user", "stop", "sdtool-graceful"])
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for command, kept in zip((ours, theirs), times, strict=True):
            clock(start)
            kept.append(clock(command))
    report("stop (takes 200 ms)", *times)


def clock(command: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - began


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    """One line of the table."""
    mine, peer = statistics.median(ours) * 1000, statistics.median(theirs) * 1000
    print(f"{name:24}{mine:10.1f}{peer:10.1f}{mine / peer:8.2f}")


if __name__ == "__main__":
    main()
