"""``list --all-managers``: the system's units and those of every user's manager in one table."""

from __future__ import annotations

from typing import Any

import pytest

from sdtool.sandbox.rootfs import TESTER
from tests.container.system import Result, System
from tests.machine import eventually

USERS = (TESTER, "other")


def uid_of(system: System, user: str) -> str:
    """A user's number."""
    return system.run(["id", "-u", user]).stdout.strip()


def own(system: System, user: str, *command: str) -> Result:
    """Run a user's command for the user's own manager."""
    runtime = f"XDG_RUNTIME_DIR=/run/user/{uid_of(system, user)}"
    return system.run(["runuser", "-u", user, "--", "env", runtime, *command])


def start_managers(system: System) -> None:
    """Have two user managers, and in one a service and a socket with a port each."""
    for user in USERS:
        started = system.run(["systemctl", "start", f"user@{uid_of(system, user)}.service"])
        assert 0 == started.status, started.stderr
    active = own(system, TESTER, "systemctl", "--user", "is-active", "mine.service")
    if active.stdout.strip() != "active":
        begin = ["systemd-run", "--user", "-q", "--collect", "--unit=mine"]
        own(system, TESTER, *begin, "python3", "-m", "http.server", "8811")
        listen = "--socket-property=ListenStream=127.0.0.1:8822"
        begin = ["systemd-run", "--user", "-q", "--unit=duo", listen]
        own(system, TESTER, *begin, "sleep", "1000")
    held = "until ss -Htln | grep -q :8811; do sleep 0.05; done"
    assert 0 == system.run(["timeout", "10", "sh", "-c", held]).status


def listed(system: System, *arguments: str) -> dict[str, Any]:
    """The envelope of a list of all managers."""
    return system.sdtool("list", "--all-managers", *arguments).envelope


def test_units_of_all_managers_are_in_one_table(system: System) -> None:
    """With whose they are, their processes and ports, also of a user's .socket unit."""
    start_managers(system)
    document = listed(system)
    assert (0, []) == (document["exit"], document["errors"])
    tester = f"user@{uid_of(system, TESTER)}.service"
    rows = {(u["manager"], u["name"]): u for u in document["data"]}
    assert len(document["data"]) == len(rows)
    assert {"system", *(f"user@{uid_of(system, user)}.service" for user in USERS)} == {
        manager for manager, _ in rows
    }
    mine, duo = rows[tester, "mine.service"], rows[tester, "duo.socket"]
    assert ("tester", 1, ["8811/tcp"]) == (mine["manager_user"], mine["processes"], mine["ports"])
    assert ["8822/tcp"] == duo["ports"]
    assert {"8811/tcp", "8822/tcp"} <= set(rows["system", tester]["ports"])
    for manager, name in rows:
        assert (manager == "system") == (rows[manager, name]["manager_user"] is None)


def test_counts_are_those_of_the_users_own_list(system: System) -> None:
    """What tester sees with --user is what root sees of tester."""
    start_managers(system)
    tester = uid_of(system, TESTER)
    theirs = own(system, TESTER, "sdtool", "list", "--user", "--json").data
    keys = ("name", "active_state", "processes", "ports", "control_group")
    seen = [u for u in listed(system)["data"] if u["manager"] == f"user@{tester}.service"]
    assert {tuple(map(str, map(u.get, keys))) for u in theirs} == {
        tuple(map(str, map(u.get, keys))) for u in seen
    }


def test_patterns_and_filters_apply_to_each(system: System) -> None:
    """A pattern that matches somewhere is no error; one that matches nowhere is."""
    start_managers(system)
    found = listed(system, "mine", "-t", "service")
    assert (0, ["mine.service"]) == (found["exit"], [u["name"] for u in found["data"]])
    missing = listed(system, "nowhere*")
    assert (5, "NoSuchUnit") == (missing["exit"], missing["errors"][0]["code"])


@pytest.mark.parametrize("frozen", USERS)
def test_frozen_manager_is_an_error_beside_the_others(system: System, frozen: str) -> None:
    """Within five seconds, and with its name; what the others told is whole."""
    start_managers(system)
    managers = {user: f"user@{uid_of(system, user)}.service" for user in USERS}
    silent = managers.pop(frozen)
    pid = system.run(["systemctl", "show", "-P", "MainPID", silent]).stdout.strip()
    assert int(pid) > 0
    system.run(["kill", "-STOP", pid])
    try:
        result = system.sdtool("list", "--all-managers")
    finally:
        system.run(["kill", "-CONT", pid])
    ports = {(u["manager"], u["name"]): u["ports"] for u in result.data}
    listening = {(managers[TESTER], "duo.socket"): ["8822/tcp"]} if TESTER in managers else {}
    assert [("Unavailable", silent)] == [(e["code"], e["subject"]) for e in result.errors]
    assert (69, {"system", *managers.values()}) == (result.status, {one for one, _ in ports})
    assert listening == {key: ports[key] for key in ports if key[1] == "duo.socket"}
    assert result.seconds < 5


def test_manager_on_its_way_down_is_asked(system: System) -> None:
    """The unit that keeps it from ending is in the table."""
    start_managers(system)
    manager = f"user@{uid_of(system, 'other')}.service"
    deaf = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    begin = ["systemd-run", "--user", "-q", "--collect", "--unit=deaf"]
    begun = own(system, "other", *begin, *deaf)
    assert 0 == begun.status, begun.stderr
    system.run(["systemctl", "stop", "--no-block", manager])
    show = ["systemctl", "--user", "show", "-P", "ActiveState", "deaf.service"]
    eventually(lambda: own(system, "other", *show).stdout.strip() == "deactivating")
    try:
        (row,) = listed(system, "deaf.service")["data"]
        assert (manager, "deactivating") == (row["manager"], row["active_state"])
    finally:
        own(system, "other", "systemctl", "--user", "kill", "--signal=KILL", "deaf.service")


def test_all_managers_is_for_root(system: System) -> None:
    """Exit 4 for others, and 2 with --user."""
    denied = system.sdtool("list", "--all-managers", user=TESTER)
    assert (4, "AccessDenied") == (denied.status, denied.errors[0]["code"])
    assert 2 == system.sdtool("list", "--all-managers", "--user").status
