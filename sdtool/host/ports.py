"""port, ports, and the sockets of a trace: sockets joined with creators and holders."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from sdtool.analysis import ownership
from sdtool.errors import SdtoolError
from sdtool.host.session import Session
from sdtool.model.process import ProcessFacts
from sdtool.model.sockets import (
    HolderScan,
    ListeningSocket,
    PortOwnership,
    PortSpec,
    Socket,
    SocketFacts,
    SocketUnit,
)
from sdtool.sources import cgroups, processes, sockets

log = logging.getLogger(__name__)

PROTOCOLS = {"tcp": ("tcp", "mptcp"), "udp": ("udp",), None: ("tcp", "mptcp", "udp")}


async def own_port(session: Session, spec: PortSpec) -> tuple[PortOwnership, ...]:
    """Who owns one port."""
    rows = sockets.read_port(spec.port, PROTOCOLS[spec.protocol])
    ids = cgroups.read_ids(session.mount) if rows else {}
    scan = _scan_likely_holders(session, rows, ids)
    return ownership.judge_port(spec, rows, await _join(session, rows, ids, scan))


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


async def own_listeners(session: Session, units: Collection[str]) -> tuple[ListeningSocket, ...]:
    """Every listening socket by unit, or those of the units alone."""
    rows = sockets.read_listeners()
    inodes = frozenset(row.inode for row in rows if row.inode)
    scan = processes.read_holders(inodes, processes.read_pids(), all_pids=True)
    joined = await _join(session, rows, cgroups.read_ids(session.mount), scan)
    listeners = ownership.name_listeners(joined)
    return tuple(row for row in listeners if not units or row.unit in units)


async def own_sockets(
    session: Session, group: str | None, members: Sequence[ProcessFacts]
) -> tuple[tuple[Socket, ...], str | None]:
    """The sockets that a cgroup created or its processes hold, and what may be missing.

    Returns:
        The sockets, and why there may be more; None when there are not.
    """
    if group is None:
        return (), None
    ids = cgroups.read_ids(session.mount)
    own_ids = {key for key, path in ids.items() if path == group or path.startswith(f"{group}/")}
    rows = sockets.read_sockets()
    inodes = frozenset(row.inode for row in rows if row.inode)
    scan = processes.read_holders(inodes, [process.id.pid for process in members])
    held = {inode for inode, _, _ in scan.by_inode}
    own = [row for row in rows if row.cgroup_id in own_ids or row.inode in held]
    elsewhere = frozenset(row.inode for row in own if row.inode) - held
    if elsewhere:
        # Made here and held by others: by the manager for a .socket unit, or passed on.
        others = processes.read_holders(elsewhere, processes.read_pids(), all_pids=True)
        scan = replace(others, by_inode=(*scan.by_inode, *others.by_inode), complete=False)
    return await _join(session, own, ids, scan), _missing_sockets(members, scan)


def _missing_sockets(members: Sequence[ProcessFacts], scan: HolderScan) -> str | None:
    ours = processes.read_netns("self")
    foreign = {process.netns for process in members} - {ours, None}
    if foreign:
        return "some of its processes are in another network namespace, which was not looked at"
    if scan.reason:
        return f"sockets passed to it from outside are not shown: {scan.reason}"
    return None


async def _join(
    session: Session, rows: Sequence[SocketFacts], ids: Mapping[int, str], scan: HolderScan
) -> tuple[Socket, ...]:
    units = await read_socket_units(session, rows, ids, scan)
    return ownership.join(rows, ids, scan, units, await session.roots())


async def read_socket_units(
    session: Session, rows: Sequence[SocketFacts], ids: Mapping[int, str], scan: HolderScan
) -> tuple[SocketUnit, ...]:
    """The .socket units, where a manager made or holds one of the sockets; else none.

    None too when the manager cannot be asked: then its own init.scope is all that is known.
    """
    joined = ownership.join(rows, ids, scan, (), await session.roots())
    if not any(ownership.is_managers(socket.creator, socket.holders) for socket in joined):
        return ()
    try:
        return await (await session.manager()).list_socket_units()
    except SdtoolError as error:
        log.warning("which .socket unit stands behind a socket is not known: %s", error)
        return ()
