"""``list --all-managers``: the system's units and those of every user's manager in one table."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.container.system import Run
from tests.machine import eventually

SDTOOL = ("sdtool",)

USERS = ("tester", "other")


def uid_of(run: Run, user: str) -> str:
    """A user's number."""
    return run(["id", "-u", user]).stdout.strip()


def start_managers(run: Run) -> None:
    """Have two user managers, and in one a service and a socket with a port each."""
    for user in USERS:
        started = run(["systemctl", "start", f"user@{uid_of(run, user)}.service"])
        assert 0 == started.status, started.stderr
    own = [
        "runuser",
        "-u",
        "tester",
        "--",
        "env",
        f"XDG_RUNTIME_DIR=/run/user/{uid_of(run, 'tester')}",
    ]
    if run([*own, "systemctl", "--user", "is-active", "mine.service"]).stdout.strip() != "active":
        serve = ["python3", "-m", "http.server", "8811"]
        run([*own, "systemd-run", "--user", "-q", "--collect", "--unit=mine", *serve])
        listen = "--socket-property=ListenStream=127.0.0.1:8822"
        run([*own, "systemd-run", "--user", "-q", "--unit=duo", listen, "sleep", "1000"])
    held = "until ss -Htln | grep -q :8811; do sleep 0.05; done"
    assert 0 == run(["timeout", "10", "sh", "-c", held]).status


def listed(run: Run, *arguments: str) -> dict[str, Any]:
    """The envelope of a list of all managers."""
    return dict(json.loads(run([*SDTOOL, "list", "--all-managers", "--json", *arguments]).stdout))


def test_units_of_all_managers_are_in_one_table(run: Run) -> None:
    """With whose they are, their processes and ports, also of a user's .socket unit."""
    start_managers(run)
    document = listed(run)
    assert (0, []) == (document["exit"], document["errors"])
    tester = f"user@{uid_of(run, 'tester')}.service"
    rows = {(u["manager"], u["name"]): u for u in document["data"]}
    assert len(document["data"]) == len(rows)
    assert {"system", *(f"user@{uid_of(run, user)}.service" for user in USERS)} == {
        manager for manager, _ in rows
    }
    mine, duo = rows[tester, "mine.service"], rows[tester, "duo.socket"]
    assert ("tester", 1, ["8811/tcp"]) == (mine["manager_user"], mine["processes"], mine["ports"])
    assert ["8822/tcp"] == duo["ports"]
    assert {"8811/tcp", "8822/tcp"} <= set(rows["system", tester]["ports"])
    for manager, name in rows:
        assert (manager == "system") == (rows[manager, name]["manager_user"] is None)


def test_counts_are_those_of_the_users_own_list(run: Run) -> None:
    """What tester sees with --user is what root sees of tester."""
    start_managers(run)
    tester = uid_of(run, "tester")
    own = ["runuser", "-u", "tester", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{tester}"]
    theirs = json.loads(run([*own, *SDTOOL, "list", "--user", "--json"]).stdout)["data"]
    keys = ("name", "active_state", "processes", "ports", "control_group")
    seen = [u for u in listed(run)["data"] if u["manager"] == f"user@{tester}.service"]
    assert {tuple(map(str, map(u.get, keys))) for u in theirs} == {
        tuple(map(str, map(u.get, keys))) for u in seen
    }


def test_patterns_and_filters_apply_to_each(run: Run) -> None:
    """A pattern that matches somewhere is no error; one that matches nowhere is."""
    start_managers(run)
    found = listed(run, "mine", "-t", "service")
    assert (0, ["mine.service"]) == (found["exit"], [u["name"] for u in found["data"]])
    missing = listed(run, "nowhere*")
    assert (5, "NoSuchUnit") == (missing["exit"], missing["errors"][0]["code"])


def test_frozen_manager_is_an_error_beside_the_others(run: Run) -> None:
    """Within five seconds, and with its name."""
    start_managers(run)
    tester, other = (f"user@{uid_of(run, user)}.service" for user in USERS)
    pid = run(["systemctl", "show", "-p", "MainPID", "--value", tester]).stdout.strip()
    assert int(pid) > 0
    run(["kill", "-STOP", pid])
    try:
        began = time.monotonic()
        document = listed(run)
        assert time.monotonic() - began < 5
    finally:
        run(["kill", "-CONT", pid])
    assert [("Unavailable", tester)] == [(e["code"], e["subject"]) for e in document["errors"]]
    assert (69, {"system", other}) == (document["exit"], {u["manager"] for u in document["data"]})


def test_manager_on_its_way_down_is_asked(run: Run) -> None:
    """The unit that keeps it from ending is in the table."""
    start_managers(run)
    uid = uid_of(run, "other")
    manager = f"user@{uid}.service"
    deaf = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    own = ["runuser", "-u", "other", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}"]
    begun = run([*own, "systemd-run", "--user", "-q", "--collect", "--unit=deaf", *deaf])
    assert 0 == begun.status, begun.stderr
    run(["systemctl", "stop", "--no-block", manager])
    down = [*own, "systemctl", "--user", "show", "-p", "ActiveState", "--value", "deaf.service"]
    eventually(lambda: run(down).stdout.strip() == "deactivating")
    try:
        (row,) = listed(run, "deaf.service")["data"]
        assert (manager, "deactivating") == (row["manager"], row["active_state"])
    finally:
        run([*own, "systemctl", "--user", "kill", "--signal=KILL", "deaf.service"])


def test_all_managers_is_for_root(run: Run) -> None:
    """Exit 4 for others, and 2 with --user."""
    command = [*SDTOOL, "list", "--all-managers", "--json"]
    denied = json.loads(run(command, user="tester").stdout)
    assert (4, "AccessDenied") == (denied["exit"], denied["errors"][0]["code"])
    assert 2 == run([*command, "--user"]).status
