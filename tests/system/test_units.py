"""The demo units behave as the comments at their heads say, with systemctl and ss as judges."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtool.sandbox import units_directory
from tests.machine import eventually
from tests.system.bench import Bench, Client, flag_of

UNITS = sorted(path.name for path in units_directory().iterdir() if path.is_file())

SHOWN = ("ActiveState", "Result", "ExecMainCode", "ExecMainStatus")
CLEAN = ("inactive", "success", str(os.CLD_EXITED), "0")
KILLED = ("failed", "timeout", str(os.CLD_KILLED), str(int(signal.SIGKILL)))

TIMEOUT_STOP = 2.0


@pytest.fixture
def show(systemctl: Client) -> Callable[..., tuple[str, ...]]:
    """The values of a unit's properties, in the order they are asked for."""

    def read(unit: str, *properties: str) -> tuple[str, ...]:
        answer = systemctl("show", unit, *(f"--property={name}" for name in properties))
        values = dict(line.split("=", 1) for line in answer.stdout.splitlines())
        return tuple(values[name] for name in properties)

    return read


@pytest.fixture
def start(manager: Bench, systemctl: Client) -> Callable[[str], None]:
    """Start a unit and hold on to it: a stopped one that nobody refers to is forgotten."""

    def start_and_refer(unit: str) -> None:
        witness = ["systemd-run", flag_of(manager), "--quiet", "--unit=sdtool-witness"]
        after = "--property=After=" + unit.replace("\\", "\\\\")  # systemd-run unescapes
        manager.run([*witness, after, "sleep", "infinity"])
        started = systemctl("start", unit)
        assert (0, "") == (started.returncode, started.stderr)

    return start_and_refer


@pytest.fixture
def stop(systemctl: Client, show: Callable[..., tuple[str, ...]]) -> Callable[[str], float]:
    """Stop a unit; how many seconds that took by the manager's own clock."""

    def stop_and_time(unit: str) -> float:
        assert systemctl("stop", unit).returncode == 0
        since, until = show(
            unit, "ActiveExitTimestampMonotonic", "InactiveEnterTimestampMonotonic"
        )
        return (int(until) - int(since)) / 1e6

    return stop_and_time


@pytest.fixture
def killed(manager: Bench) -> Callable[[], list[str]]:
    """The names of the processes that the manager has sent SIGKILL in this test, sorted."""
    before = len(manager.log_text())

    def read() -> list[str]:
        lines = manager.log_text()[before:].splitlines()
        kills = [line for line in lines if "with signal SIGKILL" in line]
        return sorted(line.partition("(")[2].partition(")")[0] for line in kills)

    return read


@pytest.fixture
def listeners(manager: Bench) -> Callable[[], set[str]]:
    """Who listens on the demo's ports: "comm ADDRESS:PORT/PROTOCOL"."""

    def read() -> set[str]:
        lines = manager.run(["ss", "-Htulnp", "sport >= 18080 and sport <= 18099"]).stdout
        return {
            f"{comm} {line.split()[4]}/{line.split()[0]}"
            for line in lines.splitlines()
            for comm in re.findall(r'\("([^"]+)"', line)
        }

    return read


def about(seconds: float) -> Callable[[float], bool]:
    """Whether a measured duration is what was expected, a phase firing up to 0.6 s late."""
    return lambda actual: seconds - 0.05 <= actual <= seconds + 0.6


@pytest.mark.parametrize("unit", UNITS)
def test_unit_file_verifies(manager: Bench, unit: str) -> None:
    """systemd-analyze finds nothing to complain about in any of the files."""
    answer = manager.run(
        ["systemd-analyze", flag_of(manager), "verify", str(units_directory() / unit)]
    )
    complaints = [line for line in answer.stderr.splitlines() if "sdtool" in line]
    assert (0, []) == (answer.returncode, complaints)


@pytest.mark.parametrize("unit", UNITS)
def test_unit_file_says_what_stop_reports(unit: str) -> None:
    """Every file opens with the behaviour it shows and what to expect of sdtool."""
    text = (units_directory() / unit).read_text()
    assert (True, True) == (text.startswith("# "), "`sdtool stop` reports: " in text)


