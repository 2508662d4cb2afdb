"""What it costs a stop to be observed, against systemctl stop of the same unit (make bench).

How long a unit takes from the request to its end is the manager's own word, whoever asked: from
ActiveExitTimestamp to InactiveEnterTimestamp. What a command takes beyond that is start-up and
report. The runs alternate, so that all meet the same machine. Tier C is tier A with the kernel's
record switched off. As root, on a private manager; numbers are milliseconds, medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sdtool.sandbox import PrivateManager

RUNS = 15
SDTOOL = [sys.executable, "-m", "sdtool", "stop", "--user"]
WITHOUT_RECORD = "--observers=-tracefs,-procevents"

CONTENDERS = {
    "systemctl": ["systemctl", "--user", "stop"],
    "tier C": [*SDTOOL, WITHOUT_RECORD],
    "tier A": SDTOOL,
    "tier A --json": [*SDTOOL, "--json"],
}

PAYLOADS = Path(__file__).resolve().parents[1] / "system"
DEMOS = Path(__file__).resolve().parents[2] / "units" / "bin"

COMMANDS = {
    "dies at once": f"{DEMOS / 'serve'}",
    "takes 200 ms": f"{DEMOS / 'serve'} --goodbye 0.2",
    "has 20 processes": f"{PAYLOADS / 'payload.py'} fork=20",
    "has 1000 processes": f"{PAYLOADS / 'payload.py'} fork=1000",
}

CROWD = "has 1000 processes"


TIMER = """
import subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print((time.perf_counter() - began) * 1000)
"""
"""Times a command where the manager is: the way there is none of its costs."""


class Cost(NamedTuple):
    """One stop."""

    stopping_ms: float
    beyond_ms: float


def main() -> None:
    """Stop every unit with everyone in turn, and print what it cost."""
    # As installed: modules are compiled once, and not for each run.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with manager_of(COMMANDS) as manager:
        print(f"from the request to dead  (ms, median of {RUNS})")
        print(f"{'':22}" + "".join(f"{name:>15}" for name in CONTENDERS))
        beyond: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for title in COMMANDS:
            costs = measure(manager, title)
            print_row(title, {name: [c.stopping_ms for c in cs] for name, cs in costs.items()})
            for name, found in costs.items():
                if title != CROWD:
                    beyond[name] += [cost.beyond_ms for cost in found]
        print("\nthe whole command, beyond the stop")
        print_row("", beyond)
        print(f"\npeak memory where it {CROWD}  (MB)")
        print_row("", {name: [peak_mb(manager, argv)] for name, argv in CONTENDERS.items()})


def print_row(title: str, columns: dict[str, list[float]]) -> None:
    """The first column, and of the others what they are more than that."""
    medians = {name: statistics.median(values) for name, values in columns.items()}
    first, *others = medians.values()
    cells = "".join(f"{value:>8.1f} ({value - first:+.1f})".rjust(15) for value in others)
    print(f"{title:22}{first:>15.1f}{cells}")


@contextmanager
def manager_of(commands: dict[str, str]) -> Iterator[PrivateManager]:
    """A manager that has a unit for each command, and keeps them loaded while they are dead."""
    with tempfile.TemporaryDirectory() as directory:
        names = [unit_of(title) for title in commands]
        for name, command in zip(names, commands.values(), strict=True):
            Path(directory, name).write_text(
                "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=all\n"
                f"ExecStart=/usr/bin/python3 -B {command}\n"
            )
        Path(directory, "keep.target").write_text(f"[Unit]\nAfter={' '.join(names)}\n")
        with PrivateManager(units=Path(directory)) as manager:
            systemctl(manager, "start", "keep.target")
            yield manager


def unit_of(title: str) -> str:
    """The unit with that title."""
    return f"{title.replace(' ', '-')}.service"


def systemctl(manager: PrivateManager, *words: str) -> str:
    """Ask the manager something that must not fail."""
    done = manager.run(["systemctl", "--user", *words])
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(manager: PrivateManager, title: str) -> dict[str, list[Cost]]:
    """The costs of each run, by contender."""
    costs: dict[str, list[Cost]] = {name: [] for name in CONTENDERS}
    for _ in range(RUNS):
        for name, argv in CONTENDERS.items():
            costs[name].append(stop(manager, unit_of(title), argv))
    return costs


def stop(manager: PrivateManager, unit: str, argv: list[str]) -> Cost:
    """Start a unit, and stop it."""
    systemctl(manager, "start", unit)
    timed = manager.run([sys.executable, "-c", TIMER, *argv, unit])
    assert timed.returncode == 0, timed.stderr
    whole_ms = float(timed.stdout)
    names = ["ActiveExitTimestampMonotonic", "InactiveEnterTimestampMonotonic"]
    shown = systemctl(manager, "show", "--property", ",".join(names), unit)
    stamps = dict(line.split("=") for line in shown.split())
    stopping_ms = (int(stamps[names[1]]) - int(stamps[names[0]])) / 1000
    return Cost(stopping_ms, whole_ms - stopping_ms)


def peak_mb(manager: PrivateManager, argv: list[str]) -> float:
    """The most resident memory of a command that stops the crowd."""
    systemctl(manager, "start", unit_of(CROWD))
    command = manager.argv([*argv, unit_of(CROWD)])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
