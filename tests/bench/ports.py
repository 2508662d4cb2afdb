"""Questions about ports against their peers, on servers of three sizes (make bench).

The servers are made here: real sockets and processes, and a private manager whose unit has the
port asked about, in a network namespace of their own. Nothing of the machine is disturbed, and
its own sockets are not seen; its own processes are. Needs root; lsof and time(1) where they are
there. Other sizes as arguments: SOCKETS/PROCESSES.

Wall time, CPU time and peak memory are told as they are, and as what the peer needs of what
sdtool needs: "12.3x" is a peer that takes 12.3 times as much. Like is compared with like: a
library call, in a process that has imported what it needs, with a library call, and a whole
command, start-up and imports included, with a whole command. Beside the library calls that find
one port stand ss and lsof too, which have no library: as whole commands, and the heading says so.

Whose port it is costs little where the processes of the unit that made the socket hold it. Where
that cgroup is gone every process must be looked at: that is measured as well, with a socket whose
maker has moved. At the end stands what grows with the size of the server, and what does not.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import measure
from measure import RUNS, SLOW_RUNS, SLOW_S, Result

from sdtool.sandbox import PrivateManager

HERE = Path(__file__).parent
PAYLOAD = HERE.parent / "system" / "payload.py"
SIZES = ("50/100", "1000/1000", "20000/3000")
UNIT = "sdtool-graceful.service"
PORT = "18080"

MOVED_UNIT = "sdtool-bench-moved.service"
MOVED_PORT = "18081"
"""Of a socket that was made in a cgroup which is gone."""

BUSY_UNIT = "sdtool-bench-busy.service"
BUSY_PORT = "18082"
"""Of a unit that has connections too, which have to be told from what listens."""

CALLS = "library call"
CALLS_AND_COMMANDS = "library call, whole ss and lsof"
CALLS_ON_ALL_PROCESSES = "the same, its cgroup is gone"
COMMANDS = "whole command"

SDTOOL = (sys.executable, "-m", "sdtool")
NET_CONNECTIONS = "import psutil; [c for c in psutil.net_connections() if {}]"


@dataclass(frozen=True)
class Contender:
    """A way to the answer, and how to run it."""

    name: str
    argv: tuple[str, ...]
    is_call: bool = False


@dataclass(frozen=True)
class Group:
    """What is compared with each other; what the others are held against comes first."""

    title: str
    contenders: tuple[Contender, ...]


@dataclass(frozen=True)
class Question:
    """A contender that is in several groups is measured once."""

    title: str
    groups: tuple[Group, ...]


Results = Mapping[Contender, Result]
"""Of those that are installed."""


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
        start_payload(manager, MOVED_UNIT, "cgroup=inner", listen(MOVED_PORT), "cgroup=back")
        busy = (listen(BUSY_PORT), f"connect=127.0.0.1:{BUSY_PORT}", "accept")
        start_payload(manager, BUSY_UNIT, *busy)
        pids = read_pids(manager)
        questions = make_questions(pids)
        print_heading()
        by_size: dict[str, Results] = {}
        for sockets, processes in sizes:
            with crowd(sockets, processes):
                found: dict[Contender, Result] = {}
                for question in questions:
                    print(f"\n{question.title}, {describe(sockets, processes)}")
                    found |= ask(manager, question)
            by_size[f"{sockets}/{processes}"] = found
        print_growth((*calls_of_unit(pids), ALL_CONNECTIONS, SS), by_size)


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


def listen(port: str) -> str:
    """What the payload does to listen."""
    return f"tcp=127.0.0.1:{port}"


def start_payload(manager: PrivateManager, unit: str, *steps: str) -> None:
    """Have a unit that makes these steps; of one that moves back the cgroup is gone."""
    run = ["systemd-run", "--user", "--quiet", f"--unit={unit}", "--service-type=notify"]
    run += ["--property=Delegate=yes", sys.executable, "-B", str(PAYLOAD)]
    done = manager.run([*run, *steps])
    if done.returncode != 0:
        sys.exit(done.stderr)


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
    # ss and lsof have no library: beside the calls stand their whole commands.
    return Question(
        title=f"Who owns port {PORT}",
        groups=(
            Group(
                CALLS_AND_COMMANDS,
                (
                    call("sdtool Host.port", "sdtool-port", "user", UNIT, PORT),
                    call("  in system scope", "sdtool-port", "system", UNIT, PORT),
                    *peers_of_port(PORT),
                ),
            ),
            Group(
                CALLS_ON_ALL_PROCESSES,
                (
                    call("sdtool Host.port", "sdtool-port", "user", MOVED_UNIT, MOVED_PORT),
                    *peers_of_port(MOVED_PORT),
                ),
            ),
            Group(
                COMMANDS,
                (
                    sdtool("port", PORT, "--user"),
                    Contender("  in system scope", (*SDTOOL, "port", PORT)),
                    psutil(f"c.laddr and c.laddr.port == {PORT}"),
                    SS,
                    *programs_of_port(PORT),
                ),
            ),
        ),
    )


def peers_of_port(port: str) -> tuple[Contender, ...]:
    """What finds who has a port, in a program and from outside of it."""
    return call("psutil.net_connections()", "psutil-port", port), *programs_of_port(port)


def programs_of_port(port: str) -> tuple[Contender, ...]:
    """The programs that can be asked about one port."""
    return (
        program("ss", "-lntpH", f"sport = :{port}"),
        program("lsof", "-nP", f"-iTCP:{port}"),
    )


def ask_ports_of(pids: Sequence[str]) -> Question:
    """The pids are given to psutil, which does not know of units."""
    return Question(
        title="Listening ports of one unit",
        groups=(
            Group(CALLS, calls_of_unit(pids)),
            Group(
                COMMANDS,
                (Contender("sdtool ports UNIT --user", (*SDTOOL, "ports", UNIT, "--user")), SS),
            ),
        ),
    )


def calls_of_unit(pids: Sequence[str]) -> tuple[Contender, ...]:
    """What finds the ports of the unit alone."""
    return (
        call("sdtool Host.ports([unit])", "sdtool-ports", UNIT, UNIT),
        call("  of one with connections", "sdtool-ports", BUSY_UNIT, BUSY_UNIT),
        call("psutil.Process(pid) of its pids", "psutil-ports-of", *pids),
    )


def ask_ports() -> Question:
    """Of every process, in a unit or not; sdtool lists UDP too."""
    return Question(
        title="All listening ports",
        groups=(
            Group(CALLS, (call("sdtool Host.ports()", "sdtool-ports", UNIT), ALL_CONNECTIONS)),
            Group(
                COMMANDS,
                (
                    sdtool("ports", "--user"),
                    psutil("c.status == 'LISTEN'"),
                    SS,
                    program("ss", "-lntup"),
                ),
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


ALL_CONNECTIONS = call("psutil.net_connections()", "psutil-ports")
SS = program("ss", "-lntp")


# Measuring -----------------------------------------------------------------------------------


def ask(manager: PrivateManager, question: Question) -> Results:
    """Measure all the ways to one answer in turn, and print a line for each."""
    everyone = dict.fromkeys(each for group in question.groups for each in group.contenders)
    there = [each for each in everyone if shutil.which(each.argv[0])]
    plan = [{"argv": each.argv, "is_call": each.is_call} for each in there]
    command = manager.argv([sys.executable, measure.__file__, json.dumps(plan)])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    results = dict(zip(there, json.loads(done.stdout), strict=True))
    for group in question.groups:
        print_group(group, results)
    return results


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
ss and lsof are no libraries: below the library calls, too, they are whole commands.
A socket whose cgroup is gone is found by looking at every process.
System scope needs no manager; it finds who holds the port, and here no unit of the system's."""
    )


