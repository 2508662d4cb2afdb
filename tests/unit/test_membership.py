"""The processes of a unit, the units of a list, and the manager of a process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.membership import (
    build_processes,
    explain_process,
    list_units,
    take_census,
)
from sdtool.analysis.ownership import join, name_units_behind
from sdtool.model.process import Disposition, ProcessRef, Role
from sdtool.model.sockets import ListenAddress, ManagersSockets, SocketUnit
from sdtool.model.unit import ListedUnit, ManagerRoots, UnitDetails
from tests.unit.make import GROUP, UNIT, details, facts, list_joined, masks, policy, row, unit

ROOTS = ManagerRoots()
SOCKET_UNIT = SocketUnit(
    name="odd.socket", listens=(ListenAddress(type="Stream", address="127.0.0.1:18"),)
)
PARENTS = (ProcessRef(pid=1, comm="systemd"),)


# Processes -----------------------------------------------------------------------------------


def test_roles_are_the_managers() -> None:
    """MainPID, ControlPID, and the rest."""
    known = details(control_pid=12)
    assert [Role.MAIN, Role.CONTROL, Role.OTHER] == [known.role_of(pid) for pid in (10, 12, 11)]


def test_processes_stand_in_tree_order() -> None:
    """Parents first, siblings by pid, whatever order they came in."""
    rows = [facts(13, 11), facts(12, 10), facts(11, 10), facts(10, 1)]
    assert [10, 11, 13, 12] == [process.pid for process in build_processes(rows, details())]


def test_orphan_of_the_unit_is_adopted() -> None:
    """Its parent ended: it is neither main nor below main."""
    found = build_processes([facts(10, 1), facts(11, 10), facts(12, 1)], details())
    assert {10: False, 11: False, 12: True} == {p.pid: p.adopted for p in found}


def test_control_process_is_not_adopted() -> None:
    """The manager forked it: its parent is outside on purpose."""
    (found,) = build_processes([facts(12, 1)], details(control_pid=12))
    assert (Role.CONTROL, False) == (found.role, found.adopted)


def test_disposition_is_for_the_units_own_signal() -> None:
    """A process that ignores SIGTERM dies of the SIGQUIT that the unit sends."""
    deaf = facts(10, masks=masks(ignored=1 << 14))
    asked = [details(), details(policy=policy(kill_signal="SIGQUIT"))]
    assert [Disposition.IGNORES, Disposition.DIES] == [
        build_processes([deaf], known)[0].disposition for known in asked
    ]


@given(st.lists(st.integers(0, 12), max_size=12))
def test_no_process_is_lost_and_parents_come_first(parents: list[int]) -> None:
    """Any forest is listed whole: pid n has a parent below n, inside or outside."""
    rows = [facts(pid, min(ppid, pid - 1)) for pid, ppid in enumerate(parents, start=1)]
    order = [process.pid for process in build_processes(rows, details())]
    assert sorted(order) == list(range(1, len(parents) + 1))
    place = {pid: index for index, pid in enumerate(order)}
    assert all(place[p.ppid] < place[p.id.pid] for p in rows if p.ppid in place)


# Lists ---------------------------------------------------------------------------------------


USER_MANAGER = "/user.slice/user-0.slice/user@0.service"
APP = f"{USER_MANAGER}/app.slice/app.service"


def listed(roots: ManagerRoots, *names: str) -> dict[str, ListedUnit]:
    """The units of a machine with a service and a user's service, as the host reads them."""
    top = roots.user or "/"
    paths = {1: "/", 2: "/system.slice", 7: GROUP, 8: f"{GROUP}/worker", 9: USER_MANAGER}
    paths |= {10: APP, 11: "/init.scope"}
    pids = {GROUP: (10, 11), f"{GROUP}/worker": (12,), APP: (20,), "/init.scope": (1,)}
    rows = list_joined(
        [unit(name) for name in names],
        {path: found for path, found in pids.items() if path.startswith(top)},
        {key: path for key, path in paths.items() if path.startswith(top)},
        [
            row(port=443),
            row(port=80, cgroup_id=8),
            row(port=53, protocol="udp"),
            row(port=80, address="::1"),
            row(port=8000, cgroup_id=10),
            row(port=18, cgroup_id=11),
            row(port=1, cgroup_id=99),
            row(port=2, cgroup_id=None),
        ],
        (SOCKET_UNIT,),
        roots,
    )
    return {entry.name: entry for entry in rows}


def test_listed_unit_counts_its_whole_subtree() -> None:
    """Processes and ports of a delegated sub-cgroup are the unit's."""
    found = listed(ROOTS, UNIT)[UNIT]
    assert (3, ("53/udp", "80/tcp", "443/tcp"), GROUP) == (
        found.processes,
        found.ports,
        found.control_group,
    )


def test_listed_slice_counts_what_is_below() -> None:
    """A slice has the processes of its units, and the root slice those of all."""
    found = listed(ROOTS, "system.slice", "-.slice", "user@0.service", "init.scope")
    assert {"system.slice": 3, "-.slice": 5, "user@0.service": 1, "init.scope": 1} == {
        name: entry.processes for name, entry in found.items()
    }
    assert "/system.slice" == found["system.slice"].control_group


