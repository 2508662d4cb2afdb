"""port, ports, and the sockets of a trace: sockets joined with creators and holders."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from sdtool.analysis import membership, ownership, ports, published
from sdtool.host.asking import ask_each
from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.answer import Answer
from sdtool.model.binding import BindSpec
from sdtool.model.ports import ListeningSocket, PortOwnership, PortSpec
from sdtool.model.process import ProcessFacts
from sdtool.model.sockets import (
    HolderScan,
    Socket,
    SocketFacts,
    SocketFilter,
    SocketStates,
    inodes_of,
    owns_port,
)
from sdtool.model.unit import Unit, UnitDetails
from sdtool.sources import cgroups, processes
from sdtool.sources.descriptors import Sweep

PROTOCOLS = {"tcp": ("tcp", "mptcp"), "udp": ("udp",), None: ("tcp", "mptcp", "udp")}
EVERY_PROTOCOL = (*PROTOCOLS[None], "unix")


async def own_ports(
    session: Session, specs: Sequence[PortSpec], *, all_holders: bool = False
) -> Answer[PortOwnership]:
    """Who owns each port, each asked about once.

    Each is looked for anew: a manager that is asked about the one before may take its time, and
    what was read until then be no longer true.

    Args:
        all_holders: Look at every process, also where those of the creator hold the socket; and
            for sockets that are bound beside one that listens.
    """
    answers = await ask_each(
        dict.fromkeys(specs), lambda spec: _own_port(session, spec, all_holders)
    )
    notes = dict.fromkeys(note for answer in answers.data for note in answer.notes)
    found = tuple(entry for answer in answers.data for entry in answer.data)
    return Answer(data=found, errors=answers.errors, notes=tuple(notes))


async def _own_port(session: Session, spec: PortSpec, all_holders: bool) -> Answer[PortOwnership]:
    wanted = SocketFilter(protocols=PROTOCOLS[spec.protocol], port=spec.port)
    survey = Survey(session)
    found = () if all_holders else await _find_likely_owners(session, survey, spec, wanted)
    if not ports.is_settled(spec, found):
        # Nobody is known to have it: before that is said, look anew, and where it costs more.
        survey = Survey(session)
        found = await _find_all_owners(survey, spec, wanted)
    targets = await _read_targets(survey, published.proxies_of(found))
    named = tuple(published.name_published(entry, targets) for entry in found)
    return Answer(data=named, notes=survey.unasked)


async def _read_targets(survey: Survey, proxies: Sequence[int]) -> published.Targets:
    """Where proxies hand on to, with the sockets there."""
    targets = {}
    for pid in proxies:
        target = published.parse_proxy(processes.read_argv(pid) or ())
        if target is not None:
            wanted = SocketFilter(protocols=PROTOCOLS[target.protocol], port=target.port)
            rows = survey.read_at(target.address, wanted)
            scan = survey.sweep.holders_of(inodes_of(rows))
            targets[pid] = target, await survey.join(rows, scan)
    return targets


async def _find_likely_owners(
    session: Session, survey: Survey, spec: PortSpec, wanted: SocketFilter
) -> tuple[PortOwnership, ...]:
    """Who owns the port, as far as that is seen at first sight."""
    rows = survey.read(replace(wanted, states=SocketStates.OWNING))
    joined = await survey.join(rows, _scan_likely_holders(session, survey, rows))
    return ports.judge_port(spec, joined, survey.reason, at_first_sight=True)


async def _find_all_owners(
    survey: Survey, spec: PortSpec, wanted: SocketFilter
) -> tuple[PortOwnership, ...]:
    rows = survey.read(wanted) + survey.read_deeper(wanted)
    rows = rows or survey.read(wanted)  # what changed its state while it was looked for
    joined = await survey.join(rows, survey.sweep.holders_of(inodes_of(rows)))
    reason = survey.reason or survey.caveat or _doubt_bound(survey, spec)
    found = ports.judge_port(spec, joined, reason, outside=survey.sweep.outside)
    return published.mention_rewriting(found, (survey.ids or {}).values())


def _doubt_bound(survey: Survey, spec: PortSpec) -> str | None:
    """Why a socket that is bound and does not listen may be hidden: held outside, old kernel."""
    if spec.protocol == "udp" or not survey.sweep.outside:
        return None
    from sdtool.sources.binding import shows_bound_sockets  # a start-up cost for containers only

    if shows_bound_sockets(BindSpec(address="127.0.0.1", port=spec.port)):
        return None
    return (
        "one that is bound and does not listen is not listed by this kernel (before Linux 6.8), "
        "and there may be processes outside of this pid namespace"
    )


def _scan_likely_holders(
    session: Session, survey: Survey, rows: Sequence[SocketFacts]
) -> HolderScan:
    """Look at the processes of the creating cgroups first; at all when that leaves a question."""
    owning = [row for row in rows if row.inode and owns_port(row)]
    if not owning:
        return HolderScan(complete=True)
    inodes = inodes_of(owning)
    likely = ownership.find_likely_cgroups(owning, survey.ids or {})
    if likely is not None:
        pids = {pid for path in likely for pid in cgroups.read_pids(session.mount, path)}
        scan = Sweep(pids).holders_of(inodes)
        if inodes == {inode for inode, _, _ in scan.by_inode}:
            return scan
    return survey.sweep.holders_of(inodes_of(rows))


async def read_listeners(
    survey: Survey,
    protocols: tuple[str, ...] = PROTOCOLS[None],
    managers: Collection[str] | None = None,
) -> tuple[Socket, ...]:
    """Every listening socket with its owners.

    Args:
        managers: Ask no others what they hold sockets for; None for all that hold any.
    """
    wanted = SocketFilter(protocols=protocols, states=SocketStates.LISTENING)
    rows = survey.read(wanted) + survey.read_deeper(wanted)
    scan = survey.sweep.holders_of(inodes_of(rows))
    return await survey.join(rows, scan, managers)


def _protocols(unix: bool) -> tuple[str, ...]:
    return ("unix",) if unix else PROTOCOLS[None]


async def own_listeners(session: Session, *, unix: bool = False) -> Answer[ListeningSocket]:
    """Every listening socket by unit; the notes say why there may be more."""
    survey = Survey(session)
    found = ports.name_listeners(await read_listeners(survey, _protocols(unix)))
    return Answer(data=found, notes=survey.notes)


async def own_listeners_of(
    session: Session, units: Sequence[UnitDetails], *, unix: bool = False
) -> Answer[ListeningSocket]:
    """The listening sockets of units; one that may have some unseen is an error."""
    roots = await session.roots()
    wanted = SocketFilter(protocols=_protocols(unix), states=SocketStates.LISTENING)
    found: list[ListeningSocket] = []
    left: dict[str, Unit] = {}
    for details in units:
        unit = details.unit
        own = await _own_quickly(session, details, wanted)
        if own is None:
            left[unit.name] = unit
        else:
            found += membership.filter_listeners(ports.name_listeners(own), {unit.name}, roots)
    if not left:
        return Answer(data=tuple(sorted(found, key=ports.by_unit)))
    every = await own_listeners(session, unix=unix)
    rest = membership.filter_listeners(every.data, left, roots)
    seen = {membership.asked_unit(row.unit, row.manager, roots) for row in rest}
    doubts = ports.doubt_unfound(left.values(), seen, every.data, "; ".join(every.notes) or None)
    data = tuple(sorted((*found, *rest), key=ports.by_unit))
    return Answer(data=data, errors=doubts, notes=every.notes)


async def _own_quickly(
    session: Session, details: UnitDetails, wanted: SocketFilter
) -> tuple[Socket, ...] | None:
    """The sockets of a unit, by its own cgroup and processes; None where these tell not all."""
    unit = details.unit
    if unit.unit_type in ("socket", "slice") or details.stored_descriptors:
        return None
    if unit.control_group is None:
        return ()
    pids = cgroups.read_pids(session.mount, unit.control_group)
    found, reason = await _own_of_cgroup(session, unit.control_group, pids, wanted)
    return None if reason else found


async def own_sockets(
    session: Session, unit: Unit, members: Sequence[ProcessFacts]
) -> tuple[tuple[Socket, ...], str | None]:
    """The sockets that a unit created or its processes hold, and why there may be more.

    Of a .socket unit those that it listens on. The reason is None when there are not.
    """
    if unit.unit_type == "socket":
        survey = Survey(session)
        rows = ports.name_listeners(await read_listeners(survey, EVERY_PROTOCOL))
        own = membership.filter_listeners(rows, {unit.name}, await session.roots())
        return tuple(row.socket for row in own), survey.reason
    if unit.control_group is None:
        return (), None
    pids = [process.id.pid for process in members]
    wanted = SocketFilter(protocols=EVERY_PROTOCOL)
    return await _own_of_cgroup(session, unit.control_group, pids, wanted)


async def _own_of_cgroup(
    session: Session, group: str, pids: Collection[int], wanted: SocketFilter
) -> tuple[tuple[Socket, ...], str | None]:
    survey = Survey(session, pids)
    own = survey.read_of_cgroup(group, wanted)
    inodes = inodes_of(own)
    scan = survey.sweep.holders_of(inodes)
    if inodes - survey.sweep.sockets:
        # Made here and held by others: by the manager for a .socket unit, or passed on.
        scan = Sweep().holders_of(inodes)
    return await survey.join(own, scan), _missing_sockets(survey, scan)


def _missing_sockets(survey: Survey, scan: HolderScan) -> str | None:
    reasons = [survey.reason] if survey.reason else []
    if scan.reason:
        reasons.append(f"sockets passed to it from outside are not shown: {scan.reason}")
    return "; ".join(reasons) or None
