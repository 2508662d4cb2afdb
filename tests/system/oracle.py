"""What is true of units that stopped, by evidence that sdtool has no part in.

There is the table of behaviours, what the processes of stopper.py log of themselves, and the
manager's own calls of kill(2) by strace: of the manager alone, as a process that is traced gets
its signals differently.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.behaviours import Behaviour

Report = dict[str, Any]
Event = dict[str, Any]

SLACK_US = 500_000
"""How late a process may note what happened to it: the machine is busy."""

CLOSE_US = 20_000
"""How late a process may note what it has done itself."""


# What the processes say ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What one process said of itself."""

    at_us: int
    pid: int
    verb: str
    rest: str


class Log:
    """What the processes of a unit have logged."""

    def __init__(self, file: Path) -> None:
        text = file.read_text() if file.exists() else ""
        fields = (line.split(" ", 2) for line in text.splitlines())
        self.lines = [
            Line(int(at_us), int(pid), verb, rest)
            for at_us, pid, what in fields
            for verb, _, rest in (what.partition(" "),)
        ]

    def said(self, verb: str) -> list[Line]:
        """The lines that begin with a word."""
        return [line for line in self.lines if line.verb == verb]

    @property
    def names(self) -> dict[int, str]:
        """What the processes are called."""
        return {line.pid: line.rest for line in self.said("is")}


# What the report says, as the table has it -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Story:
    """A stop in the words of ``Behaviour``; processes have their names and no pids."""

    verdict: str
    result: str | None
    timeouts: str
    signals: list[list[str]]
    others: list[str]
    ends: list[str]
    passing: list[str]


def tell(behaviour: Behaviour, tier: str = "A") -> Story:
    """The truth, as far as a tier can know who sends signals beside the manager."""
    return Story(
        verdict=behaviour.verdict,
        result=behaviour.result,
        timeouts=behaviour.timeouts,
        signals=_rounds(behaviour),
        others=sorted(_split(behaviour.others)) if tier == "A" else [],
        ends=sorted(_split(behaviour.ends)),
        passing=sorted(_split(behaviour.helpers or behaviour.born)),
    )


def _split(text: str) -> list[str]:
    return text.split(", ") if text else []


def _rounds(behaviour: Behaviour) -> list[list[str]]:
    rounds = []
    for text in behaviour.signals.split(" | ") if behaviour.signals else []:
        volleys = (volley.split() for volley in text.split(" + "))
        rounds.append(sorted(f"{name} {one}" for name, *targets in volleys for one in targets))
    return rounds


