"""Which processes does a unit have: in what role, in what order, adopted or not?

And the same question the other way round: who manages a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdtool.analysis.cgroups import INIT_SCOPE, read_container, read_levels, read_path
from sdtool.analysis.phases import ENDED
from sdtool.analysis.ports import explain_passed, port_protocol, socket_owners
from sdtool.analysis.signals import predict
from sdtool.model.ports import ListeningSocket
from sdtool.model.process import Process, ProcessFacts, ProcessOwner, ProcessRef, Role
from sdtool.model.scope import Scope, is_foreign
from sdtool.model.sockets import Socket
from sdtool.model.unit import (
    CgroupOwner,
    ListedUnit,
    ListFilter,
    ManagerRoots,
    Unit,
    UnitDetails,
)

DEFAULT_KILL_SIGNAL = "SIGTERM"

UnitKey = tuple[str, str]
"""(manager, unit): every user manager has an app.slice."""

Levels = Sequence[tuple[str, Sequence[str]]]
"""The units of each manager that a cgroup is in, as ``read_levels`` gives them."""

NOT_READ = "a list reads what one sweep gives; sdtool trace UNIT reads the rest"


def build_processes(facts: Sequence[ProcessFacts], details: UnitDetails) -> tuple[Process, ...]:
    """The processes of a unit in tree order: parents first, siblings by pid."""
    signal = details.policy.kill_signal if details.policy else DEFAULT_KILL_SIGNAL
    pids = {process.id.pid for process in facts}
    return tuple(
        _build_process(process, details.role_of(process.id.pid), signal, process.ppid in pids)
        for process in _in_tree_order(facts)
    )


def _in_tree_order(facts: Sequence[ProcessFacts]) -> list[ProcessFacts]:
    children: dict[int, list[ProcessFacts]] = {}
    pids = {process.id.pid for process in facts}
    for process in sorted(facts, key=lambda p: p.id.pid):
        parent = process.ppid if process.ppid in pids else 0
        children.setdefault(parent, []).append(process)
    ordered: dict[int, ProcessFacts] = {}
    waiting = children.get(0, [])[::-1]
    while waiting:
        process = waiting.pop()
        ordered[process.id.pid] = process
        waiting.extend(children.get(process.id.pid, [])[::-1])
    # Parents that changed while they were read can make a circle: nobody is left out for that.
    return [*ordered.values(), *(p for p in facts if p.id.pid not in ordered)]


def _build_process(facts: ProcessFacts, role: Role, signal: str, parent_in_unit: bool) -> Process:
    disposition, reason = predict(facts, signal)
    return Process(
        pid=facts.id.pid,
        start_ticks=facts.id.start_ticks,
        ppid=facts.ppid,
        comm=facts.comm,
        argv=facts.argv,
        user=facts.user,
        state=facts.state,
        role=role,
        control_group=facts.control_group,
        cpu_us=facts.cpu_us,
        rss_bytes=facts.rss_bytes,
        adopted=role is Role.OTHER and not parent_in_unit,
        disposition=disposition,
        disposition_reason=reason,
        unread_reason=facts.unread_reason,
        container=read_container(facts.control_group or ""),
    )


def wants(filters: ListFilter, unit: Unit) -> bool:
    """Whether a unit is to be listed, as systemctl list-units decides it."""
    if filters.types and unit.unit_type not in filters.types:
        return False
    if filters.states:
        return not {unit.load_state, unit.active_state, unit.sub_state}.isdisjoint(filters.states)
    if filters.everything:
        return True
    if unit.following is not None:
        return False
    return unit.job is not None or unit.active_state != "inactive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What one sweep says of the units of all managers, by (manager, unit).

    Attributes:
        groups: The cgroup of each.
        processes: How many there are in it and below it.
        processes_reason: Why that is known of none; None when it is known.
        ports: The listening ports that it owns.
        ports_reason: Why that is known of none; None when it is known.
        hidden_ports: Units of which none may be known for another reason, and that reason.
        socket_doubt: Why it is not known of .socket units; None when it is known.
    """

    groups: Mapping[UnitKey, str]
    processes: Mapping[UnitKey, int]
    processes_reason: str | None
    ports: Mapping[UnitKey, tuple[str, ...]]
    ports_reason: str | None
    hidden_ports: Mapping[UnitKey, str]
    socket_doubt: str | None


