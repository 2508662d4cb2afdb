"""list, trace and pid: units and the processes in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sdtool.analysis import membership, ports
from sdtool.analysis.cgroups import INIT_SCOPE, read_path
from sdtool.analysis.membership import Census
from sdtool.analysis.ownership import explain_no_owners, name_units_behind
from sdtool.errors import AccessDenied, InvalidArgument, NoSuchProcess, SdtoolError
from sdtool.host.asking import nothing_matches
from sdtool.host.ports import own_sockets, read_listeners
from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.answer import Answer
from sdtool.model.names import UNIT_TYPES, is_glob, unit_name
from sdtool.model.process import ProcessFacts, ProcessOwner
from sdtool.model.scope import Scope
from sdtool.model.sockets import ManagersSockets, SocketUnit
from sdtool.model.unit import ListedUnit, ListFilter, Trace, UnitDetails
from sdtool.sources import cgroups, processes
from sdtool.sources.namespaces import ENTER_HINT
from sdtool.sources.processes import read_user_name
from sdtool.sources.reach import read_manager_pid

CLOSED = "its network namespace may not be entered"


async def list_units(
    session: Session, patterns: Sequence[str], filters: ListFilter
) -> Answer[ListedUnit]:
    """The units that the patterns and filters leave, with their processes and ports.

    Raises:
        InvalidArgument: An unknown unit type.
        NoSuchUnit: No loaded unit matches the patterns.
    """
    require_known_types(filters)
    manager = await session.manager()
    units = await manager.list_units(unit_patterns(patterns))
    if patterns and not units:
        raise nothing_matches(patterns)
    census, notes = await read_census(session, {})
    wanted = [unit for unit in units if membership.wants(filters, unit)]
    user = read_user_name(os.getuid()) if session.scope is Scope.USER else None
    rows = membership.list_units(wanted, census, session.scope, user)
    return Answer(data=rows, notes=notes)


async def read_census(
    session: Session, socket_units: Mapping[str, Sequence[SocketUnit]]
) -> tuple[Census, tuple[str, ...]]:
    """Processes and ports of all units of the manager, and of those below it, in one sweep.

    Args:
        socket_units: Those of user managers, by the user@UID.service that runs each.

    Returns:
        The census, and what it may lack.
    """
    roots = await session.roots()
    top = roots.user or roots.system
    # A mount namespace of our own can show another hierarchy than the manager's.
    if not cgroups.exists(session.mount, f"{top.rstrip('/')}/{INIT_SCOPE}"):
        unseen = f"the cgroups mounted at {session.mount.path} are not those of the manager"
        none = membership.take_census(
            (), {}, (), roots, processes_reason=unseen, ports_reason=unseen
        )
        return none, ()
    tree = cgroups.read_tree(session.mount, top)
    survey = Survey(session)
    if top == "/":
        survey.ids = tree.ids  # the whole has been walked already
    listeners = await read_listeners(survey, managers=[session.scope])
    for manager, units in socket_units.items():
        pid = read_manager_pid(manager)
        behind = ManagersSockets(manager=manager, pid=pid, units=tuple(units))
        listeners = name_units_behind(listeners, behind)
    rows = ports.name_listeners(listeners)
    # As in ``ports UNIT``: what nobody is known to own may be of whom we cannot look into.
    doubt = ports.explain_unowned(rows) or survey.reason
    hidden: dict[int, str] = dict.fromkeys(survey.sweep.hidden, doubt) if doubt else {}
    hidden |= dict.fromkeys(survey.unseen_pids, f"{CLOSED}: {ENTER_HINT}")
    census = membership.take_census(
        tree.paths,
        tree.members,
        listeners,
        roots,
        ports_reason=explain_no_owners(listeners),
        unseen=hidden,
        socket_doubt=ports.explain_unexplained(rows) or doubt,
    )
    return census, survey.unasked


def unit_patterns(patterns: Sequence[str]) -> list[str]:
    """Patterns as the manager takes them: ``.service`` is implied for a name."""
    return [text if is_glob(text) else unit_name(text) for text in patterns]


def require_known_types(filters: ListFilter) -> None:
    """Refuse a type that no unit can have.

    Raises:
        InvalidArgument: There is one.
    """
    for kind in sorted(set(filters.types) - UNIT_TYPES):
        raise InvalidArgument(
            f"{kind} is no unit type.", subject=kind, hint=", ".join(sorted(UNIT_TYPES))
        )


async def trace_unit(session: Session, name: str) -> Trace:
    """One unit with its process tree and sockets.

    Raises:
        NoSuchUnit: There is no such unit.
    """
    manager = await session.manager()
    details = await manager.read_unit(name)
    group = details.unit.control_group
    facts = _read_members(session, group) if group else ()
    found, reason = await own_sockets(session, details.unit, facts)
    return Trace(
        unit=details.unit.name,
        status=details.unit,
        policy=details.policy,
        processes=membership.build_processes(facts, details),
        sockets=found,
        sockets_reason=reason,
        triggered_by=details.triggered_by,
    )


def _read_members(session: Session, group: str) -> tuple[ProcessFacts, ...]:
    pids = cgroups.read_pids(session.mount, group)
    read = (processes.read_detailed(pid) for pid in sorted(pids))
    found = [process for process in read if process is not None]
    frozen = cgroups.read_frozen(session.mount, (process.control_group for process in found))
    return tuple(replace(p, frozen=p.control_group in frozen) for p in found)


async def explain_pid(session: Session, pid: int) -> ProcessOwner:
    """Who manages one process.

    Raises:
        AccessDenied: It is there, and hidden from us.
        NoSuchProcess: It is gone, or never was.
    """
    process = processes.read_thread_group(pid)
    if process not in (None, pid):
        raise NoSuchProcess(
            f"{pid} is a thread of process {process}.",
            subject=str(pid),
            hint=f"sdtool pid {process}",
        )
    if processes.is_hidden(pid):
        raise AccessDenied(
            f"Process {pid} is hidden: {processes.HIDDEN}.", subject=str(pid), hint="run as root"
        )
    facts = processes.read_detailed(pid)
    if facts is None:
        raise NoSuchProcess(f"There is no process {pid}.", subject=str(pid))
    roots = await session.roots()
    owner = read_path(facts.control_group or "/", roots)
    details, not_asked = await _read_unit_if_possible(
        session, membership.asked_unit(owner.innermost, owner.manager, roots)
    )
    ancestry = tuple(processes.read_ancestry(pid))
    return membership.explain_process(facts, details, not_asked, ancestry, roots)


async def _read_unit_if_possible(
    session: Session, name: str | None
) -> tuple[UnitDetails | None, str | None]:
    """The unit, or why the manager could not be asked: the cgroup has told the most."""
    if name is None:
        return None, None
    try:
        return await (await session.manager()).read_unit(name), None
    except SdtoolError as error:
        return None, str(error)