def test_listed_socket_unit_has_the_port_that_the_manager_opened_for_it() -> None:
    """The manager made the socket; the .socket unit listens on its address."""
    found = listed(ROOTS, "odd.socket", "init.scope")
    assert (("18/tcp",), ()) == (found["odd.socket"].ports, found["init.scope"].ports)


def test_listed_unit_of_a_user_manager_is_told_from_the_systems() -> None:
    """A user's app.service is not the system's of that name: its port is user@0.service's."""
    found = listed(ROOTS, "app.service", "user@0.service")
    assert (0, ()) == (found["app.service"].processes, found["app.service"].ports)
    assert ("8000/tcp",) == found["user@0.service"].ports


def test_census_counts_the_units_of_every_manager_at_once() -> None:
    """A user's unit has its own count, and is counted to the system's user@0.service too."""
    paths = ("/", USER_MANAGER, f"{USER_MANAGER}/app.slice", APP, GROUP)
    found = take_census(paths, {GROUP: (1,), APP: (2, 3)}, (), ROOTS)
    assert {
        ("system", "-.slice"): 3,
        ("system", "system.slice"): 1,
        ("system", UNIT): 1,
        ("system", "user.slice"): 2,
        ("system", "user-0.slice"): 2,
        ("system", "user@0.service"): 2,
        ("user@0.service", "-.slice"): 2,
        ("user@0.service", "app.slice"): 2,
        ("user@0.service", "app.service"): 2,
    } == found.processes
    assert APP == found.groups["user@0.service", "app.service"]
    assert USER_MANAGER == found.groups["user@0.service", "-.slice"]


def test_listed_units_of_two_managers_share_no_name() -> None:
    """A unit of the same name counts for the manager that it is asked of."""
    census = take_census((APP,), {APP: (2, 3)}, (), ROOTS)
    asked = (("system", None), ("user@0.service", "root"))
    rows = [list_units([unit("app.service")], census, *one)[0] for one in asked]
    assert [("system", None, 0), ("user@0.service", "root", 2)] == [
        (found.manager, found.manager_user, found.processes) for found in rows
    ]


def test_socket_of_a_user_manager_is_its_socket_units() -> None:
    """Only the manager that made a socket says which of its units it is for."""
    cgroups = {7: f"{USER_MANAGER}/init.scope"}
    (made,) = join([row(port=18, cgroup_id=7)], cgroups, None, ROOTS)
    assert ["odd.socket", None] == [
        name_units_behind([made], ManagersSockets(manager=manager, units=(SOCKET_UNIT,)))[
            0
        ].socket_unit
        for manager in ("user@0.service", "user@1.service")
    ]


def test_listed_user_unit_is_the_user_managers() -> None:
    """Asked of a user manager, its units are those below its own cgroup."""
    found = listed(ManagerRoots(user=USER_MANAGER), "app.service", UNIT)
    assert (1, ("8000/tcp",), APP) == (
        found["app.service"].processes,
        found["app.service"].ports,
        found["app.service"].control_group,
    )
    assert (0, ()) == (found[UNIT].processes, found[UNIT].ports)


def test_listed_unit_says_what_was_not_read() -> None:
    """A list reads less than a trace: the empty fields have a reason."""
    found = listed(ROOTS, UNIT)[UNIT]
    assert found.main_pid is None
    assert "sdtool trace" in (found.unread_reason or "")


# Owners --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "known", "managed", "word"),
    [
        ({}, details(), True, f"{UNIT} manages it"),
        ({}, None, True, f"{UNIT} manages it"),
        ({"control_group": "/init.scope"}, None, True, "the manager itself"),
        ({"control_group": "/"}, None, False, "no unit has it"),
        ({"control_group": None}, None, False, "hidden from us"),
        ({"control_group": None, "ppid": 2, "argv": None}, None, False, "thread of the kernel"),
        (
            {"control_group": "/user.slice/user-0.slice/session-3.scope"},
            None,
            False,
            "login session 3",
        ),
        ({}, details(unit=unit(active_state="failed")), False, "left over"),
        ({}, details(unit=unit(active_state="inactive")), False, "left over"),
    ],
)
def test_management_is_explained(
    fields: dict[str, Any], known: UnitDetails | None, managed: bool, word: str
) -> None:
    """Yes or no, and in words why."""
    owner = explain_process(facts(**fields), known, None, PARENTS, ROOTS)
    assert managed == owner.managed
    assert word in owner.managed_reason


def test_owner_carries_role_and_ancestry() -> None:
    """The role is the manager's; without the manager there is none."""
    owner = explain_process(facts(), details(), None, PARENTS, ROOTS)
    assert (Role.MAIN, PARENTS, "system.slice") == (owner.role, owner.ancestry, owner.slice)
    assert explain_process(facts(), None, None, PARENTS, ROOTS).role is None


def test_owner_of_a_user_service_has_both_units() -> None:
    """The system manager's unit and the user manager's."""
    path = "/user.slice/user-0.slice/user@0.service/app.slice/app.service"
    owner = explain_process(facts(control_group=path), None, None, PARENTS, ROOTS)
    assert ("user@0.service", "app.service") == (owner.unit, owner.user_unit)
