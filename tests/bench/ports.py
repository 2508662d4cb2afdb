"""Questions about ports against their peers, on servers of three sizes (make bench).

The servers are made here: real sockets and processes, and a private manager whose unit has the
port asked about, in a network namespace of their own. Nothing of the machine is disturbed, and
its own sockets are not seen; its own processes are. Needs root; lsof and time(1) where they are
there. Other sizes as arguments: SOCKETS/PROCESSES.

Wall time, CPU time and peak memory are told as they are, and as what the peer needs of what
sdtool needs: "12.3x" is a peer that takes 12.3 times as much. Only like is compared with like:
a library call, in a process that has imported what it needs, with a library call, and a whole
command, start-up and imports included, with a whole command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import measure
from measure import RUNS, SLOW_RUNS, SLOW_S, Result

from sdtool.sandbox import PrivateManager

HERE = Path(__file__).parent
SIZES = ("50/100", "1000/1000", "20000/3000")
UNIT = "sdtool-graceful.service"
PORT = "18080"

SDTOOL = (sys.executable, "-m", "sdtool")
NET_CONNECTIONS = "import psutil; [c for c in psutil.net_connections() if {}]"


@dataclass(frozen=True)
class Contender:
    """A way to the answer, and how to run it."""

    name: str
    argv: tuple[str, ...]
    is_call: bool = False


@dataclass(frozen=True)
class Question:
    """Groups of what is compared; in each, what the others are held against comes first."""

    title: str
    groups: tuple[tuple[Contender, ...], ...]


def main() -> None:
    """Go where no other socket is, and ask every question at every size."""
    parser = argparse.ArgumentParser(description="Questions about ports against their peers.")
    parser.add_argument("sizes", nargs="*", metavar="SOCKETS/PROCESSES", default=SIZES)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("/"))) for size in options.sizes]
    if not options.inside:
        command = ["unshare", "--net", "--", sys.executable, *sys.argv, "--inside"]
        os.execvpe(command[0], command, clean_environment())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with PrivateManager() as manager:
        manager.run(["systemctl", "--user", "start", UNIT])
        questions = make_questions(read_pids(manager))
        print_heading()
        for sockets, processes in sizes:
            with crowd(sockets, processes):
                for question in questions:
                    print(f"\n{question.title}, {describe(sockets, processes)}")
                    ask(manager, question)


def clean_environment() -> dict[str, str]:
    """Python as it is started usually: with bytecode that is kept, for instance."""
    environment = os.environ.items()
    return {k: v for k, v in environment if not k.startswith("PYTHON") or k == "PYTHONPATH"}


@contextlib.contextmanager
def crowd(sockets: int, processes: int) -> Iterator[None]:
    """So many of each, in the background; none is left at the end."""
    # Without site: what it has in memory, each of its processes has.
    command = [sys.executable, "-I", "-S", str(HERE / "crowd.py"), str(sockets), str(processes)]
    pipe = subprocess.PIPE
    # The end of this block is the end of its standard input, and it is waited for.
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit(f"{sockets} sockets in {processes} processes did not come up")
        yield


def read_pids(manager: PrivateManager) -> list[str]:
    """The processes of the unit."""
    show = ["systemctl", "--user", "show", "--value", "--property=ControlGroup", UNIT]
    group = manager.run(show).stdout.strip()
    procs = manager.run(["sh", "-c", f"cat /sys/fs/cgroup{group}/cgroup.procs"])
    return procs.stdout.split()


# What is compared ----------------------------------------------------------------------------


def make_questions(pids: Sequence[str]) -> tuple[Question, ...]:
    """Every question with all that can answer it."""
    return (ask_port(), ask_ports_of(pids), ask_ports())


def ask_port() -> Question:
    """System scope is what finds no unit here, but needs no connection to a manager."""
    return Question(
        title=f"Who owns port {PORT}",
        groups=(
            (
                call("sdtool Host.port", "sdtool-port", "user", UNIT, PORT),
                call("  in system scope", "sdtool-port", "system", UNIT, PORT),
                call("psutil.net_connections()", "psutil-port", PORT),
            ),
            (
                sdtool("port", PORT, "--user"),
                Contender("  in system scope", (*SDTOOL, "port", PORT)),
                psutil(f"c.laddr and c.laddr.port == {PORT}"),
                program("ss", "-lntp"),
                program("ss", "-lntpH", f"sport = :{PORT}"),
                program("lsof", "-nP", f"-iTCP:{PORT}"),
            ),
        ),
    )


def ask_ports_of(pids: Sequence[str]) -> Question:
    """The pids are given to psutil, which does not know of units."""
    return Question(
        title="Listening ports of one unit",
        groups=(
            (
                call("sdtool Host.ports([unit])", "sdtool-ports", UNIT, UNIT),
                call("psutil.Process(pid) of its pids", "psutil-ports-of", *pids),
            ),
            (
                Contender("sdtool ports UNIT --user", (*SDTOOL, "ports", UNIT, "--user")),
                program("ss", "-lntp"),
            ),
        ),
    )


def ask_ports() -> Question:
    """Of every process, in a unit or not; sdtool lists UDP too."""
    return Question(
        title="All listening ports",
        groups=(
            (
                call("sdtool Host.ports()", "sdtool-ports", UNIT),
                call("psutil.net_connections()", "psutil-ports"),
            ),
            (
                sdtool("ports", "--user"),
                psutil("c.status == 'LISTEN'"),
                program("ss", "-lntp"),
                program("ss", "-lntup"),
            ),
        ),
    )


def call(name: str, *arguments: str) -> Contender:
    """A library call; see ``library.CALLS``."""
    return Contender(name, (sys.executable, str(HERE / "library.py"), *arguments), is_call=True)


def sdtool(*arguments: str) -> Contender:
    """The whole command."""
    return Contender(f"sdtool {' '.join(arguments)}", (*SDTOOL, *arguments))


def psutil(condition: str) -> Contender:
    """The whole command that psutil's users write."""
    code = NET_CONNECTIONS.format(condition)
    return Contender("python -c 'import psutil; ...'", (sys.executable, "-c", code))