class Reading:
    """A report, read with the names that the processes have given themselves.

    Args:
        manager: The manager's process.
    """

    def __init__(self, behaviour: Behaviour, report: Report, log: Log, manager: int) -> None:
        self._behaviour = behaviour
        self._report = report
        self._manager = manager
        self._tier = report["tier"]
        self._log = log
        self._names = self._name_all()

    def _name_all(self) -> dict[int, str]:
        """Who takes part in the truth by name: others come and go."""
        wanted = {end.split()[0] for end in _split(self._behaviour.ends)}
        names = {}
        for process in self._report["processes"]:
            # Before it runs its program systemd calls a child "(sleep)".
            comm = process["comm"].strip("()")
            if process["pid"] in self._log.names:
                names[process["pid"]] = self._log.names[process["pid"]]
            elif process["role"] != "other" and comm in wanted:
                names[process["pid"]] = comm
        return names

    def events(self, kind: str) -> list[Event]:
        """The events of a kind, in their order."""
        return [event for event in self._report["events"] if event["kind"] == kind]

    def targets(self, kind: str) -> set[str]:
        """Of events about signals: "TERM main"."""
        return {
            f"{event['signal'].removeprefix('SIG')} {self._names.get(event['pid'])}"
            for event in self.events(kind)
        }

    def tell(self) -> Story:
        """The story; what the tier cannot tell is taken from the truth."""
        truth = tell(self._behaviour)
        ends, passing = self._ends(truth)
        lacking = any(p["killed_by_manager"] is None for p in self._report["processes"])
        unknown = self._report["verdict"] == "unknown" and lacking and self._tier == "D"
        return Story(
            verdict=truth.verdict if unknown else self._report["verdict"],
            result=self._report["result"],
            timeouts=" ".join(event["sub_state"] for event in self.events("timeout")),
            signals=self._signals([len(volley) for volley in truth.signals]),
            others=sorted(self._others()),
            ends=sorted(ends),
            passing=sorted(passing),
        )

    def _ends(self, truth: Story) -> tuple[list[str], list[str]]:
        ends, passing = [], []
        for process in self._report["processes"]:
            name, end = self._names.get(process["pid"]), self._end(process)
            if name is None:
                passing.append(end)
            else:
                ends.append(f"{name} {end}")
        if self._tier == "D":
            ends = [_complete(end, truth.ends) for end in ends]
        if self._tier in "CD":
            # They may have come and gone unseen, or been reaped before they were looked at.
            seen = Counter(end for end in passing if end != "?")
            passing = truth.passing if seen <= Counter(truth.passing) else passing
        return ends, passing

    def _end(self, process: dict[str, Any]) -> str:
        status, pid = process["exit"], process["pid"]
        if status is None:
            end = "runs" if pid in [left["pid"] for left in self._report["leftovers"]] else "?"
        else:
            end = str(status["code"]) if "code" in status else status["signal"]
        return end + {True: "!", False: "", None: "?"}[process["killed_by_manager"]]

    def _signals(self, sizes: Sequence[int]) -> list[list[str]]:
        """What the manager has sent, in rounds of these sizes, and the rest."""
        sent, dead = [], set()
        for event in self.events("signal-sent"):
            name = self._names.get(event["pid"], "helper" if self._behaviour.helpers else None)
            if name is None or event["pid"] in dead or not self._is_managers(event):
                continue
            sent.append(f"{event['signal'].removeprefix('SIG')} {name}")
            if event["signal"] == "SIGKILL":
                # While it is on its way to its end it can get more, to no effect.
                dead.add(event["pid"])
        rounds = []
        for size in sizes:
            rounds.append(sorted(sent[:size]))
            del sent[:size]
        return [*rounds, sent] if sent else rounds

    def _others(self) -> Iterator[str]:
        for event in self.events("signal-sent"):
            if not self._is_managers(event):
                sender = self._names.get(event["sender_pid"], event["sender_comm"])
                name = self._names.get(event["pid"])
                yield f"{event['signal'].removeprefix('SIG')} {name} by {sender}"

    def _is_managers(self, event: Event) -> bool:
        """What is concluded is about the manager; what is observed has a sender."""
        if event["evidence"] == "inferred":
            return event["sender_pid"] is None
        return bool(event["sender_pid"] == self._manager)

    # Against what the processes have logged --------------------------------------------------

    def disagreements(self) -> list[str]:
        """What the processes say otherwise, in words."""
        return [*self._about_signals(), *self._about_ends(), *self._about_others()]

    def _about_signals(self) -> Iterator[str]:
        told = " ".join(word for volley in tell(self._behaviour).signals for word in volley)
        for line in self._log.said("got"):
            name = self._log.names[line.pid]
            if self._tier != "A" and f"{line.rest.removeprefix('SIG')} {name}" not in told:
                continue  # somebody else has sent it: that is not told without a trace
            sent = [e for e in self.events("signal-sent") if _is_of(e, line)]
            since = [e.get("at_min_us") or e["at_us"] for e in sent]
            if not any(at_us <= line.at_us for at_us in since):
                yield f"{name} got {line.rest} at {line.at_us}, sent {since}"
        if self._tier == "A":
            yield from self._about_deliveries()

    def _about_deliveries(self) -> Iterator[str]:
        """A handler that has run was told of, once for each run."""
        handled = Counter((line.pid, line.rest) for line in self._log.said("got"))
        waits = {"signalfd", "sigwait", "leave"}
        if any(word in process for process in self._behaviour.runs for word in waits):
            return
        told = Counter((e["pid"], e["signal"]) for e in self.events("signal-delivered"))
        for key, count in handled.items():
            if told[key] != count:
                yield f"{key} was handled {count} times, delivered {told[key]}"

    def _about_ends(self) -> Iterator[str]:
        fates = {process["pid"]: process for process in self._report["processes"]}
        for line in self._log.said("exits"):
            fate = fates.get(line.pid)
            if fate is None or fate["exit_us"] is None:
                yield f"{line.pid} exits at {line.at_us}: not told"
            elif not 0 <= fate["exit_us"] - line.at_us <= SLACK_US:
                yield f"{line.pid} exits at {line.at_us}, told at {fate['exit_us']}"
            elif fate["exit"] not in ({"code": int(line.rest)}, None):
                yield f"{line.pid} exits with {line.rest}, told {fate['exit']}"

    def _about_others(self) -> Iterator[str]:
        pids = {process["pid"] for process in self._report["processes"]}
        known = {line.pid for line in self._log.said("is")}
        if self._tier in "AB":
            known |= {int(line.rest) for line in self._log.said("bore")}
        yield from (f"{pid} is not told of" for pid in sorted(known - pids))
        free = [port["at_us"] for port in self._report["ports_released"]]
        for line, at_us in zip(self._log.said("closed"), free, strict=True):
            late = CLOSE_US if self._tier == "A" else SLACK_US
            if at_us is None or not -CLOSE_US <= at_us - line.at_us <= late:
                yield f"a port was closed at {line.at_us}, told at {at_us}"