def describe(sockets: int, processes: int) -> str:
    """The size, with what else runs on this machine."""
    everyone = sum(entry.name.isdecimal() for entry in Path("/proc").iterdir())
    return f"{sockets:,} sockets in {processes:,} processes ({everyone:,} in /proc)"


def print_group(group: Group, results: Results) -> None:
    """A table of what is compared with its first line."""
    print(f"  {group.title:34}" + "".join(f"{head:>9}{'':8}" for _, head, _ in MEASURES) + " runs")
    base = medians(results[group.contenders[0]])
    for contender in group.contenders:
        line = tell(results.get(contender), {} if contender is group.contenders[0] else base)
        print(f"    {contender.name:32}{line}")


def print_growth(contenders: Iterable[Contender], by_size: Mapping[str, Results]) -> None:
    """What the ports of one unit cost on each server, and of that on the smallest one."""
    print("\nPorts of one unit: wall ms by SOCKETS/PROCESSES, as multiples of the first")
    print(f"{'':36}" + "".join(f"{size:>17}" for size in by_size))
    for contender in contenders:
        found = [results.get(contender) for results in by_size.values()]
        walls = [medians(result).get("wall_s") if result else None for result in found]
        print(f"    {contender.name:32}{''.join(tell_growth(walls))}")


def tell_growth(walls: Sequence[float | None]) -> Iterator[str]:
    """The cells of a line; "-" where it failed or is not installed."""
    for wall in walls:
        if wall is None or walls[0] is None:
            yield f"{'-':>17}"
        else:
            yield f"{wall * 1e3:>9.1f}{wall / walls[0]:>7.2f}x"


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