def program(*argv: str) -> Contender:
    """Another program."""
    return Contender(" ".join(argv), argv)


# Measuring -----------------------------------------------------------------------------------


def ask(manager: PrivateManager, question: Question) -> None:
    """Measure all the ways to one answer in turn, and print a line for each."""
    everyone = [contender for group in question.groups for contender in group]
    there = [each for each in everyone if shutil.which(each.argv[0])]
    plan = [{"argv": each.argv, "is_call": each.is_call} for each in there]
    command = manager.argv([sys.executable, measure.__file__, json.dumps(plan)])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    results = dict(zip(there, json.loads(done.stdout), strict=True))
    for group, kind in zip(question.groups, ("library call", "whole command"), strict=True):
        print_group(kind, group, results)


# The tables ----------------------------------------------------------------------------------

MEASURES: tuple[tuple[Literal["wall_s", "cpu_s", "peak_kb"], str, float], ...] = (
    ("wall_s", "wall ms", 1e-3),
    ("cpu_s", "CPU ms", 1e-3),
    ("peak_kb", "peak MB", 1024),
)
"""The key of a run, and the head and unit of its column."""


def print_heading() -> None:
    """What the numbers are, and of which machine."""
    print(
        f"""\
Questions about ports: sdtool against psutil, ss and lsof.
Linux {os.uname().release}, {os.cpu_count()} processors, Python {platform.python_version()}.
Medians of {RUNS} runs in turn, or of {SLOW_RUNS} where one takes more than {SLOW_S:g} s, after \
one that is not counted.
Library calls: imports are done and the manager is connected to before the clock starts.
CPU is user and system time; peak is resident memory (ru_maxrss), of commands by time(1).
"12.3x": takes 12.3 times as much as the first line of its table.
System scope needs no manager; it finds who holds the port, and here no unit of the system's."""
    )


def describe(sockets: int, processes: int) -> str:
    """The size, with what else runs on this machine."""
    everyone = sum(entry.name.isdecimal() for entry in Path("/proc").iterdir())
    return f"{sockets:,} sockets in {processes:,} processes ({everyone:,} in /proc)"


def print_group(
    kind: str, group: Sequence[Contender], results: Mapping[Contender, Result]
) -> None:
    """A table of what is compared with its first line."""
    print(f"  {kind:34}" + "".join(f"{head:>9}{'':8}" for _, head, _ in MEASURES) + " runs")
    base = medians(results[group[0]])
    for contender in group:
        line = tell(results.get(contender), {} if contender is group[0] else base)
        print(f"    {contender.name:32}{line}")


def tell(result: Result | None, base: Mapping[str, float]) -> str:
    """The rest of a line: each median, and how often it contains that of the first line."""
    if result is None or result["failure"] is not None:
        return f"  {'not installed' if result is None else result['failure']}"
    values, cells = medians(result), ""
    for key, _, unit in MEASURES:
        value = f"{values[key] / unit:.1f}" if key in values else "-"
        ratio = f"{values[key] / base[key]:.2f}x" if key in values and key in base else ""
        cells += f"{value:>9}{ratio:>8}"
    return f"{cells}{len(result['runs']):5}"


def medians(result: Result) -> dict[str, float]:
    """Those of each measure that is known."""
    known = {key: [run[key] for run in result["runs"]] for key, _, _ in MEASURES}
    found = {
        key: [value for value in values if value is not None] for key, values in known.items()
    }
    return {key: statistics.median(values) for key, values in found.items() if values}


if __name__ == "__main__":
    main()
