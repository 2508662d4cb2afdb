"""Bad input and hard days: clear errors, no traceback, no hang, and nothing that lies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sdtool.model.scope import Scope
from tests.system.bench import Bench, Client, flag_of

BUSES = ("SYSTEM", "SESSION")

FLAG = "--SCOPE"
"""Stands for the option that names the manager under test."""


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("trace", "no-such-unit"), 5, "no-such-unit.service"),
        (("stop", "no-such-unit"), 5, "no-such-unit.service"),
        (("ports", "no-such-*"), 5, "no-such-*"),
        (("ports", "no-such-unit"), 5, "no-such-unit.service"),
        (("trace", "no-such-unit", ""), 5, "no-such-unit.service"),
        (("list", "no-such-*"), 5, "no-such-*"),
        (("stop", "no-such-*", "--yes"), 5, "no-such-*"),
        (("pid", "4194303"), 5, "4194303"),
        (("pid", "0"), 2, "0"),
        (("pid", "-1"), 2, "-1"),
        (("pid", "abc"), 2, "abc"),
        (("port", "0"), 2, "0"),
        (("port", "65536"), 2, "65536"),
        (("port", "80/sctp"), 2, "sctp"),
        (("port", "http"), 2, "http"),
        (("list", "--type", "servic"), 2, "servic"),
        (("trace", "a\nb"), 2, "unit name"),
        (("trace", ""), 2, "unit name"),
        (("trace", "x" * 300), 2, "unit name"),
        (("stop", "sdtool-graceful", "--deadline", "-1"), 2, "deadline"),
        (("stop", "sdtool-graceful", "--observers", "magic"), 2, "magic"),
    ],
)
def test_bad_input_gets_one_sentence(
    sdtool: Client, arguments: tuple[str, ...], status: int, word: str
) -> None:
    """A wrong argument ends with its exit status and one sentence that names it."""
    done = sdtool(*arguments)

    assert status == done.returncode
    assert "Traceback" not in done.stderr
    assert word in done.stderr
    assert done.stderr.startswith("sdtool: ")


@pytest.mark.parametrize("arguments", [("port",), ("frob",), ("list", "--frob"), ("pid", "x")])
def test_bad_input_is_json_when_json_was_asked_for(
    sdtool: Client, arguments: tuple[str, ...]
) -> None:
    """With --json anywhere the error stands in the one document on stdout."""
    done = sdtool(*arguments, "--json")

    envelope = json.loads(done.stdout)
    assert (done.returncode, envelope["exit"], envelope["data"]) == (2, 2, [])
    assert len(envelope["errors"]) == 1


def outside(*arguments: str, env: dict[str, str] | None = None) -> CompletedProcess[str]:
    """Run sdtool on the machine itself, not in the private manager."""
    return subprocess.run(
        [sys.executable, "-m", "sdtool", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.capability("unbooted machine")
@pytest.mark.parametrize("scope", ["--user", "--system"])
@pytest.mark.parametrize("command", [("list",), ("trace", "x"), ("stop", "x"), ("doctor",)])
def test_no_manager_is_said_within_five_seconds(
    tmp_path: Path, command: tuple[str, ...], scope: str
) -> None:
    """Where no manager answers, every command says so at once; doctor answers all the same."""
    nowhere = f"unix:path={tmp_path}/nothing"
    env = {
        "PATH": "/usr/bin:/bin",
        "XDG_RUNTIME_DIR": str(tmp_path),
        "DBUS_SYSTEM_BUS_ADDRESS": nowhere,
        "DBUS_SESSION_BUS_ADDRESS": nowhere,
    }
    began = time.monotonic()

    done = outside(*command, scope, env=env)

    assert (1 if command == ("doctor",) else 69) == done.returncode
    assert time.monotonic() - began < 5


@pytest.mark.capability("root")
def test_other_users_learn_the_owner_by_its_cgroup(
    sdtool_as_nobody: Client, systemctl: Client
) -> None:
    """As nobody, the owner of root's port is told by its creator, and the holders are null."""
    systemctl("start", "sdtool-graceful")

    done = sdtool_as_nobody("port", "18080/tcp")

    (entry,) = json.loads(done.stdout)["data"]
    (owner,) = entry["owners"]
    assert ("owned", "creator") == (entry["verdict"], owner["via"])
    assert owner["socket"]["holders"] is None
    assert "CAP_SYS_PTRACE" in owner["socket"]["holders_reason"]


