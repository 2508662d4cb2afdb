"""What the journal says of a stop: to root, to an ordinary user, and when somebody lies in it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from sdtool.sandbox.rootfs import TESTER
from tests.container.conftest import Boot
from tests.container.system import System

GRACEFUL = "sdtool-graceful.service"
MIXED = "sdtool-forks-mixed.service"

# Where journalctl is looked for comes last: python3 is found before.
READ = """
import asyncio, json, os, sys
from sdtool.errors import Unavailable
from sdtool.model.scope import Scope
from sdtool.sources.journal import read_stop_records

scope, unit, since, deadline, patience, manager_pid, os.environ["PATH"] = sys.argv[1:]
reading = read_stop_records(
    unit,
    Scope(scope),
    since_us=int(since),
    deadline_s=float(deadline),
    patience_s=float(patience),
    manager_pid=int(manager_pid) or None,
)
try:
    records = asyncio.run(reading)
except Unavailable as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
else:
    names = ("at_us", "kind", "comm", "signal", "job_result", "message")
    told = [{name: getattr(record, name) for name in names} for record in records]
    print(json.dumps({"records": told}))
"""

FLOOD = """
import socket
talk = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
while True:
    talk.sendto(b"MESSAGE=flood", "/run/systemd/journal/socket")
"""

ENV = {"PYTHONPATH": "/opt/sdtool/lib:/opt/sdtool/packages", "PYTHONDONTWRITEBYTECODE": "1"}

STOP = ["stopping", "killing", "killing", "killing", "succeeded", "stopped"]

# A user's manager says that on its debug level only.
USER_STOP = [kind for kind in STOP if kind != "succeeded"]

READ_HINT = "needs root or the group systemd-journal"

CONFIG = "etc/systemd/journald.conf.d"


def storage(mode: str) -> str:
    """The preparation of a container whose journal is kept so."""
    lines = f"[Journal]\\nStorage={mode}\\n"
    return f"mkdir -p {CONFIG}; printf '{lines}' > {CONFIG}/zz-sdtool.conf"


def read(
    system: System,
    unit: str,
    since_us: int,
    *,
    user: str = "root",
    scope: str = "system",
    deadline_s: float = 10.0,
    patience_s: float = 10.0,
    manager_pid: int = 0,
    path: str = "/usr/bin:/bin",
) -> dict[str, Any]:
    """What is read inside: the records, or the error."""
    words = [scope, unit, *map(str, (since_us, deadline_s, patience_s, manager_pid)), path]
    result = system.run(["python3", "-W", "error", "-c", READ, *words], user=user, env=ENV)
    assert (0, "") == (result.status, result.stderr)
    return dict(json.loads(result.stdout))


def now_us() -> int:
    """CLOCK_MONOTONIC, which is the container's too."""
    return time.monotonic_ns() // 1000


def systemctl(system: System, verb: str, unit: str, user: str = "root") -> None:
    """Start or stop a unit of the system, or of tester."""
    whose = ["--user"] if user == TESTER else []
    result = system.run(["systemctl", *whose, verb, unit], user=user)
    assert 0 == result.status, result.stderr


def stop(system: System, unit: str, user: str = "root") -> int:
    """Start and stop a unit; the moment before the stop."""
    systemctl(system, "start", unit, user)
    since_us = now_us()
    systemctl(system, "stop", unit, user)
    return since_us


def lie(system: System, unit: str, user: str) -> None:
    """Log a kill as if the manager did it, of the system's unit and of a user's."""
    message = f"{unit}: Killing process 1 (init) with signal SIGKILL."
    fields = [f"MESSAGE={message}", f"UNIT={unit}", f"USER_UNIT={unit}", "_PID=1", "_UID=0"]
    script = 'printf "%s\\n" "$@" | logger --journald'
    result = system.run(["sh", "-euc", script, "sh", *fields], user=user)
    assert 0 == result.status, result.stderr


def kinds(answer: dict[str, Any]) -> list[str]:
    """What the records say."""
    return [record["kind"] for record in answer["records"] if record["kind"]]


def test_root_reads_a_stop_at_once(healthy: System) -> None:
    """Every record from the first to the last, with its time and what it says."""
    since_us = stop(healthy, MIXED)
    records = read(healthy, MIXED, since_us)["records"]
    assert STOP == [record["kind"] for record in records]
    names = ["child-stubborn", "child-handler", "child-default"]
    assert [(name, "SIGKILL") for name in names] == [
        (record["comm"], record["signal"]) for record in records[1:4]
    ]
    assert "done" == records[-1]["job_result"]
    times = [record["at_us"] for record in records]
    assert sorted([since_us, *times, now_us()])[1:-1] == times


def test_earlier_stops_are_left_out(healthy: System) -> None:
    """Also where the journal is in several files, which systemd 252 shows whole."""
    moments = []
    for _ in range(3):
        moments.append(stop(healthy, MIXED))
        assert 0 == healthy.run(["journalctl", "--rotate"]).status
    counts = [len(kinds(read(healthy, MIXED, moment))) for moment in moments]
    assert [len(STOP) * stops for stops in (3, 2, 1)] == counts
    assert {"records": []} == read(healthy, MIXED, now_us(), patience_s=0.0)