def _complete(end: str, truth: Iterable[str]) -> str:
    """The true end of a process of which only that it ended is told, and nothing wrong."""
    name, told = end.split()
    true = next((one for one in truth if one.split()[0] == name), "")
    wrong = told == "?!" and not true.endswith("!")
    return true if told in ("?", "?!", "??") and not wrong else end


def _is_of(event: Event, line: Line) -> bool:
    return bool((event["pid"], event["signal"]) == (line.pid, line.rest))


# What the manager does ---------------------------------------------------------------------------

KILLING = re.compile(r"(sdtool-b-\S+): Killing process (\d+) \(.*\) with signal SIGKILL")


def read_kills(text: str) -> dict[str, set[int]]:
    """The processes that the manager says it has sent SIGKILL to, by unit."""
    kills: dict[str, set[int]] = {}
    for unit, pid in KILLING.findall(text):
        kills.setdefault(unit, set()).add(int(pid))
    return kills


@dataclass(frozen=True, slots=True)
class Kill:
    """One call of kill(2): the signal was sent between its begin and its end."""

    since_us: int
    until_us: int
    pid: int
    signal: str


CALL = re.compile(
    r"^(?P<at>\d+\.\d+) kill\((?P<pid>\d+), (?P<signal>SIG\w+)\) += 0 <(?P<took>[\d.]+)>$"
)


class ManagerTrace:
    """strace of a manager and of nobody else; it writes by the wall clock.

    Args:
        manager: Its process.
    """

    def __init__(self, manager: int, file: Path) -> None:
        self._file = file
        command = ["strace", "-ttt", "-T", "--trace=kill,tgkill,pidfd_send_signal"]
        command += [f"--output={file}", f"--attach={manager}"]
        self._offset_us = (time.time_ns() - time.monotonic_ns()) // 1000
        self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr is not None
        assert "attached" in self._strace.stderr.readline()

    def close(self) -> None:
        """Let go of the manager."""
        self._strace.send_signal(signal.SIGINT)
        self._strace.communicate(timeout=10)

    def kills(self) -> list[Kill]:
        """The calls that have sent a signal."""
        found = filter(None, map(CALL.match, self._file.read_text().splitlines()))
        return [
            Kill(at_us, at_us + round(float(m["took"]) * 1_000_000), int(m["pid"]), m["signal"])
            for m in found
            for at_us in [round(float(m["at"]) * 1_000_000) - self._offset_us]
        ]


@contextmanager
def traced(manager: int, file: Path) -> Iterator[ManagerTrace]:
    """Have a manager traced meanwhile."""
    trace = ManagerTrace(manager, file)
    try:
        yield trace
    finally:
        trace.close()
