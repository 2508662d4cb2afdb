"""stop: the verdicts on the demo units, against systemd's own account and the exit status."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import IO, Any

import pytest

from sdtool.model.scope import Scope
from sdtool.sources import descriptors
from tests.machine import eventually
from tests.system.bench import Bench, Client, cgroupfs_of, flag_of, sdtool_argv


def stop(sdtool: Client, unit: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of one stop."""
    done = sdtool("stop", unit, "--json", *options)
    envelope = json.loads(done.stdout)
    assert done.returncode == envelope["exit"]
    assert envelope["errors"] == []
    (report,) = envelope["data"]
    return done.returncode, report


def main_pid(systemctl: Client, unit: str) -> int:
    """Systemd's own MainPID."""
    return int(systemctl("show", "-P", "MainPID", unit).stdout)


def test_stop_of_the_stubborn_unit_is_killed(sdtool: Client, systemctl: Client) -> None:
    """The unit that ignores SIGTERM: killed, the right pid, exit 1, after TimeoutStopSec."""
    systemctl("start", "sdtool-ignores-term")
    pid = main_pid(systemctl, "sdtool-ignores-term")

    status, report = stop(sdtool, "sdtool-ignores-term")

    assert (1, "killed", [pid]) == (status, report["verdict"], report["killed"])
    assert 1_950_000 <= report["duration_us"] <= 2_600_000
    assert report["result"] == "timeout"
    assert report["job_result"] == "done"
    (fate,) = report["processes"]
    assert fate["exit"] == {"signal": "SIGKILL", "core": False}
    assert fate["disposition"] == "ignores"


def test_stop_of_the_graceful_unit_is_clean(sdtool: Client, systemctl: Client) -> None:
    """The unit that exits on SIGTERM: clean, exit 0, its port released."""
    systemctl("start", "sdtool-graceful")
    pid = main_pid(systemctl, "sdtool-graceful")

    status, report = stop(sdtool, "sdtool-graceful")

    assert (status, report["verdict"], report["killed"]) == (0, "clean", [])
    assert [(pid, {"code": 0})] == [(p["pid"], p["exit"]) for p in report["processes"]]
    released = [(p["protocol"], p["port"]) for p in report["ports_released"]]
    assert released == [("tcp", 18080)]
    assert report["ports_held"] == []


def test_stop_that_leaves_a_child_behind_says_so(sdtool: Client, systemctl: Client) -> None:
    """KillMode=process: leftover with its pid, exit 1, and its port still taken."""
    systemctl("start", "sdtool-leaves-child")
    traced = sdtool("trace", "sdtool-leaves-child", "--json")
    (trace,) = json.loads(traced.stdout)["data"]
    child = [p["pid"] for p in trace["processes"] if p["role"] == "other"]

    status, report = stop(sdtool, "sdtool-leaves-child")

    assert (status, report["verdict"]) == (1, "leftover")
    assert child == [left["pid"] for left in report["leftovers"]]
    assert [p["port"] for p in report["ports_held"]] == [18084]


def test_stop_with_a_stubborn_child_names_the_child(sdtool: Client, systemctl: Client) -> None:
    """Only the child that ignores SIGTERM was SIGKILLed; the others ended by themselves."""
    systemctl("start", "sdtool-forks")

    status, report = stop(sdtool, "sdtool-forks")

    assert (status, report["verdict"]) == (1, "killed")
    fates = {p["comm"]: (p["exit"], p["killed_by_manager"]) for p in report["processes"]}
    expected = {
        "family": ({"code": 0}, False),
        "child-handler": ({"code": 0}, False),
        "child-default": ({"signal": "SIGTERM", "core": False}, False),
        "child-stubborn": ({"signal": "SIGKILL", "core": False}, True),
    }
    assert expected == fates


def test_stop_of_a_mixed_unit_tells_of_the_silent_kill(sdtool: Client, systemctl: Client) -> None:
    """KillMode=mixed: systemd says success, and the children were SIGKILLed without SIGTERM."""
    systemctl("start", "sdtool-forks-mixed")

    status, report = stop(sdtool, "sdtool-forks-mixed")

    assert (status, report["verdict"], report["result"]) == (1, "killed", "success")
    assert len(report["killed"]) == 3
    first = {e["pid"] for e in report["events"] if e.get("signal") == "SIGTERM"}
    assert {p["pid"] for p in report["processes"] if p["role"] == "main"} == first