def test_busy_journald_is_waited_for(healthy: System) -> None:
    """Others have it take in more than it can, and the end of the stop comes late."""
    begin = ["systemd-run", "-q", "--collect", "--unit=sdtool-flood", "python3", "-c", FLOOD]
    assert 0 == healthy.run(begin).status
    try:
        since_us = stop(healthy, MIXED)
        assert STOP == kinds(read(healthy, MIXED, since_us))
    finally:
        healthy.run(["systemctl", "kill", "--signal=KILL", "sdtool-flood"])


@pytest.mark.parametrize("scope", ["system", "user"])
def test_ordinary_user_is_told_why_not(healthy: System, scope: str) -> None:
    """Without a group that may read it; a volatile journal has no file of the user's own."""
    since_us = stop(healthy, GRACEFUL)
    answer = read(healthy, GRACEFUL, since_us, user=TESTER, scope=scope)
    assert READ_HINT == answer["hint"]
    assert answer["error"].startswith("The journal at /run/log/journal/")
    assert answer["error"].endswith(" may not be read.")


def test_group_opens_the_journal(boot: Boot) -> None:
    """Also the records of the user's own manager are then read, by its pid or without."""
    system = boot(prepare=f"chroot . usermod --append --groups systemd-journal {TESTER}")
    system.container.log_in()
    since_us = stop(system, MIXED)
    assert STOP == kinds(read(system, MIXED, since_us, user=TESTER))
    since_us = stop(system, MIXED, TESTER)
    shown = system.run(["systemctl", "show", "-P", "MainPID", "user@1000.service"]).stdout
    for pid in (0, int(shown)):
        answer = read(system, MIXED, since_us, user=TESTER, scope="user", manager_pid=pid)
        assert USER_STOP == kinds(answer)


def test_user_reads_the_users_own_journal(boot: Boot) -> None:
    """A persistent one has a file for each user; the system's stays closed."""
    system = boot(prepare=storage("persistent"))
    system.container.log_in()
    since_us = stop(system, MIXED, TESTER)
    assert USER_STOP == kinds(read(system, MIXED, since_us, user=TESTER, scope="user"))
    since_us = stop(system, MIXED)
    assert STOP == kinds(read(system, MIXED, since_us))
    answer = read(system, MIXED, since_us, user=TESTER)
    assert READ_HINT == answer["hint"]
    assert answer["error"].startswith("The journal at /var/log/journal/")


def test_forged_record_is_not_believed(boot: Boot) -> None:
    """Of root or of tester, about the system's unit or tester's own."""
    system = boot(prepare=storage("persistent"))
    system.container.log_in()
    expected = {"system": ["stopping", "succeeded", "stopped"], "user": ["stopping", "stopped"]}
    for owner, scope in (("root", "system"), (TESTER, "user")):
        since_us = now_us()
        lie(system, GRACEFUL, "root")
        lie(system, GRACEFUL, TESTER)
        stop(system, GRACEFUL, owner)
        answer = read(system, GRACEFUL, since_us, user=owner, scope=scope)
        assert expected[scope] == kinds(answer)
        told = [record["message"] for record in answer["records"]]
        assert [] == [text for text in told if "Killing" in text]
    logged = system.run(["journalctl", "-q", "-o", "cat", f"UNIT={GRACEFUL}"]).stdout
    assert 4 == logged.count("Killing process 1 (init)")


def test_machine_without_a_journal_says_so(boot: Boot) -> None:
    """Storage=none: journald runs, and keeps nothing."""
    system = boot(prepare=storage("none"))
    answer = read(system, GRACEFUL, 0)
    where = "/run/log/journal or /var/log/journal"
    assert f"There is no journal of this machine in {where}." == answer["error"]


def fake_journalctl(system: System, script: str) -> str:
    """The directory of a journalctl that does something else."""
    place = "/run/sdtool-fake"
    write = f'mkdir -p {place}; printf "%s\\n" "#!/bin/sh" "$1" > {place}/journalctl'
    made = system.run(["sh", "-euc", f"{write}; chmod 755 {place}/journalctl", "sh", script])
    assert 0 == made.status, made.stderr
    return place


def test_silent_journalctl_is_ended(healthy: System) -> None:
    """By its pid, when the time is up; nothing of it stays."""
    path = fake_journalctl(healthy, "exec /usr/bin/sleep 611")
    answer = read(healthy, GRACEFUL, 0, deadline_s=0.2, path=path)
    assert {"error": "journalctl did not answer within 0.2 s.", "hint": None} == answer
    assert 1 == healthy.enter(["pgrep", "-f", "^/usr/bin/sleep 611"]).status


def test_failed_journalctl_says_why(healthy: System) -> None:
    """Its last line, or its status; and the system's word where there is none."""
    script = "echo first >&2; echo 'It broke.' >&2; exit 1"
    answer = read(healthy, GRACEFUL, 0, path=fake_journalctl(healthy, script))
    assert "journalctl failed: It broke." == answer["error"]
    answer = read(healthy, GRACEFUL, 0, path=fake_journalctl(healthy, "exit 3"))
    assert "journalctl failed: status 3." == answer["error"]
    answer = read(healthy, GRACEFUL, 0, path="/nowhere")
    assert "journalctl cannot be run: No such file or directory." == answer["error"]