def test_payloads_have_names_that_comm_can_hold() -> None:
    """The kernel cuts a process name after 15 characters."""
    names = [path.name for path in (units_directory() / "bin").iterdir() if not path.suffix]
    assert [] == [name for name in names if len(name) > 15]


def test_graceful_closes_its_port_and_exits(start, stop, show, listeners, killed) -> None:
    """It exits 0 within a moment of SIGTERM."""
    start("sdtool-graceful.service")
    assert {"serve 127.0.0.1:18080/tcp"} == listeners()
    assert about(0.2)(stop("sdtool-graceful.service"))
    assert CLEAN == show("sdtool-graceful.service", *SHOWN)
    assert (set(), []) == (listeners(), killed())


def test_ignores_term_is_killed(start, stop, show, killed) -> None:
    """Its stop lasts TimeoutStopSec and ends in SIGKILL."""
    start("sdtool-ignores-term.service")
    assert about(TIMEOUT_STOP)(stop("sdtool-ignores-term.service"))
    assert KILLED == show("sdtool-ignores-term.service", *SHOWN)
    assert ["stubborn"] == killed()


def test_forks_loses_only_its_stubborn_child(start, stop, show, killed) -> None:
    """The second SIGTERM phase begins when main is gone and lasts TimeoutStopSec."""
    start("sdtool-forks.service")
    assert about(0.2 + TIMEOUT_STOP)(stop("sdtool-forks.service"))
    assert ("failed", "timeout", str(os.CLD_EXITED), "0") == show("sdtool-forks.service", *SHOWN)
    assert ["child-stubborn"] == killed()


def test_forks_mixed_loses_all_its_children(start, stop, show, killed) -> None:
    """KillMode=mixed kills what would have exited, and calls it a success."""
    start("sdtool-forks-mixed.service")
    assert about(0.2)(stop("sdtool-forks-mixed.service"))
    assert CLEAN == show("sdtool-forks-mixed.service", *SHOWN)
    assert ["child-default", "child-handler", "child-stubborn"] == killed()


def test_slow_is_clean(start, stop, show, killed) -> None:
    """It takes a second of the five it has."""
    start("sdtool-slow.service")
    assert about(1.0)(stop("sdtool-slow.service"))
    assert (CLEAN, []) == (show("sdtool-slow.service", *SHOWN), killed())


def test_port_hog_holds_its_ports(start, stop, show, listeners) -> None:
    """It holds TCP, UDP and, where the machine has it, IPv6, until it is stopped."""
    start("sdtool-port-hog.service")
    expected = {"serve 127.0.0.1:18081/tcp", "serve 127.0.0.1:18081/udp"}
    if Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text():
        expected.add("serve [::1]:18082/tcp")
    assert expected == listeners()
    assert about(0.0)(stop("sdtool-port-hog.service"))
    assert (CLEAN, set()) == (show("sdtool-port-hog.service", *SHOWN), listeners())


def test_port_clash_fails_while_the_port_is_held(manager, start, systemctl, show) -> None:
    """It exits 1, and says why in its own words."""
    start("sdtool-port-hog.service")
    assert 1 == systemctl("start", "sdtool-port-clash.service").returncode
    failed = ("failed", "exit-code", str(os.CLD_EXITED), "1")
    assert failed == show("sdtool-port-clash.service", *SHOWN)
    eventually(lambda: "127.0.0.1:18081/tcp: Address already in use" in manager.log_text())


def test_port_clash_starts_alone(start, stop, show, listeners) -> None:
    """Nothing else is wrong with it."""
    start("sdtool-port-clash.service")
    assert {"serve 127.0.0.1:18081/tcp"} == listeners()
    assert about(0.0)(stop("sdtool-port-clash.service"))
    assert CLEAN == show("sdtool-port-clash.service", *SHOWN)


