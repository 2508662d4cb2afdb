"""list, trace and pid: units and the processes in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sdtool.analysis import membership, ownership
from sdtool.errors import InvalidArgument, NoSuchProcess, NoSuchUnit, SdtoolError
from sdtool.host.ports import own_sockets, read_socket_units
from sdtool.host.session import Session
from sdtool.model.answer import Answer
from sdtool.model.names import UNIT_TYPES, is_glob, unit_name
from sdtool.model.process import ProcessFacts, ProcessOwner
from sdtool.model.scope import Scope
from sdtool.model.sockets import HolderScan
from sdtool.model.unit import ListedUnit, Trace, Unit, UnitDetails
from sdtool.sources import cgroups, processes, sockets


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFilter:
    """Which units to list, with the meaning of systemctl's options.

    Attributes:
        types: Unit types (service, socket ...); empty for all.
        states: Load, active or sub states; empty for all that are not inactive.
        everything: Inactive units and units that follow another one too.
    """

    types: Collection[str] = ()
    states: Collection[str] = ()
    everything: bool = False

    def __post_init__(self) -> None:
        """Refuse a type that systemd does not have.

        Raises:
            InvalidArgument: An unknown type.
        """
        for kind in set(self.types) - UNIT_TYPES:
            raise InvalidArgument(
                f"{kind} is no unit type.", subject=kind, hint=", ".join(sorted(UNIT_TYPES))
            )

    def wants(self, unit: Unit) -> bool:
        """Whether the unit is to be shown."""
        if self.types and unit.unit_type not in self.types:
            return False
        if self.states:
            return not {unit.load_state, unit.active_state, unit.sub_state}.isdisjoint(self.states)
        if self.everything:
            return True
        if unit.following is not None:
            return False
        return unit.job is not None or unit.active_state != "inactive"


async def list_units(
    session: Session, patterns: Sequence[str], filters: ListFilter
) -> tuple[ListedUnit, ...]:
    """The units that the patterns and filters leave, with their processes and ports."""
    manager = await session.manager()
    wanted = [text if is_glob(text) else unit_name(text) for text in patterns]
    units = await manager.list_units(wanted)
    if patterns and not units:
        raise _nothing_matches(patterns)
    roots = await session.roots()
    tree = cgroups.read_tree(session.mount, roots.user or roots.system)
    listeners = sockets.read_listeners()
    return membership.list_units(
        filter(filters.wants, units),
        tree.members,
        tree.paths,
        listeners,
        await read_socket_units(session, listeners, tree.paths, HolderScan()),
        roots,
    )


def _nothing_matches(patterns: Sequence[str]) -> NoSuchUnit:
    return NoSuchUnit(
        f"No loaded unit matches {', '.join(patterns)}.",
        subject=patterns[0],
        hint="sdtool list --all shows the loaded units",
    )


async def resolve(session: Session, arguments: Sequence[str]) -> Answer[str]:
    """The unit names that arguments stand for, each once, in the order asked.

    Globs match loaded units only, as in systemctl.
    """
    names: dict[str, None] = {}
    errors: list[SdtoolError] = []
    for text in arguments:
        try:
            names |= dict.fromkeys(await _resolve_one(session, text))
        except (NoSuchUnit, InvalidArgument) as error:
            errors.append(error)
    return Answer(data=tuple(names), errors=tuple(errors))


async def _resolve_one(session: Session, text: str) -> list[str]:
    if not is_glob(text):
        return [unit_name(text)]
    manager = await session.manager()
    units = await manager.list_units([text])
    if not units:
        raise _nothing_matches([text])
    return [unit.name for unit in units]


async def trace_unit(session: Session, name: str) -> Trace:
    """One unit with its process tree and sockets.

    Raises:
        NoSuchUnit: There is no such unit.
    """
    manager = await session.manager()
    details = await manager.read_unit(name)
    group = details.unit.control_group
    facts = _read_members(session, group) if group else ()
    found, reason = await own_sockets(session, group, facts)
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
    found = (processes.read_detailed(pid) for pid in sorted(pids))
    return tuple(process for process in found if process is not None)


async def explain_pid(session: Session, pid: int) -> ProcessOwner:
    """Who manages one process.

    Raises:
        NoSuchProcess: It is gone, or never was.
    """
    facts = processes.read_detailed(pid)
    if facts is None:
        raise NoSuchProcess(f"There is no process {pid}.", subject=str(pid))
    roots = await session.roots()
    owner = ownership.read_path(facts.control_group or "/", roots)
    name = owner.user_unit if session.scope is Scope.USER else owner.unit
    return membership.explain_process(
        facts,
        await _read_unit_if_possible(session, name),
        tuple(processes.read_ancestry(pid)),
        roots,
    )


async def _read_unit_if_possible(session: Session, name: str | None) -> UnitDetails | None:
    """The unit, or None when the manager cannot be asked: the cgroup has told the most."""
    if name is None:
        return None
    try:
        return await (await session.manager()).read_unit(name)
    except SdtoolError:
        return None