def take_census(
    cgroups: Iterable[str],
    members: Mapping[str, Sequence[int]],
    listeners: Iterable[Socket],
    roots: ManagerRoots,
    *,
    processes_reason: str | None = None,
    ports_reason: str | None = None,
    unseen: Mapping[int, str] | None = None,
    socket_doubt: str | None = None,
) -> Census:
    """Count processes and ports for the units of every manager.

    Args:
        cgroups: The paths of all cgroups.
        members: Cgroup path -> pids.
        listeners: Listening sockets joined with their owners.
        processes_reason: Why there are no ``members``, where they could not be read.
        ports_reason: Why there are no ``listeners``, where their owners are not known.
        unseen: Processes that may have sockets that were not seen, by pid, and why that is so.
        socket_doubt: Why managers may hold sockets for .socket units that are not known.
    """
    listeners = tuple(listeners)
    levels = {path: read_levels(path, roots) for path in dict.fromkeys((*cgroups, *members))}
    processes = _count_processes(members, levels)
    passed = {
        (socket.behind_manager or "", name): why
        for socket in listeners
        for name, why in explain_passed([socket]).items()
        if (socket.behind_manager or "", name) in processes
    }
    return Census(
        groups=_control_groups(levels),
        processes=processes,
        processes_reason=processes_reason,
        ports=_ports_by_unit(listeners),
        ports_reason=ports_reason,
        hidden_ports=passed | _hidden_ports(members, levels, unseen or {}),
        socket_doubt=socket_doubt,
    )


def _hidden_ports(
    members: Mapping[str, Sequence[int]], levels: Mapping[str, Levels], unseen: Mapping[int, str]
) -> dict[UnitKey, str]:
    found: dict[UnitKey, str] = {}
    for path, pids in members.items():
        reasons = [unseen[pid] for pid in pids if pid in unseen]
        for manager, names in levels[path] if reasons else ():
            found.setdefault((manager, names[-1]), reasons[0])
    return found


def list_units(
    units: Iterable[Unit], census: Census, manager: str, user: str | None = None
) -> tuple[ListedUnit, ...]:
    """The units of one manager with their number of processes and the ports they own.

    Args:
        manager: As in ``CgroupOwner.manager``.
        user: Whose manager it is.
    """
    return tuple(_list_unit(unit, census, manager, user) for unit in units)


def _list_unit(unit: Unit, census: Census, manager: str, user: str | None) -> ListedUnit:
    key = manager, unit.name
    no_processes = census.processes_reason
    ports = census.ports.get(key, ())
    no_ports = census.ports_reason or (None if ports else _doubt_ports(unit, census, key))
    return ListedUnit(
        name=unit.name,
        description=unit.description,
        load_state=unit.load_state,
        active_state=unit.active_state,
        sub_state=unit.sub_state,
        control_group=census.groups.get(key),
        job=unit.job,
        following=unit.following,
        manager=manager,
        manager_user=user,
        processes=None if no_processes else census.processes.get(key, 0),
        processes_reason=no_processes,
        ports=None if no_ports else ports,
        ports_reason=no_ports,
        unread_reason=NOT_READ,
    )


def _doubt_ports(unit: Unit, census: Census, key: UnitKey) -> str | None:
    """Why a unit of which no port was found may have one all the same."""
    if unit.unit_type == "socket" and unit.active_state not in ENDED:
        return census.socket_doubt
    return census.hidden_ports.get(key)


def _count_processes(
    members: Mapping[str, Sequence[int]], levels: Mapping[str, Levels]
) -> Mapping[UnitKey, int]:
    processes: Counter[UnitKey] = Counter()
    for path, pids in members.items():
        for manager, names in levels[path]:
            for name in names:
                processes[manager, name] += len(pids)
    return processes