@pytest.mark.capability("root")
@pytest.mark.parametrize(
    ("arguments", "status", "status_of_system"),
    [
        (("list", FLAG), 69, 0),
        (("stop", "sdtool-graceful", FLAG), 69, 4),
        (("pid", "1"), 0, 0),
        (("ports",), 0, 0),
        (("doctor", FLAG), 1, 0),
    ],
)
def test_other_users_get_an_answer_or_a_reason(
    sdtool_as_nobody: Client,
    systemctl: Client,
    manager: Bench,
    arguments: tuple[str, ...],
    status: int,
    status_of_system: int,
) -> None:
    """As nobody every command ends with its document: root's user manager is not theirs."""
    systemctl("start", "sdtool-graceful")

    flag = flag_of(manager)
    done = sdtool_as_nobody(*(flag if word == FLAG else word for word in arguments))

    envelope = json.loads(done.stdout)
    expected = status_of_system if manager.scope is Scope.SYSTEM else status
    assert (expected, expected) == (done.returncode, envelope["exit"])


def test_hostile_names_reach_no_terminal(
    sdtool: Client, systemctl: Client, tmp_path: Path
) -> None:
    """comm, argv and descriptions with escape sequences, newlines and bad bytes come escaped."""
    payload = tmp_path / "hostile"
    payload.write_bytes(
        b"#!/usr/bin/python3\n"
        b"import ctypes, signal, os\n"
        b"ctypes.CDLL(None).prctl(15, b'\\x1b[31mred\\n\\xff', 0, 0, 0)\n"
        b"signal.pause()\n"
    )
    payload.chmod(0o755)
    unit = tmp_path / "sdtool-hostile.service"
    unit.write_bytes(
        b"[Unit]\nDescription=evil \x1b[2J \xe2\x80\xae name\n[Service]\n"
        b"ExecStart=" + bytes(payload) + b' "two\\nlines" "\\x1b]0;title\\x07"\n'
    )
    systemctl("link", "--runtime", str(unit))
    systemctl("start", "sdtool-hostile")
    wait_for_comm(systemctl, "red")

    texts = [
        sdtool("trace", "sdtool-hostile", "--color", "never").stdout,
        sdtool("list", "sdtool-hostile*", "--color", "never").stdout,
        sdtool("stop", "sdtool-hostile", "--color", "never").stdout,
    ]
    systemctl("disable", "--runtime", "sdtool-hostile")

    for text in texts:
        assert "hostile" in text
        assert not {char for char in text if ord(char) < 32} - {"\n"}
        assert "\u202e" not in text


def wait_for_comm(systemctl: Client, part: str) -> None:
    """Wait until the payload has given itself its name."""
    pid = systemctl("show", "-P", "MainPID", "sdtool-hostile").stdout.strip()
    until = time.monotonic() + 10
    while part.encode() not in Path(f"/proc/{pid}/comm").read_bytes():
        assert time.monotonic() < until, "the payload never named itself"


def test_hostile_names_survive_in_json(sdtool: Client, systemctl: Client) -> None:
    """Unicode in a description, and an escaped unit name, come through JSON unchanged."""
    name = "sdtool-odd\\x2dname.service"
    systemctl("start", name)
    expected = systemctl("show", "-P", "Description", name).stdout.rstrip("\n")

    (row,) = json.loads(sdtool("list", name, "--json").stdout)["data"]

    assert (name, expected) == (row["name"], row["description"])


def test_template_and_escaped_names_are_traced(sdtool: Client, systemctl: Client) -> None:
    """An instance and a name with an escape are units like others."""
    names = ["sdtool-template@one.service", "sdtool-odd\\x2dname.service"]
    systemctl("start", *names)

    traces = json.loads(sdtool("trace", *names, "--json").stdout)["data"]

    assert names == [trace["unit"] for trace in traces]
    assert all(trace["processes"] for trace in traces)