def test_stop_reports_exec_stop_and_exec_stop_post(sdtool: Client, systemctl: Client) -> None:
    """Both commands appear as control processes with their exits, and the stop is clean."""
    systemctl("start", "sdtool-exec-stop")

    status, report = stop(sdtool, "sdtool-exec-stop")

    assert (status, report["verdict"]) == (0, "clean")
    control = [p["exit"] for p in report["processes"] if p["role"] == "control"]
    assert control == [{"code": 0}, {"code": 0}]
    kinds = [e["kind"] for e in report["events"]]
    assert kinds.count("control-start") == 2


def test_stop_whose_exec_stop_hangs_has_failed(sdtool: Client, systemctl: Client) -> None:
    """ExecStop= over its limit: nothing was SIGKILLed, but the result is timeout."""
    systemctl("start", "sdtool-exec-stop-hangs")

    status, report = stop(sdtool, "sdtool-exec-stop-hangs")

    assert (status, report["verdict"], report["result"]) == (1, "failed", "timeout")
    assert "timeout" in [e["kind"] for e in report["events"]]


def test_stop_takes_dependent_units_along(sdtool: Client, systemctl: Client) -> None:
    """A unit that Requires= the stopped one went down with it, and the report names it."""
    systemctl("start", "sdtool-requires")

    _, report = stop(sdtool, "sdtool-graceful")

    assert report["also_stopped"] == ["sdtool-requires.service"]


def test_stop_of_an_inactive_unit_is_clean_at_once(sdtool: Client) -> None:
    """Nothing to stop: clean, duration 0, and the reason says so."""
    status, report = stop(sdtool, "sdtool-graceful")

    assert (status, report["verdict"], report["duration_us"]) == (0, "clean", 0)
    assert "nothing to stop" in report["verdict_reason"]


def test_stop_orders_its_events_and_keeps_their_bounds(sdtool: Client, systemctl: Client) -> None:
    """Events are sorted; an inferred one lies within its bounds and after the request."""
    systemctl("start", "sdtool-forks")

    _, report = stop(sdtool, "sdtool-forks")

    times = [event["at_us"] for event in report["events"]]
    assert sorted(times) == times
    inferred = [event for event in report["events"] if event["evidence"] == "inferred"]
    assert inferred
    for event in inferred:
        assert report["requested_us"] <= event["at_min_us"]
        assert event["at_min_us"] <= event["at_us"] <= event["at_max_us"]


def test_stop_counts_states_as_systemd_stamps_them(sdtool: Client, systemctl: Client) -> None:
    """The time of the last state is the one that systemd keeps for the unit."""
    systemctl("start", "sdtool-ignores-term")

    _, report = stop(sdtool, "sdtool-ignores-term")

    shown = systemctl("show", "-P", "StateChangeTimestampMonotonic", "sdtool-ignores-term").stdout
    last = [event["at_us"] for event in report["events"] if event["kind"] == "state"][-1]
    assert int(shown) == last


def test_stop_of_several_units_reports_in_the_order_asked(
    sdtool: Client, systemctl: Client
) -> None:
    """They are stopped together, and each has its own report."""
    systemctl("start", "sdtool-slow", "sdtool-graceful")

    done = sdtool("stop", "sdtool-slow", "sdtool-graceful", "no-such-unit", "--json")

    envelope = json.loads(done.stdout)
    names = ["sdtool-slow.service", "sdtool-graceful.service"]
    assert names == [report["unit"] for report in envelope["data"]]
    assert [error["code"] for error in envelope["errors"]] == ["NoSuchUnit"]
    assert 5 == done.returncode == envelope["exit"]


@pytest.mark.parametrize("observers", ["none", "cgroup,sockets", "pidfd"])
def test_stop_never_calls_the_stubborn_unit_clean(
    sdtool: Client, systemctl: Client, observers: str
) -> None:
    """With any observer switched off the main process's SIGKILL is still told, by D-Bus."""
    systemctl("start", "sdtool-ignores-term")

    status, report = stop(sdtool, "sdtool-ignores-term", "--observers", observers)

    assert (status, report["verdict"]) == (1, "killed")


