"""stop: every behaviour in every tier of observation, against evidence of other kinds.

All units of the table are stopped at once, with one command a tier.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdtool.model.scope import Scope
from tests.machine import end_demo_units, eventually
from tests.system.behaviours import (
    ALONG,
    AS_ROOT,
    BASE,
    BEHAVIOURS,
    LIMIT_S,
    SOCKET,
    SOCKET_FILES,
    TRANSIENT,
    Behaviour,
    log_of,
)
from tests.system.bench import SCOPE, Bench, Client, flag_of, sdtool_argv
from tests.system.oracle import SLACK_US, Kill, Log, Reading, Report, read_kills, tell, traced
from tests.system.situations import Situations, find_port
from tests.system.test_tracefs import instances

WITHOUT_TRACE = ("--observers", "procevents,pidfd,pidfd-info,cgroup,sockets,journal")
WITHOUT_RECORD = ("--observers", "pidfd,pidfd-info,cgroup,sockets,journal")
WITHOUT_STATUS = ("--observers", "pidfd,cgroup,sockets,journal")

TIERS: dict[str, Sequence[str]] = (
    {"C": (), "D": WITHOUT_STATUS}
    if SCOPE
    else {"A": (), "B": WITHOUT_TRACE, "C": WITHOUT_RECORD, "D": WITHOUT_STATUS}
)
"""What asks for each tier that there is; in a container there is no kernel's record."""

LINKED = BEHAVIOURS + (AS_ROOT if SCOPE == Scope.SYSTEM else ())
STOPPED = LINKED + TRANSIENT

log = logging.getLogger(__name__)

Record = Callable[[str, object], None]

every_tier = pytest.mark.parametrize("tier", TIERS)


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """All units of the table after their stop.

    Attributes:
        manager: The manager's process.
        directory: Has the logs of the processes.
        said: What the manager has said in its own log.
    """

    tier: str
    manager: int
    reports: dict[str, Report]
    directory: Path
    said: str

    def read(self, behaviour: Behaviour) -> Reading:
        """The report of one, with the log of its processes."""
        # Shown where a test fails.
        log.warning("%s", json.dumps(self.reports[behaviour.name]))
        said = Log(log_of(self.directory, behaviour.name))
        return Reading(behaviour, self.reports[behaviour.name], said, self.manager)

    def reading(self, unit: str) -> Reading:
        """The same, of a unit of the table."""
        return self.read(next(b for b in STOPPED if b.unit == unit))


