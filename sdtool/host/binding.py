"""port --bind: would an address and port be ours to bind now, and who is in the way."""

from __future__ import annotations

from sdtool.analysis.binding import judge_bind, occupy
from sdtool.host.ports import join_sockets
from sdtool.host.session import Session
from sdtool.model.binding import BindAnswer, BindScene, BindSpec
from sdtool.model.sockets import HolderScan, SocketFacts
from sdtool.sources import binding, cgroups, processes, socketoptions, sockets


async def try_bind(session: Session, spec: BindSpec) -> BindAnswer:
    """Whether a bind would succeed now, by whoever asks."""
    # Sockets of our own first: they are closed again before anybody else's are looked at.
    newcomer = binding.read_newcomer(spec)
    rows, unseen = _read_occupants(spec)
    inodes = frozenset(row.inode for row in rows if row.inode)
    pids = processes.read_pids() if inodes else ()
    scan = processes.read_holders(inodes, pids, all_pids=True)
    options = socketoptions.read_options(_name_holders(scan))
    devices = {row.interface for row in rows} | {newcomer.interface}
    scene = BindScene(
        newcomer=newcomer,
        permission=binding.read_port_permission(spec.port),
        occupants=occupy(rows, options),
        meeting=binding.read_meeting(device for device in devices if device) if rows else (),
        options_reason=options.reason or scan.reason,
        unseen_reason=unseen,
    )
    ids = cgroups.read_ids(session.mount) if rows else {}
    return judge_bind(spec, scene, await join_sockets(session, rows, ids, scan))


def _name_holders(scan: HolderScan) -> dict[int, list[int]]:
    """The processes that hold each socket, by its inode."""
    pids: dict[int, list[int]] = {}
    for inode, ref, _ in scan.by_inode:
        pids.setdefault(inode, []).append(ref.pid)
    return pids


def _read_occupants(spec: BindSpec) -> tuple[tuple[SocketFacts, ...], str | None]:
    """The sockets that have the port, and why there may be more."""
    if spec.protocol != "tcp" or binding.shows_bound_sockets():
        return sockets.read_port(spec.port, (spec.protocol,)), None
    hidden, reason = socketoptions.find_bound_sockets(spec.port)
    return sockets.read_port(spec.port, (spec.protocol,)) + hidden, reason
