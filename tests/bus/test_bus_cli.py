"""The command line against the fake manager: exit statuses, the envelope, and how fast it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from fake_systemd import NAME, FakeSystemd
from private_broker import Broker

from sdtool.errors import Exit
from sdtool.host.contact import RETURN_S

Run = Callable[..., CompletedProcess[str]]

QUICK_S = 5.0


def envelope(ran: CompletedProcess[str]) -> dict[str, Any]:
    """The document that a command printed, which must say the command's own exit status."""
    document = json.loads(ran.stdout)
    assert ["sdtool", "command", "exit", "data", "errors", "notes"] == list(document)
    assert ("", document["exit"]) == (ran.stderr, ran.returncode)
    return dict(document)


def codes(document: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The errors of an envelope, as (code, subject)."""
    return [(error["code"], error["subject"]) for error in document["errors"]]


def test_list_prints_the_units(fake: FakeSystemd, sdtool: Run) -> None:
    """Inactive ones only when asked for."""
    fake.add("a.service", "b.service")
    fake.add("idle.service", active_state="inactive", sub_state="dead")
    few, every = envelope(sdtool("list", "--json")), envelope(sdtool("list", "--all", "--json"))
    assert (Exit.OK, []) == (few["exit"], few["errors"])
    assert ["a.service", "b.service"] == [unit["name"] for unit in few["data"]]
    assert "idle.service" == every["data"][-1]["name"]


def test_list_as_text_is_clean(fake: FakeSystemd, sdtool: Run) -> None:
    """No control character of a description reaches the terminal, and stderr stays empty."""
    fake.add(r"odd\x2dname.service", description="\x1b[31mred\a")
    ran = sdtool("list", "--user")
    assert (Exit.OK, "", True) == (ran.returncode, ran.stderr, r"odd\x2dname" in ran.stdout)
    assert not set("\x1b\a") & set(ran.stdout)


def test_list_of_nothing_that_matches_exits_5(fake: FakeSystemd, sdtool: Run) -> None:
    """For every verb."""
    fake.add("a.service")
    document = envelope(sdtool("list", "b*", "--json"))
    assert (Exit.NO_SUCH_UNIT, [("NoSuchUnit", "b*")]) == (document["exit"], codes(document))


def test_list_of_all_managers_is_for_root(fake: FakeSystemd, sdtool: Run) -> None:
    """And means more than one user's: --user excludes it."""
    fake.add("a.service")
    denied = envelope(sdtool("list", "--all-managers", "--json", unprivileged=True))
    assert (Exit.DENIED, [("AccessDenied", None)]) == (denied["exit"], codes(denied))
    assert "root" in denied["errors"][0]["hint"]
    both = envelope(sdtool("list", "--all-managers", "--user", "--json"))
    assert (Exit.USAGE, [("InvalidArgument", None)]) == (both["exit"], codes(both))


def test_list_of_all_managers_keeps_what_answers(fake: FakeSystemd, sdtool: Run) -> None:
    """A user manager that is not there is an error beside the system's units."""
    fake.add("a.service", "user@4000000000.service")
    document = envelope(sdtool("list", "--all-managers", "--json"))
    assert ("Unavailable", "user@4000000000.service") in codes(document)
    assert Exit.UNAVAILABLE == document["exit"]
    assert [("a.service", "system", None)] == [
        (u["name"], u["manager"], u["manager_user"]) for u in document["data"] if "a." in u["name"]
    ]


def test_list_of_all_managers_that_nothing_matches_exits_5(fake: FakeSystemd, sdtool: Run) -> None:
    """As for one manager."""
    fake.add("a.service")
    document = envelope(sdtool("list", "--all-managers", "b*", "--json"))
    assert (Exit.NO_SUCH_UNIT, [("NoSuchUnit", "b*")]) == (document["exit"], codes(document))


def test_trace_prints_what_it_found_beside_the_error(fake: FakeSystemd, sdtool: Run) -> None:
    """One of two units is unknown: data, error and exit 5."""
    fake.add("a.service")
    document = envelope(sdtool("trace", "a", "absent", "--json"))
    assert ["a.service"] == [trace["unit"] for trace in document["data"]]
    assert [("NoSuchUnit", "absent.service")] == codes(document)
    assert Exit.NO_SUCH_UNIT == document["exit"]


@pytest.mark.parametrize(
    ("style", "expected"),
    [("plain", Exit.OK), ("early", Exit.OK), ("fails", Exit.BAD), ("canceled", Exit.BAD)],
)
def test_stop_exits_as_it_went(fake: FakeSystemd, sdtool: Run, style: str, expected: Exit) -> None:
    """0 when clean, 1 when the answer is a bad one."""
    fake.add("a.service", stop=style)
    document = envelope(sdtool("stop", "a", "--json"))
    assert (expected, []) == (document["exit"], document["errors"])
    assert ["a.service"] == [report["unit"] for report in document["data"]]


def test_stop_past_its_deadline_exits_75(fake: FakeSystemd, sdtool: Run) -> None:
    """With a word on how to follow the job."""
    fake.add("a.service", stop="hangs")
    ran = sdtool("stop", "a", "--deadline", "0.2")
    assert Exit.DEADLINE == ran.returncode
    assert "sdtool: a.service is still stopping" in ran.stderr
    assert "list-jobs" in ran.stderr


def test_stop_that_is_denied_exits_4(fake: FakeSystemd, sdtool: Run) -> None:
    """The hint names polkit's action."""
    fake.add("a.service")
    name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
    fake.errors["StopUnit"] = (name, "Interactive authentication required.")
    document = envelope(sdtool("stop", "a", "--json"))
    assert (Exit.DENIED, [("AccessDenied", "a.service")]) == (document["exit"], codes(document))
    assert "manage-units" in document["errors"][0]["hint"]


def test_stop_of_a_masked_unit_exits_6(fake: FakeSystemd, sdtool: Run) -> None:
    """The manager's own words follow the program's name."""
    fake.add("a.service")
    fake.errors["StopUnit"] = (f"{NAME}.UnitMasked", "Unit a.service is masked.")
    ran = sdtool("stop", "a")
    assert Exit.NOT_CONFIGURED == ran.returncode
    assert "sdtool: Unit a.service is masked.\n" in ran.stderr


def test_stop_whose_bus_dies_exits_69(fake: FakeSystemd, broker: Broker) -> None:
    """When it does not come back: one sentence, no traceback and no noise of a library."""
    fake.add("a.service", stop="hangs")
    command = [sys.executable, "-W", "error", "-m", "sdtool", "stop", "a", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            fake.wait_for("StopUnit")
            broker.kill()
            stdout, stderr = child.communicate(timeout=RETURN_S + QUICK_S)
        finally:
            child.kill()
    document = json.loads(stdout)
    assert (b"", Exit.UNAVAILABLE) == (stderr, child.returncode)
    assert [("Unavailable", "a.service")] == codes(document)


def interrupt(
    fake: FakeSystemd,
    *arguments: str,
    meanwhile: Callable[[], object] = lambda: None,
    after_s: float = 0.3,
    times: int = 1,
) -> tuple[str, str, float]:
    """Stop units and send SIGINT after a while: stdout, stderr, and the seconds to the end."""
    command = [sys.executable, "-W", "error", "-m", "sdtool", "stop", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            fake.wait_for("StopUnit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.3)
            meanwhile()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=after_s)
            began = time.monotonic()
            for _ in range(times):
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.1)
            stdout, stderr = child.communicate(timeout=QUICK_S)
        finally:
            child.kill()
    assert Exit.INTERRUPTED == child.returncode
    return stdout, stderr, time.monotonic() - began


@pytest.mark.parametrize("end", ["", "kill", "freeze the bus", "freeze"])
def test_farewell_says_only_what_is_known(fake: FakeSystemd, broker: Broker, end: str) -> None:
    """Ctrl-C while the manager is out of reach: nobody can see whether the job goes on."""
    fake.add("a.service", stop="hangs")
    ends = {"": lambda: None, "kill": broker.kill, "freeze the bus": broker.freeze}
    meanwhile = ends.get(end, lambda: fake.silent.add("*"))
    stdout, stderr, _ = interrupt(fake, "a", meanwhile=meanwhile)
    assert "clean" not in stdout
    unknown = "whether a.service has stopped, or its stop job goes on, is not known: the manager"
    assert bool(end) == (f"sdtool: No longer watching; {unknown}" in stderr)
    goes_on = "No longer watching; a.service is still stopping, and the stop job goes on."
    assert bool(end) != (goes_on in stderr)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt_ends_soon_while_the_manager_is_frozen(fake: FakeSystemd, times: int) -> None:
    """It is asked once more, for half a second; a second one does not wait for that."""
    fake.add("a.service", stop="hangs")
    _, stderr, took_s = interrupt(
        fake, "a", meanwhile=lambda: fake.silent.add("*"), after_s=0.1, times=times
    )
    assert took_s < 1.5
    assert (times == 1) == ("is not known" in stderr)
    assert (times == 2) == ("whether the stop job goes on was not looked at: a.service" in stderr)


def test_interrupt_keeps_the_reports_of_what_is_over(fake: FakeSystemd) -> None:
    """The units whose jobs go on are errors beside them, and alone in what is said."""
    fake.add("a.service", stop="fails")
    fake.add("b.service", stop="hangs")
    stdout, stderr, _ = interrupt(fake, "a", "b", "--json")
    document = json.loads(stdout)
    assert ("", Exit.INTERRUPTED) == (stderr, document["exit"])
    assert [("a.service", "failed")] == [(r["unit"], r["active_state"]) for r in document["data"]]
    assert [("Interrupted", "b.service")] == codes(document)
    stdout, stderr, _ = interrupt(fake, "a", "b")
    assert ("b.service is still stopping" in stderr, "a.service" in stderr) == (True, False)


def test_interrupt_exits_130_whatever_was_refused(fake: FakeSystemd) -> None:
    """Nobody waited for the answer."""
    fake.add("a.service", stop="hangs")
    document = json.loads(interrupt(fake, "absent", "a", "--json")[0])
    assert Exit.INTERRUPTED == document["exit"]
    assert [("NoSuchUnit", "absent.service"), ("Interrupted", "a.service")] == codes(document)


@pytest.mark.parametrize("command", ["list", "trace x", "stop x"])
@pytest.mark.parametrize("scope", ["--system", "--user"])
def test_command_without_any_bus_exits_69(sdtool: Run, command: str, scope: str) -> None:
    """Soon, for both managers."""
    began = time.monotonic()
    document = envelope(sdtool(*command.split(), scope, "--json", unprivileged=True))
    assert time.monotonic() - began < QUICK_S
    assert Exit.UNAVAILABLE == document["exit"]
    assert {("Unavailable", None), ("NotBooted", None)} >= set(codes(document))


def test_command_with_a_deaf_bus_exits_69(
    runtime: Path, sdtool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens, and never accepts."""
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(runtime / "deaf"))
        deaf.listen(1)
        monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={runtime}/deaf")
        began = time.monotonic()
        ran = sdtool("list", "--user")
    assert time.monotonic() - began < QUICK_S
    assert (Exit.UNAVAILABLE, "") == (ran.returncode, ran.stdout)
    assert ran.stderr.startswith("sdtool: No user manager can be reached: ")


def test_doctor_without_a_bus_is_an_answer(sdtool: Run) -> None:
    """It never fails for what is missing; exit 1 says that no manager answers."""
    document = envelope(sdtool("doctor", "--user", "--json"))
    bus, manager, *_ = document["data"]
    assert (Exit.BAD, []) == (document["exit"], document["errors"])
    assert [False, False] == [row["available"] for row in (bus, manager)]
    assert "ports and processes can" in manager["costs"]


def test_doctor_names_the_library_and_the_way(
    fake: FakeSystemd, sdtool: Run, library: str
) -> None:
    """And the manager behind it."""
    rows = {row["facility"]: row for row in envelope(sdtool("doctor", "--json"))["data"]}
    assert f"over the bus, with dbus-{library}" == rows["bus"]["reason"]
    assert "systemd 252.4-fake" in rows["manager"]["reason"]


def test_doctor_says_why_it_is_not_the_bus(private: FakeSystemd, sdtool: Run) -> None:
    """The private socket stands in, and says for whom."""
    document = envelope(sdtool("doctor", "--user", "--json"))
    bus, manager, *_ = document["data"]
    assert (Exit.OK, False, True) == (document["exit"], bus["available"], manager["available"])
    assert bus["reason"].startswith("unix:path=")
    assert manager["reason"].endswith("over its private socket")
    assert bus["costs"].startswith(f"nothing for uid {os.geteuid()}")


def test_unknown_library_exits_2(
    fake: FakeSystemd, sdtool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip of the pen in SDTOOL_DBUS is a usage error."""
    monkeypatch.setenv("SDTOOL_DBUS", "bad")
    ran = sdtool("list")
    assert (Exit.USAGE, "sdtool: SDTOOL_DBUS=bad is neither next nor fast.\n") == (
        ran.returncode,
        ran.stderr,
    )