def test_activated_starts_at_the_first_connection(start, stop, show, listeners) -> None:
    """Until then systemd alone holds the port; after its stop systemd holds it still."""
    start("sdtool-activated.socket")
    assert {"systemd 127.0.0.1:18083/tcp"} == listeners()
    with socket.create_connection(("127.0.0.1", 18083), timeout=10) as connection:
        assert b"hello from sdtool-activated\n" == connection.recv(100)
    assert ("active",) == show("sdtool-activated.service", "ActiveState")
    both = {"answer 127.0.0.1:18083/tcp", "systemd 127.0.0.1:18083/tcp"}
    assert both == listeners()
    assert about(0.0)(stop("sdtool-activated.service"))
    assert {"systemd 127.0.0.1:18083/tcp"} == listeners()


def test_crash_loop_ends_failed(systemctl, show) -> None:
    """The manager gives up at the third failure; 252 keeps exit-code as the result."""
    systemctl("start", "sdtool-crash-loop.service")
    eventually(lambda: show("sdtool-crash-loop.service", "SubState") == ("failed",))
    state, result, code, status = show("sdtool-crash-loop.service", *SHOWN)
    assert ("failed", str(os.CLD_EXITED), "42") == (state, code, status)
    assert result in {"exit-code", "start-limit-hit"}


def test_leaves_child_leaves_its_child(start, stop, show, listeners, killed) -> None:
    """The unit is inactive and successful, and its port is held."""
    start("sdtool-leaves-child.service")
    assert {"left-behind 127.0.0.1:18084/tcp"} == listeners()
    assert about(0.0)(stop("sdtool-leaves-child.service"))
    assert CLEAN == show("sdtool-leaves-child.service", *SHOWN)
    assert ({"left-behind 127.0.0.1:18084/tcp"}, []) == (listeners(), killed())


def test_left_behind_does_not_reach_the_next_test(listeners) -> None:
    """The clean slate between tests includes left-over processes."""
    assert set() == listeners()


def test_exec_stop_takes_the_time_of_its_commands(start, stop, show, killed) -> None:
    """ExecStop= and ExecStopPost= both run to their end."""
    start("sdtool-exec-stop.service")
    assert about(0.7)(stop("sdtool-exec-stop.service"))
    assert (CLEAN, []) == (show("sdtool-exec-stop.service", *SHOWN), killed())


def test_exec_stop_hangs_until_its_timeout(start, stop, show, killed) -> None:
    """ExecStop= is given up after TimeoutStopSec, and nobody needs a SIGKILL."""
    start("sdtool-exec-stop-hangs.service")
    assert about(TIMEOUT_STOP)(stop("sdtool-exec-stop-hangs.service"))
    expected = ("failed", "timeout", str(os.CLD_EXITED), "0")
    assert (expected, []) == (show("sdtool-exec-stop-hangs.service", *SHOWN), killed())


def test_template_has_its_instance_in_its_command_line(start, stop, show) -> None:
    """Two instances would differ in it."""
    start("sdtool-template@blue.service")
    pid, description = show("sdtool-template@blue.service", "MainPID", "Description")
    assert b"blue" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert 'Instance "blue" of a template' == description
    assert about(0.0)(stop("sdtool-template@blue.service"))


def test_odd_name_works_like_any_other(start, stop, show) -> None:
    """The escape is part of the name; the description comes through unharmed."""
    unit = r"sdtool-odd\x2dname.service"
    start(unit)
    assert (unit, "active") == show(unit, "Id", "ActiveState")
    assert "測試 e\u0301 no\u00a0break 🧪" in show(unit, "Description")[0]
    assert about(0.0)(stop(unit))
    assert CLEAN == show(unit, *SHOWN)


def test_requires_stops_along(start, systemctl, show) -> None:
    """Starting it starts what it requires; stopping that stops it."""
    start("sdtool-requires.service")
    assert ("active",) == show("sdtool-graceful.service", "ActiveState")
    systemctl("stop", "sdtool-graceful.service")
    assert CLEAN == show("sdtool-requires.service", *SHOWN)
