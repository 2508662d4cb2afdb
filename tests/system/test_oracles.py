"""list, trace, port and pid against independent tools that ask the same manager and kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sdtool.model.scope import Scope
from sdtool.sources.cgroups import read_process_cgroup
from tests.system.bench import Bench, Client, cgroupfs_of, flag_of

DEMO_PORTS = [("tcp", 18080), ("tcp", 18081), ("udp", 18081), ("tcp", 18082), ("tcp", 18083)]


def answer(done: Any) -> dict[str, Any]:
    """The envelope on stdout."""
    envelope: dict[str, Any] = json.loads(done.stdout)
    return envelope


def members(manager: Bench, control_group: str) -> set[int]:
    """The pids in a cgroup and all below it, by walking the manager's own cgroup mount."""
    root = cgroupfs_of(manager) / control_group.lstrip("/")
    files = [root / "cgroup.procs", *root.rglob("cgroup.procs")]
    return {int(pid) for file in files for pid in file.read_text().split()}


def test_list_all_equals_systemctl_unit_by_unit(sdtool: Client, systemctl: Client) -> None:
    """Names, descriptions and all three states are those of systemctl list-units --all."""
    systemctl("start", "sdtool-graceful", "sdtool-odd\\x2dname", "sdtool-activated.socket")
    systemctl("start", "sdtool-port-hog", "sdtool-port-clash")
    listing = systemctl("list-units", "--all", "--output=json").stdout
    expected = {
        row["unit"]: (row["load"], row["active"], row["sub"], row["description"])
        for row in json.loads(listing)
    }

    actual = {
        row["name"]: (
            row["load_state"],
            row["active_state"],
            row["sub_state"],
            row["description"],
        )
        for row in answer(sdtool("list", "--all", "--json"))["data"]
    }

    assert expected == actual


def test_list_without_all_equals_systemctl(sdtool: Client, systemctl: Client) -> None:
    """The default choice of units is systemctl's: active, failed, or with a job."""
    systemctl("start", "sdtool-graceful", "sdtool-port-hog", "sdtool-port-clash")
    expected = {row["unit"] for row in json.loads(systemctl("list-units", "-o", "json").stdout)}

    actual = {row["name"] for row in answer(sdtool("list", "--json"))["data"]}

    assert expected == actual


