"""list, trace, port and pid against independent tools that ask the same manager and kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from sdtool.sandbox import PrivateManager
from tests.system.conftest import Client

DEMO_PORTS = [("tcp", 18080), ("tcp", 18081), ("udp", 18081), ("tcp", 18082), ("tcp", 18083)]


def answer(done: Any) -> dict[str, Any]:
    """The envelope on stdout."""
    envelope: dict[str, Any] = json.loads(done.stdout)
    return envelope


def members(manager: PrivateManager, control_group: str) -> set[int]:
    """The pids in a cgroup and all below it, by walking the manager's own cgroup mount."""
    root = Path(f"/proc/{manager.pid}/root/sys/fs/cgroup") / control_group.lstrip("/")
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
        for row in answer(sdtool("list", "--all", "--user", "--json"))["data"]
    }

    assert expected == actual


def test_list_without_all_equals_systemctl(sdtool: Client, systemctl: Client) -> None:
    """The default choice of units is systemctl's: active, failed, or with a job."""
    systemctl("start", "sdtool-graceful", "sdtool-port-hog", "sdtool-port-clash")
    expected = {row["unit"] for row in json.loads(systemctl("list-units", "-o", "json").stdout)}

    actual = {row["name"] for row in answer(sdtool("list", "--user", "--json"))["data"]}

    assert expected == actual


def test_list_counts_the_processes_of_every_cgroup(
    sdtool: Client, systemctl: Client, manager: PrivateManager
) -> None:
    """The number of processes is that of cgroup.procs in the unit's cgroup and below."""
    systemctl("start", "sdtool-graceful", "sdtool-forks", "sdtool-template@one")
    rows = answer(sdtool("list", "sdtool-*.service", "--user", "--json"))["data"]

    expected = {row["name"]: len(members(manager, row["control_group"])) for row in rows}

    assert expected == {row["name"]: row["processes"] for row in rows}
    assert len(rows) == 3


def test_trace_equals_the_membership_of_the_cgroup(
    sdtool: Client, systemctl: Client, manager: PrivateManager
) -> None:
    """A trace has each process of the cgroup once, and its main process is systemd's."""
    systemctl("start", "sdtool-forks")
    group = systemctl("show", "-P", "ControlGroup", "sdtool-forks").stdout.strip()
    main = int(systemctl("show", "-P", "MainPID", "sdtool-forks").stdout)

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--user", "--json"))["data"]

    pids = [process["pid"] for process in trace["processes"]]
    assert members(manager, group) == set(pids)
    assert len(set(pids)) == len(pids)
    assert [main] == [p["pid"] for p in trace["processes"] if p["role"] == "main"]


def test_trace_follows_sub_cgroups(
    sdtool: Client, systemctl: Client, manager: PrivateManager
) -> None:
    """Processes that the unit moved into a cgroup below its own are traced too."""
    systemctl("start", "sdtool-forks")
    group = systemctl("show", "-P", "ControlGroup", "sdtool-forks").stdout.strip()
    pid = max(members(manager, group))
    inner = Path(f"/proc/{manager.pid}/root/sys/fs/cgroup") / group.lstrip("/") / "inner"
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(pid))

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--user", "--json"))["data"]

    moved = {p["control_group"] for p in trace["processes"] if p["pid"] == pid}
    assert {f"{group}/inner"} == moved
    assert len(trace["processes"]) == 4


def test_trace_predicts_each_disposition(sdtool: Client, systemctl: Client) -> None:
    """The children of the demo unit are named by what they do with SIGTERM."""
    systemctl("start", "sdtool-forks")

    (trace,) = answer(sdtool("trace", "sdtool-forks", "--user", "--json"))["data"]

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
        (entry,) = answer(sdtool("port", f"{port}/{protocol}", "--user", "--json"))["data"]
        assert entry["verdict"] == "owned"
        actual[protocol, port] = {
            holder["pid"] for owner in entry["owners"] for holder in owner["socket"]["holders"]
        }

    assert expected == actual


def test_ports_has_every_listener_of_ss(sdtool: Client, systemctl: Client) -> None:
    """The table of all listeners misses none that ss shows, and invents none."""
    systemctl("start", "sdtool-graceful", "sdtool-port-hog", "sdtool-activated.socket")
    rows = answer(sdtool("ports", "--user", "--json"))["data"]

    actual = {(row["socket"]["protocol"], row["socket"]["port"]) for row in rows}

    assert set(ss_listeners()) == {key for key in actual if key[0] != "mptcp"}


def test_pid_agrees_with_systemctl(sdtool: Client, systemctl: Client) -> None:
    """The unit of a process is the one that systemctl whoami or status names."""
    systemctl("start", "sdtool-forks")
    main = systemctl("show", "-P", "MainPID", "sdtool-forks").stdout.strip()

    (owner,) = answer(sdtool("pid", main, "--user", "--json"))["data"]

    named = systemctl("status", main).stdout
    assert owner["user_unit"] == "sdtool-forks.service"
    assert owner["user_unit"] in named.splitlines()[0]
    assert owner["role"] == "main"
    assert owner["managed"] is True


def test_pid_of_a_process_outside_every_unit_is_not_managed(sdtool: Client) -> None:
    """This test's own process belongs to no unit of the private manager."""
    (owner,) = answer(sdtool("pid", str(os.getpid()), "--user", "--json"))["data"]

    assert owner["user_unit"] is None
    assert owner["ancestry"][0]["pid"] == os.getppid()