def _control_groups(levels: Mapping[str, Levels]) -> dict[UnitKey, str]:
    """Unit -> its own cgroup: the shortest path that belongs to it."""
    groups: dict[UnitKey, str] = {}
    for path in sorted(levels, key=len):
        for manager, names in levels[path]:
            groups.setdefault((manager, names[-1]), path)
    return groups


def _ports_by_unit(sockets: Iterable[Socket]) -> dict[UnitKey, tuple[str, ...]]:
    found: dict[UnitKey, set[tuple[int, str]]] = {}
    for socket in sockets:
        for owner in socket_owners(socket):
            for key in _keys(owner.manager, owner.unit):
                if socket.port is not None:
                    found.setdefault(key, set()).add((socket.port, port_protocol(socket)))
    return {
        key: tuple(f"{port}/{protocol}" for port, protocol in sorted(rows))
        for key, rows in found.items()
    }


def _keys(manager: str | None, unit: str | None) -> list[UnitKey]:
    """The unit, and the system's unit whose part it is where its manager is a user's."""
    if manager is None or unit is None:
        return []
    outer: list[UnitKey] = [(Scope.SYSTEM, manager)] if is_foreign(manager) else []
    return [*outer, (manager, unit)]


def asked_unit(unit: str | None, manager: str | None, roots: ManagerRoots) -> str | None:
    """What the asked manager calls the unit of any manager; None when it is not below it.

    For the system manager the unit of a user is a part of that user's user@UID.service.
    """
    if roots.user is not None:
        return unit if manager == Scope.USER else None
    return unit if manager == Scope.SYSTEM else manager


def filter_listeners(
    rows: Iterable[ListeningSocket], units: Collection[str], roots: ManagerRoots
) -> tuple[ListeningSocket, ...]:
    """Those that belong to one of the units of the asked manager."""
    return tuple(row for row in rows if asked_unit(row.unit, row.manager, roots) in units)


def explain_process(
    facts: ProcessFacts,
    details: UnitDetails | None,
    not_asked: str | None,
    ancestry: tuple[ProcessRef, ...],
    roots: ManagerRoots,
) -> ProcessOwner:
    """Who manages a process, from its cgroup and from what the manager says of its unit.

    Args:
        details: Its unit in the asked manager; None when it has none or nobody could be asked.
        not_asked: Why nobody could be asked.
    """
    path = facts.control_group or "/"
    owner = read_path(path, roots)
    managed, reason = _explain_management(facts, owner, details, path)
    return ProcessOwner(
        pid=facts.id.pid,
        comm=facts.comm,
        unit=owner.unit,
        user_unit=owner.user_unit,
        slice=owner.slice,
        session=owner.session,
        container=read_container(path),
        role=details.role_of(facts.id.pid) if details else None,
        role_reason=None if details else not_asked or "no unit of the asked manager has it",
        managed=managed,
        managed_reason=reason,
        ancestry=ancestry,
    )


def _explain_management(
    facts: ProcessFacts, owner: CgroupOwner, details: UnitDetails | None, path: str
) -> tuple[bool, str]:
    if 2 in (facts.id.pid, facts.ppid) and facts.argv is None:
        return False, "it is a thread of the kernel"
    if facts.control_group is None:
        return False, "its cgroup is hidden from us, or outside our cgroup namespace"
    if owner.session is not None:
        return False, f"it runs in login session {owner.session}: started from a terminal there"
    if owner.innermost is None:
        return False, f"no unit has it: its cgroup is {path}"
    if details is not None and details.unit.active_state in ENDED:
        state = details.unit.active_state
        return False, f"it is left over: {details.unit.name} is {state}"
    if owner.innermost == INIT_SCOPE:
        return True, "it is the manager itself, or started by it outside every unit"
    return True, f"{owner.innermost} manages it"