def test_stop_without_pidfds_never_hides_a_kill(sdtool: Client, systemctl: Client) -> None:
    """Where no child's status can be read, a mixed kill is killed or unknown, and not clean."""
    systemctl("start", "sdtool-forks-mixed")

    status, report = stop(sdtool, "sdtool-forks-mixed", "--observers", "none")

    assert status == 1
    assert report["verdict"] in ("killed", "unknown")
    assert [None] * 3 == [p["exit"] for p in report["processes"] if p["role"] == "other"]


def test_stop_streams_its_events_as_json_lines(sdtool: Client, systemctl: Client) -> None:
    """--jsonl: one event a line, the envelope last, and both tell the same."""
    systemctl("start", "sdtool-graceful")

    done = sdtool("stop", "sdtool-graceful", "--jsonl")

    *events, envelope = [json.loads(line) for line in done.stdout.splitlines()]
    key = json.dumps
    streamed = sorted(key(event) for event in events)
    assert sorted(key(event) for event in envelope["data"][0]["events"]) == streamed


def test_stop_gives_up_at_the_deadline_and_the_job_goes_on(
    sdtool: Client, systemctl: Client
) -> None:
    """--deadline: exit 75, and the unit is still on its way down."""
    systemctl("start", "sdtool-ignores-term")

    done = sdtool("stop", "sdtool-ignores-term", "--deadline", "0.5")

    assert done.returncode == 75
    assert "the stop job goes on" in done.stderr
    state = systemctl("show", "-P", "ActiveState", "sdtool-ignores-term").stdout.strip()
    assert state == "deactivating"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_interrupted_says_that_the_job_goes_on(
    manager: Bench, systemctl: Client, number: signal.Signals
) -> None:
    """Ctrl-C, SIGTERM and SIGHUP: exit 130 at once, and the unit goes down without us."""
    systemctl("start", "sdtool-ignores-term")
    command = sdtool_argv(manager, "stop", "sdtool-ignores-term")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        os.kill(watching.pid, number)
        _, stderr = watching.communicate(timeout=10)

    assert watching.returncode == 130
    assert "the stop job goes on" in stderr
    state = systemctl("show", "-P", "ActiveState", "sdtool-ignores-term").stdout.strip()
    assert state == "deactivating"


@pytest.mark.parametrize("unit", ["dbus", "dbus.socket", "init.scope"])
def test_stop_refuses_critical_units(sdtool: Client, systemctl: Client, unit: str) -> None:
    """What the manager stands on needs --force: exit 4, and nothing was stopped."""
    done = sdtool("stop", unit)

    assert done.returncode == 4
    assert "--force" in done.stderr
    assert systemctl("is-active", unit).stdout.strip() == "active"


def test_stop_of_a_glob_needs_yes_without_a_terminal(sdtool: Client, systemctl: Client) -> None:
    """A pattern names what it stands for and stops nothing until --yes."""
    systemctl("start", "sdtool-graceful")

    refused = sdtool("stop", "sdtool-grace*")
    running = systemctl("is-active", "sdtool-graceful").stdout.strip()
    done = sdtool("stop", "sdtool-grace*", "--yes")

    assert (refused.returncode, running) == (2, "active")
    assert "sdtool-graceful.service" in refused.stderr
    assert done.returncode == 0


