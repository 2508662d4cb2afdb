"""port, ports, and the sockets of a trace: sockets joined with creators and holders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sdtool.analysis import membership, ownership
from sdtool.errors import SdtoolError, Unavailable
from sdtool.host.session import Session
from sdtool.model.answer import Answer
from sdtool.model.process import ProcessFacts
from sdtool.model.sockets import (
    HolderScan,
    ListeningSocket,
    PortOwnership,
    PortSpec,
    Socket,
    SocketFacts,
)
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups, processes, sockets

log = logging.getLogger(__name__)

PROTOCOLS = {"tcp": ("tcp", "mptcp"), "udp": ("udp",), None: ("tcp", "mptcp", "udp")}


async def own_port(session: Session, spec: PortSpec) -> tuple[PortOwnership, ...]:
    """Who owns one port."""
    rows = sockets.read_port(spec.port, PROTOCOLS[spec.protocol])
    ids = cgroups.read_ids(session.mount) if rows else {}
    scan = _scan_likely_holders(session, rows, ids or {})
    others, hidden = (frozenset[int](), 0) if rows else processes.read_other_namespaces()
    joined = await join_sockets(session, rows, ids, scan)
    return ownership.judge_port(spec, rows, joined, len(others), hidden)


def _scan_likely_holders(
    session: Session, rows: Sequence[SocketFacts], ids: Mapping[int, str]
) -> HolderScan:
    """Look at the processes of the creating cgroups first; at all when that leaves a question.

    The full look costs 50 us a process. It is needed when a creator is gone, is a manager (socket
    activation) or is no unit, and when a socket is held by none of its creator's processes.
    """
    inodes = frozenset(row.inode for row in rows if row.inode and ownership.owns(row))
    if not inodes:
        return HolderScan(complete=True)
    paths = {ids.get(row.cgroup_id or 0) for row in rows if row.inode in inodes}
    likely = [path for path in paths if path and path.endswith((".service", ".scope"))]
    if len(likely) == len(paths) and not any(p.endswith(ownership.INIT_SCOPE) for p in likely):
        pids = frozenset(pid for path in likely for pid in cgroups.read_pids(session.mount, path))
        scan = processes.read_holders(inodes, pids)
        if inodes == {inode for inode, _, _ in scan.by_inode}:
            return scan
    return processes.read_holders(inodes, processes.read_pids(), all_pids=True)


async def own_listeners(session: Session) -> tuple[ListeningSocket, ...]:
    """Every listening socket by unit."""
    rows = sockets.read_listeners()
    inodes = frozenset(row.inode for row in rows if row.inode)
    scan = processes.read_holders(inodes, processes.read_pids(), all_pids=True)
    joined = await join_sockets(session, rows, cgroups.read_ids(session.mount), scan)
    return ownership.name_listeners(joined)


async def own_listeners_of(
    session: Session, units: Sequence[UnitDetails]
) -> Answer[ListeningSocket]:
    """The listening sockets of units; one that may have some unseen is an error."""
    rows = await own_listeners(session)
    roots = await session.roots()
    asked = {details.unit.name: details.unit for details in units}
    found = membership.filter_listeners(rows, asked, roots)
    seen = {membership.asked_unit(row.unit, row.manager, roots) for row in found}
    return Answer(data=found, errors=ownership.doubt_unfound(asked.values(), seen, rows))


async def read_listeners_by_creator(
    session: Session, ids: Mapping[int, str] | None
) -> tuple[tuple[Socket, ...], str | None]:
    """Every listening socket with its creator alone, or none and why creators are not known."""
    try:
        rows = sockets.read_listeners()
    except Unavailable as error:
        return (), str(error)
    reason = ownership.explain_no_creators(rows, ids)
    return (() if reason else await join_sockets(session, rows, ids, None)), reason


async def own_sockets(
    session: Session, group: str | None, members: Sequence[ProcessFacts]
) -> tuple[tuple[Socket, ...], str | None]:
    """The sockets that a cgroup created or its processes hold, and what may be missing.

    Returns:
        The sockets, and why there may be more; None when there are not.
    """
    if group is None:
        return (), None
    try:
        rows = sockets.read_sockets()
    except Unavailable as error:
        return (), str(error)
    ids = cgroups.read_ids(session.mount)
    below = f"{group}/"
    own_ids = {key for key, path in (ids or {}).items() if f"{path}/".startswith(below)}
    inodes = frozenset(row.inode for row in rows if row.inode)
    scan = processes.read_holders(inodes, [process.id.pid for process in members])
    held = {inode for inode, _, _ in scan.by_inode}
    own = [row for row in rows if row.cgroup_id in own_ids or row.inode in held]
    elsewhere = frozenset(row.inode for row in own if row.inode) - held
    if elsewhere:
        # Made here and held by others: by the manager for a .socket unit, or passed on.
        others = processes.read_holders(elsewhere, processes.read_pids(), all_pids=True)
        scan = replace(others, by_inode=(*scan.by_inode, *others.by_inode), complete=False)
    return await join_sockets(session, own, ids, scan), _missing_sockets(members, scan)


def _missing_sockets(members: Sequence[ProcessFacts], scan: HolderScan) -> str | None:
    namespaces = {process.netns for process in members}
    if namespaces - {processes.read_netns("self"), None}:
        return "some of its processes are in another network namespace, which was not looked at"
    if scan.reason:
        own = " or in a network namespace of its own" if None in namespaces else ""
        return f"sockets passed to it from outside{own} are not shown: {scan.reason}"
    if None in namespaces:
        return f"whether it has a network namespace of its own is hidden: {processes.PTRACE_HINT}"
    return None


async def join_sockets(
    session: Session,
    rows: Sequence[SocketFacts],
    ids: Mapping[int, str] | None,
    scan: HolderScan | None,
) -> tuple[Socket, ...]:
    """Join, and once more with the .socket units where a manager made or holds a socket."""
    roots = await session.roots()
    joined = ownership.join(rows, ids, scan, (), roots)
    if not any(ownership.is_managers(socket.creator, socket.holders) for socket in joined):
        return joined
    try:
        units = await (await session.manager()).list_socket_units()
    except SdtoolError as error:
        # The manager's own init.scope is then all that is known.
        log.warning("which .socket unit stands behind a socket is not known: %s", error)
        return joined
    return ownership.join(rows, ids, scan, units, roots)