def test_units_that_vanish_midway_are_no_traceback(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """Tracing while units come and go ends in answers or clear errors, never in a bug."""
    systemctl_here = f"systemctl {flag_of(manager)}"
    churn = f"while :; do {systemctl_here} start sdtool-template@{{1..4}}; "
    churn += f"{systemctl_here} stop sdtool-template@{{1..4}}; done"
    with subprocess.Popen(
        manager.argv(["bash", "-c", churn]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as churning:
        statuses = {
            sdtool("trace", "sdtool-template@1", "sdtool-template@2").returncode for _ in range(5)
        }
        statuses |= {sdtool("ports").returncode for _ in range(3)}
        churning.kill()

    assert statuses <= {0, 5}


def test_a_closed_pipe_is_no_error(manager: Bench) -> None:
    """``sdtool list | head -1`` ends quietly."""
    command = f"{sys.executable} -m sdtool list --all {flag_of(manager)}"
    words = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"

    done = manager.run(["bash", "-c", words])

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.capability("freezable manager")
def test_a_frozen_manager_is_said_within_its_deadline(sdtool: Client, manager: Bench) -> None:
    """While the manager is stopped by SIGSTOP, list gives up with exit 69."""
    os.kill(manager.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = sdtool("list")
        took = time.monotonic() - began
    finally:
        os.kill(manager.pid, signal.SIGCONT)

    assert done.returncode == 69
    assert took < 6


def test_the_private_socket_serves_where_the_bus_is_gone(manager: Bench) -> None:
    """Without a bus the same answers come over the manager's own socket, stops included."""
    flag = flag_of(manager)
    manager.run(["systemctl", flag, "start", "sdtool-graceful"])
    nowhere = ["env", *(f"DBUS_{bus}_BUS_ADDRESS=unix:path=/nonexistent" for bus in BUSES)]
    command = [*nowhere, sys.executable, "-m", "sdtool"]

    listed = manager.run([*command, "list", "sdtool-graceful", flag, "--json"])
    stopped = manager.run([*command, "stop", "sdtool-graceful", flag, "--json"])

    (unit,) = json.loads(listed.stdout)["data"]
    (report,) = json.loads(stopped.stdout)["data"]
    assert (unit["active_state"], unit["ports"]) == ("active", ["18080/tcp"])
    assert (stopped.returncode, report["verdict"]) == (0, "clean")
    assert "private" in report["observers"][0]["reason"]


def test_ports_of_an_alias_are_those_of_its_unit(sdtool: Client, systemctl: Client) -> None:
    """A name without suffix, or another name of the unit, has the same sockets."""
    systemctl("start", "sdtool-graceful")

    rows = json.loads(sdtool("ports", "sdtool-graceful", "--json").stdout)["data"]

    assert [("sdtool-graceful.service", 18080)] == [
        (row["unit"], row["socket"]["port"]) for row in rows
    ]


@pytest.mark.capability("freezable manager")
def test_a_dead_manager_is_asked_once(sdtool: Client, manager: Bench) -> None:
    """Several pids while the manager is frozen: its deadline is paid once, not for each."""
    os.kill(manager.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = sdtool("pid", "1", "1", "1", "1", "--json")
        took = time.monotonic() - began
    finally:
        os.kill(manager.pid, signal.SIGCONT)

    assert done.returncode == 69
    assert took < 6


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_can_carry_the_answer(
    systemctl: Client, manager: Bench, encoding: str
) -> None:
    """Where the terminal cannot show a character it is escaped, not a bug."""
    name = "sdtool-odd\\x2dname"
    systemctl("start", name)
    command = ["env", f"PYTHONIOENCODING={encoding}", sys.executable, "-m", "sdtool"]

    done = manager.run([*command, "trace", name, "sdtool-forks", flag_of(manager)])

    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    "question", [("port", "18999"), ("ports",), ("port", "--bind", "*:18999")]
)
def test_shortage_of_descriptors_is_no_bug(question: tuple[str, ...]) -> None:
    """RLIMIT_NOFILE: where nothing can be opened it is said, and nothing is guessed."""
    limited = ["sh", "-c", 'ulimit -n "$1"; shift; exec "$@"', "sh"]
    statuses = set()
    for number in range(6, 16):
        command = [*limited, str(number), sys.executable, "-m", "sdtool", *question]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        statuses.add(done.returncode)
        assert "bug" not in done.stderr
    assert {69} < statuses <= {0, 1, 69}


@pytest.mark.capability("root")
@pytest.mark.parametrize("question", ["list", "port 80", "pid 1", "doctor"])
def test_proc_that_is_empty_is_no_bug(manager: Bench, question: str) -> None:
    """It is said in one sentence that the kernel's own files are not there."""
    command = f"{sys.executable} -m sdtool {question} {flag_of(manager)}"
    done = manager.run(["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /proc; {command}"])
    assert (69, "") == (done.returncode, done.stdout)
    assert "sdtool: There is no /proc here.\n(mount -t proc proc /proc)\n" == done.stderr