def test_list_counts_the_processes_of_every_cgroup(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """The number of processes is that of cgroup.procs in the unit's cgroup and below."""
    systemctl("start", "sdtool-graceful", "sdtool-forks", "sdtool-template@one")
    rows = answer(sdtool("list", "sdtool-*.service", "--json"))["data"]

    expected = {row["name"]: len(members(manager, row["control_group"])) for row in rows}

    assert expected == {row["name"]: row["processes"] for row in rows}
    assert len(rows) == 3


def test_trace_equals_the_membership_of_the_cgroup(
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """A trace has each process of the cgroup once, and its main process is systemd's."""
    systemctl("start", "sdtool-forks")
    group = systemctl("show", "-P", "ControlGroup", "sdtool-forks").stdout.strip()
    main = int(systemctl("show", "-P", "MainPID", "sdtool-forks").stdout)

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--json"))["data"]

    pids = [process["pid"] for process in trace["processes"]]
    assert members(manager, group) == set(pids)
    assert len(set(pids)) == len(pids)
    assert [main] == [p["pid"] for p in trace["processes"] if p["role"] == "main"]


def test_trace_follows_sub_cgroups(sdtool: Client, systemctl: Client, manager: Bench) -> None:
    """Processes that the unit moved into a cgroup below its own are traced too."""
    systemctl("start", "sdtool-forks")
    group = systemctl("show", "-P", "ControlGroup", "sdtool-forks").stdout.strip()
    pid = max(members(manager, group))
    inner = cgroupfs_of(manager) / group.lstrip("/") / "inner"
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(pid))

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--json"))["data"]

    moved = {p["control_group"] for p in trace["processes"] if p["pid"] == pid}
    assert {f"{group}/inner"} == moved
    assert len(trace["processes"]) == 4


def test_trace_equals_systemd_cgls(sdtool: Client, systemctl: Client, manager: Bench) -> None:
    """The tree of a unit has the processes, with the command lines, that systemd-cgls shows."""
    systemctl("start", "sdtool-forks")
    which = "--unit" if manager.scope is Scope.SYSTEM else "--user-unit"
    shown = manager.run(["systemd-cgls", "--full", "--no-pager", which, "sdtool-forks.service"])
    expected = dict(re.findall(r"^\W*(\d+) (.+)$", shown.stdout, re.MULTILINE))

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--json"))["data"]

    assert expected == {str(p["pid"]): " ".join(p["argv"]) for p in trace["processes"]}
    assert 4 == len(expected)


def test_trace_predicts_each_disposition(sdtool: Client, systemctl: Client) -> None:
    """The children of the demo unit are named by what they do with SIGTERM."""
    systemctl("start", "sdtool-forks")

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--json"))["data"]

    expected = {
        "family": "handles",
        "child-stubborn": "ignores",
        "child-handler": "handles",
        "child-default": "dies",
    }
    assert expected == {p["comm"]: p["disposition"] for p in trace["processes"]}


def ss_listeners() -> dict[tuple[str, int], set[int]]:
    """(protocol, port) -> pids of every listener, by ``ss -lntup``."""
    found: dict[tuple[str, int], set[int]] = {}
    shown = subprocess.run(["ss", "-H", "-lntup"], capture_output=True, text=True, check=True)
    for line in shown.stdout.splitlines():
        fields = line.split()
        port = int(fields[4].rpartition(":")[2])
        pids = {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
        found.setdefault((fields[0], port), set()).update(pids)
    return found


def test_port_agrees_with_ss(sdtool: Client, systemctl: Client) -> None:
    """Each plain TCP and UDP listener of the demo units has the holders that ss names."""
    systemctl("start", "sdtool-graceful", "sdtool-port-hog", "sdtool-activated.socket")
    shown = ss_listeners()
    expected = {key: shown[key] for key in DEMO_PORTS}

    actual = {}
    for protocol, port in expected:
        (entry,) = answer(sdtool("port", f"{port}/{protocol}", "--json"))["data"]
        assert entry["verdict"] == "owned"
        actual[protocol, port] = {
            holder["pid"]
            for owner in here(entry["owners"])
            for holder in owner["socket"]["holders"]
        }

    assert expected == actual


def here(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is in our own network namespace, as ss shows no other: containers have more."""
    own = Path("/proc/self/ns/net").stat().st_ino
    return [row for row in rows if row["socket"]["netns"] == own]


SHARED = "s.listen(); import os; os.fork() or os.fork(); "
REUSED = "s.setsockopt(1, 15, 1); "  # SO_REUSEPORT

LISTENERS = {
    "v4": (18090, "socket(2, 1)", "s.bind(('127.0.0.1', 18090)); s.listen(); "),
    "v4-any": (18091, "socket(2, 1)", "s.bind(('0.0.0.0', 18091)); s.listen(); "),
    "v6": (18092, "socket(10, 1)", "s.bind(('::1', 18092)); s.listen(); "),
    "v6-any": (18093, "socket(10, 1)", "s.bind(('::', 18093)); s.listen(); "),
    "v6-only": (
        18094,
        "socket(10, 1)",
        "s.setsockopt(41, 26, 1); s.bind(('::', 18094)); s.listen(); ",
    ),
    "udp": (18095, "socket(2, 2)", "s.bind(('127.0.0.1', 18095)); "),
    "udp6": (18096, "socket(10, 2)", "s.bind(('::1', 18096)); "),
    "shared": (18097, "socket(2, 1)", f"s.bind(('127.0.0.1', 18097)); {SHARED}"),
    "reused": (
        18098,
        "socket(2, 1)",
        f"import os; os.fork(); s = socket(2, 1); {REUSED}s.bind(('', 18098)); s.listen(); ",
    ),
}
"""Port, socket and what is done to it: the kinds of listeners that ss gets right."""


@pytest.mark.parametrize("kind", LISTENERS)
def test_port_has_the_holders_of_ss(sdtool: Client, manager: Bench, kind: str) -> None:
    """Each kind of listener belongs to its unit, and is held by the processes that ss names."""
    port, made, done = LISTENERS[kind]
    code = f"import time; from socket import *; s = {made}; {done}time.sleep(1000)"
    unit = ["systemd-run", flag_of(manager), "--quiet", "--unit=sdtool-t-port", "/usr/bin/python3"]
    assert 0 == manager.run([*unit, "-c", code]).returncode
    protocol = "udp" if "udp" in kind else "tcp"
    wanted = 3 if kind == "shared" else 2 if kind == "reused" else 1
    expected = wait_for_holders((protocol, port), wanted)

    (entry,) = answer(sdtool("port", f"{port}/{protocol}", "--json"))["data"]

    assert {"sdtool-t-port.service"} == {owner["unit"] for owner in here(entry["owners"])}
    holders = [holder["pid"] for o in here(entry["owners"]) for holder in o["socket"]["holders"]]
    assert expected == set(holders)


def wait_for_holders(key: tuple[str, int], count: int) -> set[int]:
    """Wait until ss names as many holders of a port as there are to be."""
    until = time.monotonic() + 10
    while len(found := ss_listeners().get(key, set())) < count:
        assert time.monotonic() < until, f"ss names {found} only"
    return found


def test_ports_has_every_listener_of_ss(sdtool: Client, systemctl: Client) -> None:
    """The table of all listeners misses none that ss shows, and invents none."""
    systemctl("start", "sdtool-graceful", "sdtool-port-hog", "sdtool-activated.socket")
    rows = answer(sdtool("ports", "--json"))["data"]

    sockets = [row["socket"] for row in here(rows)]
    actual = {(socket["protocol"].removeprefix("mp"), socket["port"]) for socket in sockets}

    assert set(ss_listeners()) == actual


def test_pid_agrees_with_systemctl(sdtool: Client, systemctl: Client, manager: Bench) -> None:
    """The unit of a process is the one that systemctl status PID names."""
    systemctl("start", "sdtool-forks")
    main = systemctl("show", "-P", "MainPID", "sdtool-forks").stdout.strip()

    (owner,) = answer(sdtool("pid", main, "--json"))["data"]

    named = systemctl("status", main).stdout
    unit = owner["unit" if manager.scope is Scope.SYSTEM else "user_unit"]
    assert "sdtool-forks.service" == unit
    assert unit in named.splitlines()[0]
    assert owner["role"] == "main"
    assert owner["managed"] is True


def test_pid_of_a_process_of_another_manager_has_no_unit_of_ours(
    sdtool: Client, manager: Bench
) -> None:
    """This test's own process belongs to no unit of a user manager."""
    (owner,) = answer(sdtool("pid", str(os.getpid()), "--json"))["data"]

    assert owner["user_unit"] is None
    assert owner["ancestry"][0]["pid"] == os.getppid()
    if manager.scope is Scope.SYSTEM:
        own = read_process_cgroup("self")
        assert own is not None
        assert own.endswith(f"/{owner['unit']}")