@pytest.fixture(scope="module", params=TIERS)
def stopped(
    request: pytest.FixtureRequest, manager: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Stopped:
    """Every unit of the table started, and stopped by one sdtool."""
    situations = Situations(manager, tmp_path_factory.mktemp("behaviours"))
    directory = situations.directory
    try:
        port = find_port()
        files = {b.name: b.text(directory, port) for b in (*LINKED, *ALONG)}
        files |= {name: text.format(port=find_port()) for name, text in SOCKET_FILES.items()}
        situations.link(files)
        situations.systemctl("start", SOCKET, *(b.name for b in (*LINKED, *ALONG)))
        for behaviour in TRANSIENT:
            start_transient(situations, behaviour)
        asked = [SOCKET, *(b.name for b in STOPPED)]
        done = manager.run(stop_argv(manager, *asked, *TIERS[request.param]))
        reports = {report["unit"]: report for report in read_reports(done.stdout)}
        reports |= {report["unit"]: report for report in reports[BASE]["along"]}
        said = manager.log_text()
    finally:
        end_demo_units(manager.run, flag_of(manager))
        situations.close()
    return Stopped(
        tier=request.param,
        manager=manager.pid,
        reports=reports,
        directory=directory,
        said=said,
    )


def stop_argv(manager: Bench, *arguments: str) -> list[str]:
    """The command line of a stop, where the manager is."""
    return [sys.executable, "-m", "sdtool", "stop", *arguments, "--json", flag_of(manager)]


def read_reports(stdout: str) -> list[Report]:
    """What an sdtool has printed at its end, without an error."""
    envelope = json.loads(stdout.splitlines()[-1])
    assert [] == envelope["errors"]
    return list(envelope["data"])


def start_transient(situations: Situations, behaviour: Behaviour) -> None:
    """Start a unit without a file; it is ready when this returns."""
    run = ["systemd-run", situations.flag, "--quiet", f"--unit={behaviour.name}"]
    limit = f"--property=TimeoutStopSec={LIMIT_S}"
    log = log_of(situations.directory, behaviour.name)
    if behaviour.name.endswith(".scope"):
        command = situations.manager.argv([*run, "--scope", limit, *behaviour.argv])
        with log.open("a") as output:
            process = subprocess.Popen(command, stdout=output)
        # Nobody else reaps it, and only then is its status told.
        threading.Thread(target=process.wait, daemon=True).start()
        eventually(lambda: Log(log).said("ready"))
        return
    into_log = f"--property=StandardOutput=append:{log}"
    options = ["--collect", "--service-type=notify", "--property=NotifyAccess=all"]
    situations.run(*run, *options, limit, into_log, *behaviour.argv)


@pytest.fixture(autouse=True)
def _clean_slate(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no units behind; those of the table end when all tests have read of them."""
    yield
    if "stopped" not in request.fixturenames:
        manager = request.getfixturevalue("manager")
        end_demo_units(manager.run, flag_of(manager))


@pytest.mark.parametrize("behaviour", [*STOPPED, *ALONG], ids=lambda b: b.unit)
def test_stop_is_told_as_it_was(stopped: Stopped, behaviour: Behaviour) -> None:
    """Verdict, signals by their rounds, limits that passed, and the end of every process."""
    assert tell(behaviour, stopped.tier) == stopped.read(behaviour).tell()


@pytest.mark.parametrize("behaviour", [*STOPPED, *ALONG], ids=lambda b: b.unit)
def test_stop_agrees_with_what_processes_say(stopped: Stopped, behaviour: Behaviour) -> None:
    """Nobody got a signal before it was sent; ends have their time and status; nobody lacks."""
    assert [] == stopped.read(behaviour).disagreements()
    assert stopped.tier == stopped.reports[behaviour.name]["tier"]


def test_stop_agrees_with_what_the_manager_says(stopped: Stopped) -> None:
    """Whom it has sent SIGKILL, by its own log, is called killed where that is known."""
    said = read_kills(stopped.said)
    for name, report in stopped.reports.items():
        known = {p["pid"] for p in report["processes"] if p["killed_by_manager"] is not None}
        assert said.get(name, set()) & known == set(report["killed"]), name


def test_each_process_gets_its_hangup_after_the_stop_signal(stopped: Stopped) -> None:
    """SendSIGHUP=yes: both are for one process before the next one gets any."""
    sent = stopped.reading("hangup").events("signal-sent")
    pids = [event["pid"] for event in sent]
    assert ["SIGTERM", "SIGHUP"] * 2 == [event["signal"] for event in sent]
    assert (pids[0], pids[2]) == (pids[1], pids[3])


def test_signals_without_effect_are_told_by_the_trace_alone(stopped: Stopped) -> None:
    """Of the first signal, by what is known of the process: nobody guesses it."""
    expected = {
        "stubborn": {"TERM main"},
        "mixed-stubborn": {"TERM main"},
        "winch": {"WINCH main"},
        "bash-trap-waits": {"TERM child"},
        "exec-stop-post-stubborn": {"TERM post"},
        "all-alone.scope": {"TERM one"},
    }
    truth = expected if stopped.tier == "A" else {}
    ignored = {b.unit: stopped.read(b).targets("signal-ignored") for b in STOPPED}
    assert {b.unit: truth.get(b.unit, set()) for b in STOPPED} == ignored


def test_limits_pass_when_they_are_due(stopped: Stopped) -> None:
    """From the word of a phase: its clock runs a little before that, and is a little late."""
    for name, report in stopped.reports.items():
        phases = {e["sub_state"]: e["at_us"] for e in report["events"] if e["kind"] == "state"}
        for event in filter(is_timeout, report["events"]):
            late_us = event["at_us"] - phases[event["sub_state"]] - event["limit_us"]
            assert -50_000 <= late_us <= 500_000, (name, event)


def test_units_that_went_down_along_are_named(stopped: Stopped) -> None:
    """By Requires=, BindsTo= and PartOf=."""
    assert sorted(b.name for b in ALONG) == sorted(stopped.reports[BASE]["also_stopped"])


def test_stop_of_a_socket_frees_its_port(stopped: Stopped) -> None:
    """It has no processes: the manager has made what listens."""
    report = stopped.reports[SOCKET]
    assert ("clean", "success", []) == (report["verdict"], report["result"], report["processes"])
    released = [(port["protocol"], port["address"]) for port in report["ports_released"]]
    assert [("tcp", "127.0.0.1")] == released


# Somebody acts in the middle -------------------------------------------------------------------


class Stopping:
    """An sdtool that watches a stop, while something else is done."""

    def __init__(self, manager: Bench, *arguments: str) -> None:
        command = sdtool_argv(manager, "stop", *arguments, "--jsonl")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._lines = self.process.stdout

    def wait_for(self, part: str) -> None:
        """Read events until one has the part."""
        assert any(part in line for line in self._lines), f"{part} never came"

    def read_reports(self) -> list[Report]:
        """Wait for the end."""
        reports = read_reports(self._lines.read())
        self.process.communicate(timeout=10)
        return reports

    def read_report(self) -> Report:
        """Wait for the end of the only one."""
        (report,) = self.read_reports()
        return report

    def end(self) -> None:
        """Do not wait any longer."""
        self.process.kill()
        self.process.communicate()


Watch = Callable[..., Stopping]


@pytest.fixture
def watch(manager: Bench) -> Iterator[Watch]:
    """Begins a stop with these arguments; what runs still when the test ends does not go on."""
    with ExitStack() as stack:

        def begin(*arguments: str) -> Stopping:
            stopping = Stopping(manager, *arguments)
            stack.callback(stopping.end)
            return stopping

        yield begin


@pytest.fixture
def start(situations: Situations) -> Callable[[Behaviour], str]:
    """Starts a unit of its own file; its name."""

    def start_one(behaviour: Behaviour) -> str:
        situations.link({behaviour.name: behaviour.text(situations.directory, find_port())})
        situations.systemctl("start", behaviour.name)
        return behaviour.name

    return start_one


Start = Callable[[Behaviour], str]


@every_tier
def test_kill_by_somebody_else_is_not_the_managers(
    start: Start, watch: Watch, situations: Situations, tier: str
) -> None:
    """The trace knows who it was; without it nobody does, but not the manager."""
    unit = start(Behaviour(unit="foreign", runs=("main: TERM=stay",)))
    stopping = watch(unit, *TIERS[tier])
    stopping.wait_for('"stop-sigterm"')
    os.kill(situations.main_pid(unit), signal.SIGKILL)
    report = stopping.read_report()

    (fate,) = report["processes"]
    assert {"signal": "SIGKILL", "core": False} == fate["exit"]
    assert ("failed", "signal", [], False) == (
        report["verdict"],
        report["result"],
        report["killed"],
        fate["killed_by_manager"],
    )
    kills = [e["sender_pid"] for e in report["events"] if e.get("signal") == "SIGKILL"]
    assert kills == ([os.getpid()] if tier == "A" else [])


@every_tier
@pytest.mark.parametrize("verb", ["start", "cancel"])
def test_stop_that_is_canceled_goes_on_by_its_signals(
    start: Start, watch: Watch, systemctl: Client, tier: str, verb: str
) -> None:
    """The job ends as canceled; what the unit still gets is not the report's any more."""
    unit = start(Behaviour(unit="canceled", runs=("main: TERM=stay",)))
    stopping = watch(unit, *TIERS[tier])
    stopping.wait_for('"stop-sigterm"')
    job = systemctl("list-jobs", "--no-legend", unit).stdout.split()[0]
    systemctl(*(["start", "--no-block", unit] if verb == "start" else ["cancel", job]))
    report = stopping.read_report()

    assert ("failed", "canceled", "deactivating") == (
        report["verdict"],
        report["job_result"],
        report["active_state"],
    )
    assert ([], [], [False]) == (
        report["killed"],
        report["leftovers"],
        [process["killed_by_manager"] for process in report["processes"]],
    )


@every_tier
def test_stop_that_becomes_a_restart_sends_nothing_more(
    start: Start, watch: Watch, situations: Situations, tier: str
) -> None:
    """The stop signal is on its way: RestartKillSignal= comes too late, the unit runs again."""
    again = Behaviour(
        unit="again",
        runs=("main: TERM=after:0.3 USR1=exit:9",),
        has=("RestartKillSignal=SIGUSR1",),
    )
    unit = start(again)
    pid = situations.main_pid(unit)
    stopping = watch(unit, *TIERS[tier])
    stopping.wait_for('"stop-sigterm"')
    situations.systemctl("restart", "--no-block", unit)
    report = stopping.read_report()

    assert ("failed", "canceled") == (report["verdict"], report["job_result"])
    sent = [event["signal"] for event in report["events"] if event["kind"] == "signal-sent"]
    assert ["SIGTERM"] == sent
    eventually(lambda: situations.show(unit, "ActiveState") == "active")
    log = Log(log_of(situations.directory, unit))
    assert [(pid, "SIGTERM")] == [(line.pid, line.rest) for line in log.said("got")]
    assert situations.main_pid(unit) != pid


@every_tier
def test_unit_that_a_connection_starts_again_was_stopped(
    situations: Situations, watch: Watch, tier: str
) -> None:
    """The report is about the process that ended, and names the socket; the new one is not in."""
    port = find_port()
    woken = Behaviour(unit="woken", runs=("main: TERM=after:0.3",))
    door = f"[Socket]\nListenStream=127.0.0.1:{port}\n"
    files = {woken.name: woken.text(situations.directory, port), "sdtool-b-woken.socket": door}
    situations.link(files)
    situations.systemctl("start", *reversed(files))
    pid = situations.main_pid(woken.name)
    stopping = watch(woken.name, *TIERS[tier])
    stopping.wait_for('"stop-sigterm"')
    with socket.create_connection(("127.0.0.1", port)):
        report = stopping.read_report()

    assert ("clean", "done", "success", ["sdtool-b-woken.socket"]) == (
        report["verdict"],
        report["job_result"],
        report["result"],
        report["reactivated_by"],
    )
    assert {pid} == {process["pid"] for process in report["processes"]}
    assert {pid} == {event["pid"] for event in report["events"] if event.get("pid")}
    assert report["duration_us"] < 300_000 + SLACK_US


@every_tier
def test_left_over_of_a_unit_that_was_started_again_is_told(
    situations: Situations, watch: Watch, tier: str
) -> None:
    """The unit is up again, with a main process that is none of the stop's; the old child is."""
    port = find_port()
    has = ("KillMode=process",)
    stays = Behaviour(unit="stays", runs=("main: TERM=after:0.3", "child:"), has=has)
    door = f"[Socket]\nListenStream=127.0.0.1:{port}\n"
    files = {stays.name: stays.text(situations.directory, port), "sdtool-b-stays.socket": door}
    situations.link(files)
    situations.systemctl("start", *reversed(files))
    names = Log(log_of(situations.directory, stays.name)).names
    stopping = watch(stays.name, *TIERS[tier])
    stopping.wait_for('"stop-sigterm"')
    with socket.create_connection(("127.0.0.1", port)):
        report = stopping.read_report()

    left = [{"pid": pid, "comm": name} for pid, name in names.items() if name == "child"]
    assert ("leftover", left) == (report["verdict"], report["leftovers"])
    assert set(names) == {process["pid"] for process in report["processes"]}


@every_tier
def test_unit_that_somebody_has_killed_by_the_manager_has_failed(
    start: Start, watch: Watch, manager: Bench, situations: Situations, tier: str
) -> None:
    """``systemctl kill`` while ExecStop= runs: no limit has passed, nothing of it is clean."""
    ended = Behaviour(
        unit="ended",
        runs=("main: TERM=exit:0",),
        has=("ExecStop=/bin/sleep 60", "TimeoutStopSec=20"),
    )
    unit = start(ended)
    stopping = watch(unit, *TIERS[tier])
    stopping.wait_for('"control-start"')
    situations.systemctl("kill", "--signal=KILL", unit)
    report = stopping.read_report()

    assert report["verdict"] in ("killed", "failed")
    assert ("signal", []) == (report["result"], [e for e in report["events"] if is_timeout(e)])
    ends = [process["exit"] for process in report["processes"] if process["exit"]]
    assert [{"signal": "SIGKILL", "core": False}] == [*map(dict, {tuple(e.items()) for e in ends})]
    kills = {e["sender_pid"] for e in report["events"] if e.get("signal") == "SIGKILL"}
    assert kills == ({manager.pid} if tier == "A" else set())


def is_timeout(event: dict[str, Any]) -> bool:
    """Whether an event says that a limit has passed."""
    return bool(event["kind"] == "timeout")


# Against the manager's own calls ---------------------------------------------------------------


def stop_all_traced(
    situations: Situations, manager: Bench, directory: Path, *options: str
) -> tuple[list[Report], list[Kill]]:
    """The reports of a stop of every unit of the table, and what the manager killed meanwhile."""
    units = (*BEHAVIOURS, *ALONG)
    situations.link({b.name: b.text(situations.directory, find_port()) for b in units})
    situations.systemctl("start", *(b.name for b in units))
    with traced(manager.pid, directory / "strace") as trace:
        done = manager.run(stop_argv(manager, *(b.name for b in BEHAVIOURS), *options))
    reports = {report["unit"]: report for report in read_reports(done.stdout)}
    return [*reports.values(), *reports[BASE]["along"]], list(trace.kills())


@pytest.mark.capability("tracefs")
def test_every_signal_of_the_manager_is_told_to_the_millisecond(
    situations: Situations, manager: Bench, tmp_path: Path, record_property: Record
) -> None:
    """All that strace has of the manager is in the reports, at its time, and nothing else."""
    stops, kills_seen = stop_all_traced(situations, manager, tmp_path)
    pids = {process["pid"] for report in stops for process in report["processes"]}
    told: dict[tuple[int, str], list[int]] = defaultdict(list)
    for event in (event for report in stops for event in report["events"]):
        if event["kind"] == "signal-sent" and event["sender_pid"] == manager.pid:
            told[event["pid"], event["signal"]].append(event["at_us"])
    called: dict[tuple[int, str], list[Kill]] = defaultdict(list)
    for kill in kills_seen:
        if kill.pid in pids and kill.signal != "SIGCONT":
            called[kill.pid, kill.signal].append(kill)
    assert len(stops) >= 30
    assert {key: len(kills) for key, kills in called.items()} == {
        key: len(times) for key, times in told.items()
    }
    pairs = [pair for key, kills in called.items() for pair in zip(kills, told[key], strict=True)]
    outside = [max(kill.since_us - at_us, at_us - kill.until_us, 0) for kill, at_us in pairs]
    late = sorted(abs(at_us - kill.since_us) for kill, at_us in pairs)
    middle, p95 = late[len(late) // 2], late[len(late) * 95 // 100]
    said = f"{len(pairs)} signals: median {middle}, p95 {p95}, max {late[-1]} us"
    record_property("signals against strace", said)
    sys.stdout.write(f"{said}\n")
    assert p95 < 1000
    assert max(outside) < 1000


@pytest.mark.capability("tracefs")
@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier != "A"])
def test_what_is_inferred_was_within_its_bounds(
    situations: Situations, manager: Bench, tmp_path: Path, tier: str
) -> None:
    """Each signal that is concluded was sent, by the manager, between these moments."""
    stops, kills_seen = stop_all_traced(situations, manager, tmp_path, *TIERS[tier])
    called: dict[tuple[int, str], list[Kill]] = defaultdict(list)
    for kill in kills_seen:
        called[kill.pid, kill.signal].append(kill)

    events = [event for report in stops for event in report["events"]]
    inferred = [e for e in events if e["kind"] == "signal-sent" and e["evidence"] == "inferred"]
    wrong = [
        event
        for event in inferred
        if not any(
            kill.until_us >= event["at_min_us"] - CLOCKS_US
            and kill.since_us <= event["at_max_us"] + CLOCKS_US
            for kill in called[event["pid"], event["signal"]]
        )
    ]
    assert len(inferred) > 60
    assert [] == wrong


CLOCKS_US = 1000
"""What may lie between strace's clock and ours."""


def test_nobody_did_other_than_predicted(stopped: Stopped) -> None:
    """What was certain before the stop is what the signal did."""
    fates = [fate for report in stopped.reports.values() for fate in report["processes"]]
    assert [] == [fate for fate in fates if fate["as_predicted"] is False]
    held = {fate["disposition"] for fate in fates if fate["as_predicted"]}
    assert {"dies", "ignores"} == held


# Much at once ----------------------------------------------------------------------------------

MEASURE = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
if (pid := os.fork()) == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Runs a command with few descriptors, and says how many kB of memory it has had at most."""


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier in "AC"])
def test_a_thousand_processes_are_all_told_of(
    start: Start, manager: Bench, tier: str, situations: Situations
) -> None:
    """Each with its status, though descriptors are few, and in little memory."""
    crowd = Behaviour(
        unit="crowd",
        runs=("main: crowd=1000 TERM=wait",),
        has=("TimeoutStopSec=20", "TasksMax=infinity"),
    )
    unit = start(crowd)
    measured = [sys.executable, "-c", MEASURE, *stop_argv(manager, unit, *TIERS[tier])]
    done = manager.run(measured)
    (report,) = read_reports(done.stdout)

    assert ("clean", "success") == (report["verdict"], report["result"])
    ends = Counter(json.dumps(process["exit"]) for process in report["processes"])
    killed = json.dumps({"signal": "SIGTERM", "core": False})
    assert {json.dumps({"code": 0}): 1, killed: 1000} == ends
    assert {0} == {observer["lost"] for observer in report["observers"]}
    sent = [e["pid"] for e in report["events"] if e["kind"] == "signal-sent"]
    assert sorted(process["pid"] for process in report["processes"]) == sorted(sent)
    assert int(done.stderr.splitlines()[-1]) < 80_000


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier in "AC"])
def test_a_thousand_that_are_killed_are_all_named(
    start: Start, manager: Bench, tier: str, situations: Situations
) -> None:
    """KillMode=mixed ends them without a word, and the manager calls that a success."""
    has = ("KillMode=mixed", "TimeoutStopSec=20", "TasksMax=infinity")
    unit = start(Behaviour(unit="crowd", runs=("main: crowd=1000 TERM=exit:0",), has=has))
    done = manager.run(stop_argv(manager, unit, *TIERS[tier]))
    (report,) = read_reports(done.stdout)

    children = {p["pid"] for p in report["processes"] if p["role"] == "other"}
    assert ("killed", "success") == (report["verdict"], report["result"])
    assert (1000, children) == (len(report["killed"]), set(report["killed"]))
    assert {0} == {observer["lost"] for observer in report["observers"]}


@every_tier
def test_storm_of_children_is_told_without_a_gap(
    start: Start, manager: Bench, situations: Situations, tier: str
) -> None:
    """Whoever is told of has an end; with the kernel's record that is everybody."""
    storm = Behaviour(unit="storm", runs=("main: TERM=quit:2000",), has=("TimeoutStopSec=30",))
    unit = start(storm)
    done = manager.run(stop_argv(manager, unit, *TIERS[tier]))
    (report,) = read_reports(done.stdout)

    assert ("clean", []) == (report["verdict"], report["killed"])
    born = {int(line.rest) for line in Log(log_of(situations.directory, unit)).said("bore")}
    assert 2000 == len(born)
    told = {e["pid"] for e in report["events"] if e["kind"] == "process-new"}
    ended = {e["pid"] for e in report["events"] if e["kind"] == "process-exit"}
    assert told <= born
    assert told <= ended
    if tier in "AB":
        assert (born, {0}) == (told, {observer["lost"] for observer in report["observers"]})
        ends = Counter(p["exit"]["code"] for p in report["processes"])
        assert {0: 1, 7: 2000} == ends


@every_tier
@pytest.mark.capability("tracefs")  # a pid of choice asks for as much as the trace does
def test_pid_that_comes_again_is_another_process(
    start: Start, manager: Bench, situations: Situations, tier: str
) -> None:
    """Each has a life and an end of its own, and all are told where births are."""
    unit = start(Behaviour(unit="again", runs=("main: TERM=again:3",)))
    done = manager.run(stop_argv(manager, unit, *TIERS[tier]))
    (report,) = read_reports(done.stdout)

    said = Log(log_of(situations.directory, unit)).said("bore")
    (pid,) = {int(line.rest) for line in said}
    lives = [fate for fate in report["processes"] if fate["pid"] == pid]
    assert "clean" == report["verdict"]
    assert len(lives) == len({fate["start_ticks"] for fate in lives})
    for fate in lives:
        own = [e for e in report["events"] if who(e) == (pid, fate["start_ticks"])]
        kinds = [e["kind"] for e in own if e["kind"] in ("process-new", "process-exit")]
        (ended,) = [e for e in own if e["kind"] == "process-exit"]
        assert ["process-new", "process-exit"] == kinds
        assert (ended["at_us"], ended["exit"]) == (fate["exit_us"], fate["exit"])
    if tier in "AB":
        assert [{"code": 1}, {"code": 2}, {"code": 3}] == [fate["exit"] for fate in lives]


def who(event: dict[str, Any]) -> tuple[int | None, int | None]:
    """The process that an event is of."""
    return event.get("pid"), event.get("start_ticks")


@pytest.mark.parametrize("tier", [tier for tier in TIERS if tier in "AB"])
def test_lost_events_are_told_and_nothing_wrong_is(
    situations: Situations, watch: Watch, tier: str
) -> None:
    """It stands still in a storm: there is a gap, and it denies no kill of the manager's."""
    chosen = [b for b in BEHAVIOURS if b.unit in ("stubborn", "mixed", "kills-own", "graceful")]
    situations.link({b.name: b.text(situations.directory, find_port()) for b in chosen})
    situations.systemctl("start", *(b.name for b in chosen))
    loop = "i=0; while [ $i -lt 12000 ]; do (:); i=$((i+1)); done"
    stopping = watch(*(b.name for b in chosen), *TIERS[tier])
    for _ in chosen:
        stopping.wait_for('"stop-sigterm"')
    os.kill(stopping.process.pid, signal.SIGSTOP)
    storms = [subprocess.Popen(["sh", "-c", loop]) for _ in range(2)]
    assert [0, 0] == [storm.wait(timeout=60) for storm in storms]
    os.kill(stopping.process.pid, signal.SIGCONT)
    reports = {report["unit"]: report for report in stopping.read_reports()}

    wrong = []
    for behaviour in chosen:
        report = reports[behaviour.name]
        gaps = {event["source"] for event in report["events"] if event["kind"] == "gap"}
        lossy = {one["name"] for one in report["observers"] if one["lost"] > 0}
        assert gaps
        assert gaps == lossy & {"tracefs", "procevents"}
        down_us = max(event["at_us"] for event in report["events"] if event["kind"] == "state")
        names = Log(log_of(situations.directory, behaviour.name)).names
        killed = {end.split()[0] for end in tell(behaviour).ends if end.endswith("!")}
        for process in report["processes"]:
            name = names[process["pid"]]
            if process["killed_by_manager"] not in (name in killed, None):
                wrong.append(f"{behaviour.unit}, {name}: {process['fate_reason']}")
            if process["exit_us"] > down_us + SLACK_US:
                wrong.append(f"{behaviour.unit}, {name}: ended when its unit was down")
    assert [] == wrong


def trace_of(pid: int) -> list[str]:
    """The trace instances of a process."""
    return [name for name in instances() if name.startswith(f"sdtool-{pid}-")]


@pytest.mark.capability("tracefs")
def test_trace_of_a_killed_sdtool_goes_with_the_next(
    start: Start, watch: Watch, sdtool: Client
) -> None:
    """It is killed while it watches a stop; the next stop leaves no trace behind at all."""
    unit = start(Behaviour(unit="orphan", runs=("main: TERM=stay",)))
    stopping = watch(unit)
    stopping.wait_for('"stop-sigterm"')
    stopping.process.kill()
    stopping.process.communicate(timeout=10)
    assert trace_of(stopping.process.pid)
    other = start(Behaviour(unit="next", runs=("main: TERM=exit:0",)))
    assert 0 == sdtool("stop", other).returncode
    assert [] == trace_of(stopping.process.pid)