def test_stop_of_a_unit_killed_from_outside_is_not_the_managers_kill(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """A child that someone else SIGKILLs during the stop is not counted as the manager's."""
    systemctl("start", "sdtool-slow")
    pid = main_pid(systemctl, "sdtool-slow")
    command = sdtool_argv(manager, "stop", "sdtool-slow", "--jsonl")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopping:
        assert stopping.stdout is not None
        for line in stopping.stdout:
            if '"stop-sigterm"' in line:
                break
        os.kill(pid, signal.SIGKILL)
        report = json.loads(stopping.stdout.read().splitlines()[-1])["data"][0]

    assert (report["verdict"], report["killed"]) == ("failed", [])


def run_transient(manager: Bench, unit: str, *words: str) -> None:
    """Start a transient unit: properties first, then the command."""
    command = ["systemd-run", flag_of(manager), "--quiet", f"--unit={unit}", *words]
    done = manager.run(command)
    assert done.returncode == 0, done.stderr


def test_stop_with_a_shell_exec_stop_is_clean(sdtool: Client, manager: Bench) -> None:
    """Short helpers of ExecStop= that come and go between two looks are no doubt."""
    many = (
        "for i in 1 2 3 4 5 6 7 8 9 10; do for j in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done; done"
    )
    prop = f"--property=ExecStop=/bin/sh -c '{many}'"
    run_transient(manager, "sdtool-t-shell", prop, "/bin/sleep", "1000")

    status, report = stop(sdtool, "sdtool-t-shell")

    assert (0, "clean") == (status, report["verdict"])


def test_stop_that_is_canceled_has_failed(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """A start in the middle cancels the stop: failed, and nothing is called a left-over."""
    systemctl("start", "sdtool-ignores-term")
    command = sdtool_argv(manager, "stop", "sdtool-ignores-term", "--jsonl")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopping:
        assert stopping.stdout is not None
        wait_for_line(stopping.stdout, '"stop-sigterm"')
        systemctl("start", "--no-block", "sdtool-ignores-term")
        report = json.loads(stopping.stdout.read().splitlines()[-1])["data"][0]

    assert ("failed", "canceled", []) == (
        report["verdict"],
        report["job_result"],
        report["leftovers"],
    )


def wait_for_line(lines: IO[str], part: str) -> None:
    """Read lines until one has the part."""
    assert any(part in line for line in lines), f"{part} never came"


def test_stop_refuses_what_takes_a_critical_unit_along(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """The slice of the bus: exit 4, the sentence says why, and the bus still runs."""
    system = manager.scope is Scope.SYSTEM
    reason = "sdtool itself runs in it" if system else "dbus.service would go down with it"

    done = sdtool("stop", "system.slice" if system else "session.slice")

    assert done.returncode == 4
    assert reason in done.stderr
    assert "active" == systemctl("is-active", "dbus.service").stdout.strip()


def test_stop_of_units_that_take_each_other_along_has_both_stories(
    sdtool: Client, systemctl: Client
) -> None:
    """The second unit goes down with the first: its own signal and states are in its report."""
    systemctl("start", "sdtool-requires")

    done = sdtool("stop", "sdtool-graceful", "sdtool-requires", "--json")

    reports = json.loads(done.stdout)["data"]
    for report in reports:
        sent = [e for e in report["events"] if e["kind"] == "signal-sent"]
        assert ["SIGTERM"] == [e["signal"] for e in sent]
        assert report["requested_us"] <= min(e.get("at_min_us", e["at_us"]) for e in sent)
    assert 2 == len(reports)


def test_stop_of_a_unit_under_two_names_is_reported_once(
    sdtool: Client, systemctl: Client
) -> None:
    """A name with and without its suffix is one unit."""
    systemctl("start", "sdtool-graceful")

    done = sdtool("stop", "sdtool-graceful", "sdtool-graceful.service", "--json")

    assert 1 == len(json.loads(done.stdout)["data"])


def test_stop_past_its_deadline_forgets_no_unit(sdtool: Client, systemctl: Client) -> None:
    """Each unit asked about has its report or its error."""
    systemctl("start", "sdtool-graceful", "sdtool-slow")

    done = sdtool("stop", "sdtool-graceful", "sdtool-slow", "--deadline", "0.0001", "--json")

    envelope = json.loads(done.stdout)
    asked = {"sdtool-graceful.service", "sdtool-slow.service"}
    assert asked == {error["subject"] for error in envelope["errors"]}
    assert 75 == done.returncode


def test_stop_goes_on_watching_when_its_reader_has_gone(systemctl: Client, manager: Bench) -> None:
    """``sdtool stop | head -1``: the exit status is still that of the verdict."""
    systemctl("start", "sdtool-slow", "sdtool-ignores-term")
    command = f"{sys.executable} -m sdtool stop %s {flag_of(manager)}"
    words = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"

    clean = manager.run(["bash", "-c", words % "sdtool-slow"])
    killed = manager.run(["bash", "-c", words % "sdtool-ignores-term"])

    assert ["0", "1"] == [done.stdout.splitlines()[-1] for done in (clean, killed)]
    assert "" == clean.stderr + killed.stderr


@pytest.mark.capability("freezable manager")
def test_stop_whose_output_is_lost_says_what_goes_on(systemctl: Client, manager: Bench) -> None:
    """A full disk takes no line: nobody watches any more, and what goes on is named."""
    systemctl("start", "sdtool-slow")
    command = shlex.join(sdtool_argv(manager, "stop", "sdtool-slow"))
    done = manager.run(["sh", "-c", f"{command} > /dev/full"])
    assert 69 == done.returncode
    assert "sdtool: The answer could not be written: No space left on device." in done.stderr
    assert "whether the stop job goes on was not looked at: sdtool-slow.service" in done.stderr
    eventually(lambda: "inactive\n" == systemctl("is-active", "sdtool-slow").stdout)


def test_stop_interrupted_before_it_asked_says_nothing_of_a_job(
    systemctl: Client, manager: Bench
) -> None:
    """While the manager is frozen nothing has been asked of it, and nothing goes on."""
    systemctl("start", "sdtool-graceful")
    command = sdtool_argv(manager, "stop", "sdtool-graceful")
    os.kill(manager.pid, signal.SIGSTOP)
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as stopping:
            wait_for_socket(stopping.pid)
            os.kill(stopping.pid, signal.SIGINT)
            _, stderr = stopping.communicate(timeout=10)
    finally:
        os.kill(manager.pid, signal.SIGCONT)

    assert "goes on" not in stderr
    assert stopping.returncode == 130


def wait_for_socket(pid: int) -> None:
    """Wait until a process has opened a socket: it talks to the manager from then on."""
    until = time.monotonic() + 10
    while not descriptors.Sweep([pid]).sockets:
        assert time.monotonic() < until, "it never connected"


@pytest.mark.parametrize("observers", ["-journal", "-tracefs", "-tracefs,-procevents"])
def test_process_that_is_moved_out_is_not_of_the_stop(
    sdtool: Client, systemctl: Client, manager: Bench, observers: str
) -> None:
    """It runs on in another unit: no left-over, and nobody waits for its end."""
    systemctl("start", "sdtool-forks", "sdtool-slow")
    (trace,) = json.loads(sdtool("trace", "sdtool-forks", "--json").stdout)["data"]
    (moved,) = [p["pid"] for p in trace["processes"] if p["comm"] == "child-stubborn"]
    group = systemctl("show", "-P", "ControlGroup", "sdtool-slow").stdout.strip()
    command = sdtool_argv(manager, "stop", "sdtool-forks", "--jsonl", f"--observers={observers}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopping:
        assert stopping.stdout is not None
        wait_for_line(stopping.stdout, '"final-sigterm"')
        place = cgroupfs_of(manager) / group.lstrip("/") / "cgroup.procs"
        place.write_text(str(moved))
        report = json.loads(stopping.stdout.read().splitlines()[-1])["data"][0]

    assert ("clean", [], []) == (report["verdict"], report["leftovers"], report["killed"])
    (fate,) = [p for p in report["processes"] if p["pid"] == moved]
    assert (None, False) == (fate["exit"], fate["killed_by_manager"])
    assert "moved out" in fate["fate_reason"]


AWAY = """
import os, signal, socket, sys
open(sys.argv[1], "w").write("0")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
while True:
    signal.pause()
"""


@pytest.mark.parametrize("observers", ["-journal", "-tracefs", "-tracefs,-procevents"])
def test_main_process_in_another_cgroup_is_the_units(
    sdtool: Client, systemctl: Client, manager: Bench, observers: str
) -> None:
    """As logind leaves it with PAMName=: the manager signals it, and kills it, all the same."""
    systemctl("start", "sdtool-slow")
    group = systemctl("show", "-P", "ControlGroup", "sdtool-slow").stdout.strip()
    settings = ["--service-type=notify", "--property=TimeoutStopSec=1"]
    place = f"/sys/fs/cgroup{group}/cgroup.procs"
    run_transient(manager, "sdtool-t-away", *settings, "/usr/bin/python3", "-c", AWAY, place)
    pid = main_pid(systemctl, "sdtool-t-away")

    status, report = stop(sdtool, "sdtool-t-away", f"--observers={observers}")

    assert (1, "killed", [pid]) == (status, report["verdict"], report["killed"])
    sent = [(e["pid"], e["signal"]) for e in report["events"] if e["kind"] == "signal-sent"]
    assert [(pid, "SIGTERM"), (pid, "SIGKILL")] == sent
