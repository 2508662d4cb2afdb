"""Who made a socket, and who holds it?

The creator (the socket's cgroup id) and the holders (descriptors) are two facts: after socket
activation, a passed descriptor or a stopped .socket they differ. What a manager holds itself, it
holds for a .socket unit or in the fd store of a service.

Source: systemd.socket(5), sd_pid_notify_with_fds(3) for the fd store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sdtool.analysis.cgroups import INIT_SCOPE, read_container, read_path
from sdtool.model.sockets import (
    Creator,
    Holder,
    HolderScan,
    ListenAddress,
    ManagersSockets,
    Socket,
    SocketFacts,
    SocketSource,
    SocketUnit,
    endpoint,
)
from sdtool.model.unit import CgroupOwner, ManagerRoots

CREATOR_GONE = "the cgroup that created it is gone (or outside our cgroup namespace)"

LISTEN_TYPES = {
    "Stream": "stream",
    "Datagram": "dgram",
    "SequentialPacket": "seqpacket",
}


def join(
    sockets: Iterable[SocketFacts],
    cgroups: Mapping[int, str] | None,
    scan: HolderScan | None,
    roots: ManagerRoots,
) -> tuple[Socket, ...]:
    """Sockets with their creators and holders, in their order; each MPTCP socket once.

    Args:
        cgroups: Cgroup id -> path, for all cgroups; None where ids say nothing (cgroup v1).
        scan: Who holds them; None when nobody looked.
    """
    holders: dict[int, list[Holder]] = {}
    for inode, ref, path in scan.by_inode if scan else ():
        owner = read_path(path, roots) if path is not None else CgroupOwner()
        holder = Holder(
            pid=ref.pid,
            comm=ref.comm,
            unit=owner.innermost,
            manager=owner.manager,
            container=read_container(path or ""),
        )
        holders.setdefault(inode, []).append(holder)
    return tuple(
        _join_one(row, cgroups, holders, scan, roots) for row in _without_subflows(sockets)
    )


def _without_subflows(rows: Iterable[SocketFacts]) -> list[SocketFacts]:
    """Sockets without the TCP rows that are one with an MPTCP socket: they share its inode."""
    kept = list(rows)
    whole = {row.inode for row in kept if row.protocol == "mptcp" and row.inode}
    return [row for row in kept if row.protocol != "tcp" or row.inode not in whole]


def _join_one(
    row: SocketFacts,
    cgroups: Mapping[int, str] | None,
    holders: Mapping[int, list[Holder]],
    scan: HolderScan | None,
    roots: ManagerRoots,
) -> Socket:
    creator, creator_reason = _creator(row, cgroups, roots)
    held, complete, why = _holders(row, holders, scan)
    made_for = creator.unit if creator and (creator.unit or "").endswith(".socket") else None
    return Socket(
        family=row.family,
        protocol=row.protocol,
        type=row.type,
        address=row.address,
        port=row.port,
        path=row.path,
        state=row.state,
        inode=row.inode,
        uid=row.uid,
        v6only=row.v6only,
        netns=row.netns,
        netns_name=row.netns_name,
        elsewhere=row.elsewhere,
        peer=_peer(row),
        expires_us=row.expires_us,
        creator=creator,
        creator_reason=creator_reason,
        holders=held,
        holders_complete=complete,
        holders_reason=why,
        socket_unit=made_for,
        behind_manager=creator.manager if creator and made_for else None,
        device=row.device,
        source=row.source,
    )


def _peer(row: SocketFacts) -> str | None:
    return None if row.peer_address is None else endpoint(row.peer_address, row.peer_port)


def _creator(
    row: SocketFacts, cgroups: Mapping[int, str] | None, roots: ManagerRoots
) -> tuple[Creator | None, str | None]:
    if row.family == "unix":
        return None, "the kernel does not tell who created an AF_UNIX socket"
    if row.source is SocketSource.PROCFS:
        return None, "/proc/net does not tell who created it"
    if row.source is SocketSource.COPY:
        return (
            None,
            "the kernel does not list it, and its descriptor does not tell who created it",
        )
    if cgroups is None:
        return None, "with cgroup v1 the kernel does not tell who created it"
    if row.cgroup_id is None:
        return None, "the kernel names no creating cgroup for it"
    path = cgroups.get(row.cgroup_id)
    if path is None:
        return None, CREATOR_GONE
    owner = read_path(path, roots)
    return Creator(
        unit=owner.innermost,
        manager=owner.manager,
        control_group=path,
        container=read_container(path),
    ), None


def explain_no_owners(sockets: Sequence[Socket]) -> str | None:
    """Why it is known of no socket whose it is; None when it is known of any, or there is none."""
    if not sockets or any(socket.creator or socket.holders for socket in sockets):
        return None
    reasons = (socket.creator_reason for socket in sockets if socket.creator_reason)
    return next(reasons, None)


def _holders(
    row: SocketFacts, holders: Mapping[int, list[Holder]], scan: HolderScan | None
) -> tuple[tuple[Holder, ...] | None, bool, str | None]:
    if row.inode is None:
        return (), True, None
    if scan is None:
        return None, False, "nobody looked at the processes' descriptors"
    found = tuple(holders.get(row.inode, ()))
    if found:
        why = None if scan.complete else scan.reason or "only likely processes were looked at"
        return found, scan.complete, why
    if scan.complete and not scan.outside:
        return (), True, None
    if scan.complete:
        return None, False, "no process of this pid namespace holds it"
    return None, False, scan.reason or "none of the processes that were looked at holds it"


# Managers ------------------------------------------------------------------------------------


def managers_of(sockets: Iterable[Socket]) -> list[str]:
    """The managers that made or hold any of the sockets, so that a unit may stand behind it."""
    found: dict[str, None] = {}
    for socket in sockets:
        for manager in _managers_of(socket):
            found[manager] = None
    return list(found)


def _managers_of(socket: Socket) -> list[str]:
    made = [socket.creator] if socket.creator is not None else []
    involved: list[Creator | Holder] = [*made, *(socket.holders or ())]
    return [one.manager for one in involved if one.unit == INIT_SCOPE and one.manager is not None]


def name_units_behind(sockets: Iterable[Socket], behind: ManagersSockets) -> tuple[Socket, ...]:
    """The sockets, those of a manager with the .socket or the fd store that they are for."""
    return tuple(_name_unit_behind(_mark_manager(socket, behind), behind) for socket in sockets)


def _mark_manager(socket: Socket, behind: ManagersSockets) -> Socket:
    """The socket, with the manager itself told from what else runs in its init.scope."""
    if socket.holders is None or behind.pid not in {holder.pid for holder in socket.holders}:
        return socket
    marked = (
        replace(holder, is_manager=True)
        if (holder.pid, holder.manager) == (behind.pid, behind.manager)
        else holder
        for holder in socket.holders
    )
    return replace(socket, holders=tuple(marked))


def _name_unit_behind(socket: Socket, behind: ManagersSockets) -> Socket:
    if socket.socket_unit is not None or not _is_of_manager(socket, behind.manager):
        return _name_activated(socket, behind)
    stored = [store.unit for store in behind.stores if socket.inode in (store.inodes or ())]
    listening = [unit for unit in behind.units if _is_of(socket, unit)]
    if stored:
        return replace(socket, fd_store_unit=stored[0], behind_manager=behind.manager)
    if listening:
        # Several have one address with SO_REUSEPORT, or each on its device: nobody can say which,
        # for a device that was renamed bears the name that another one had.
        if len(listening) > 1 or not _fits_device(socket, listening[0]):
            return socket
        named = replace(socket, socket_unit=listening[0].name, behind_manager=behind.manager)
        return _name_activated(named, behind)
    store = _find_only_store(socket, behind)
    if store is None:
        return socket
    return replace(socket, fd_store_unit=store, behind_manager=behind.manager)


def _name_activated(socket: Socket, behind: ManagersSockets) -> Socket:
    """The socket, with the units that its .socket starts."""
    if socket.behind_manager != behind.manager:
        return socket
    starts = [unit.triggers for unit in behind.units if unit.name == socket.socket_unit]
    return replace(socket, activates=starts[0]) if starts else socket


def _is_of(socket: Socket, unit: SocketUnit) -> bool:
    """Whether a .socket may have it, its device aside."""
    if unit.is_inactive or _maker(socket) not in (None, INIT_SCOPE, unit.name):
        return False
    if unit.netns is None:
        # Not known: of a manager that is where we are, or of a namespace that is not there.
        here = unit.namespace_path is None and not socket.elsewhere
    else:
        here = socket.netns in (None, unit.netns)
    return here and any(listens_on(listen, socket) for listen in unit.listens)


def _maker(socket: Socket) -> str | None:
    return socket.creator.unit if socket.creator is not None else None


def _fits_device(socket: Socket, unit: SocketUnit) -> bool:
    if socket.source is SocketSource.PROCFS:
        return True  # there nobody knows of devices
    scopes = {
        _parse_listen(listen.address)[2] for listen in unit.listens if listens_on(listen, socket)
    }
    return socket.device in ({unit.device} if unit.device else scopes)


def _find_only_store(socket: Socket, behind: ManagersSockets) -> str | None:
    """The service whose fd store it must be in, where the manager does not tell them.

    Before systemd 254 nobody tells. A manager has no use of its own for a port, and accepted
    connections aside holds one for a .socket or in a store: the only store is then the one,
    if no .socket could be meant, wherever it listens, and the manager holds the socket still.
    """
    told = [store for store in behind.stores if store.inodes is not None]
    if told or len(behind.stores) != 1 or not _has_port_alone(socket):
        return None
    if socket.inode not in (behind.held or ()) or not _is_held_by(socket, behind.manager):
        return None
    named = (_names_port(listen, socket) for unit in behind.units for listen in unit.listens)
    if _maker(socket) != behind.stores[0].unit and any(named):
        return None
    return behind.stores[0].unit


def _has_port_alone(socket: Socket) -> bool:
    """Whether it is there for a port, and no connection that was accepted on one."""
    return socket.family != "unix" and socket.peer is None


def may_be_stored(socket: Socket, manager: str) -> bool:
    """Whether a manager holds what it did not make for a .socket unit: in a fd store, then."""
    if not _is_held_by(socket, manager):
        return False
    made_for_socket = socket.creator is not None and (
        socket.creator.unit == INIT_SCOPE or (socket.creator.unit or "").endswith(".socket")
    )
    return not made_for_socket or socket.socket_unit is None


def is_unexplained(socket: Socket) -> bool:
    """Whether a manager holds the socket, and nobody knows what for."""
    if socket.socket_unit is not None or socket.fd_store_unit is not None:
        return False
    return any(holder.is_manager for holder in socket.holders or ())


def _is_of_manager(socket: Socket, manager: str) -> bool:
    """Whether a manager holds the socket; where holders are hidden, whether it made it."""
    if socket.holders is not None:
        return _is_held_by(socket, manager)
    creator = socket.creator
    return creator is not None and (creator.manager, creator.unit) == (manager, INIT_SCOPE)


def _is_held_by(socket: Socket, manager: str) -> bool:
    return any(holder.is_manager and holder.manager == manager for holder in socket.holders or ())


def doubt_kernel(sockets: Iterable[Socket]) -> tuple[Socket, ...]:
    """The sockets, where processes outside every unit could have made what nobody holds.

    A socket on its way between processes is held by none, like the kernel's own.
    """
    why = "no process holds it: it is the kernel's own, or on its way from one to another"
    return tuple(
        replace(socket, holders=None, holders_complete=False, holders_reason=why)
        if is_rootless(socket)
        else socket
        for socket in sockets
    )


def find_likely_cgroups(
    rows: Iterable[SocketFacts], cgroups: Mapping[int, str]
) -> frozenset[str] | None:
    """The cgroups whose processes probably hold all of the sockets: those that made them.

    None where that tells nothing of some: the cgroup is gone, is a manager's (socket activation),
    or is no unit's that has processes of its own.
    """
    paths = frozenset(cgroups.get(row.cgroup_id or 0, "") for row in rows)
    units = all(path.endswith((".service", ".scope")) for path in paths)
    return paths if units and not any(path.endswith(INIT_SCOPE) for path in paths) else None


def doubt_owner(socket: Socket) -> str | None:
    """Why it is not known whose a socket without owners is; None when it is nobody's."""
    if socket.inode is None:
        return None
    reasons = (
        "it was created outside every unit" if is_made_outside(socket) else None,
        socket.creator_reason,
        socket.holders_reason,
    )
    return "; ".join(reason for reason in reasons if reason) or (
        "no process holds it: it may be on its way from one to another (unix(7), SCM_RIGHTS)"
    )


def is_rootless(socket: Socket) -> bool:
    """Whether nobody holds a socket that was made outside every unit: the kernel's own."""
    return socket.inode is not None and socket.holders == () and is_made_outside(socket)


def is_made_outside(socket: Socket) -> bool:
    """Whether it was created in the root cgroup: outside every unit, or by the kernel."""
    return socket.creator is not None and socket.creator.control_group == "/"


def listens_on(listen: ListenAddress, socket: Socket) -> bool:
    """Whether a Listen= line of a .socket unit is this socket's address, on whatever device."""
    if LISTEN_TYPES.get(listen.type) != socket.type:
        return False
    if socket.family == "unix":
        return socket.path is not None and listen.address == socket.path
    address, port, _ = _parse_listen(listen.address)
    return port == str(socket.port) and address == socket.address


def _names_port(listen: ListenAddress, socket: Socket) -> bool:
    """Whether a Listen= line is of this socket's port, on whatever address."""
    same_type = LISTEN_TYPES.get(listen.type) == socket.type
    return same_type and _parse_listen(listen.address)[1] == str(socket.port)


def _parse_listen(text: str) -> tuple[str, str, str | None]:
    """(address, port, device) of "[fe80::1]:80%eth0", in older versions "[fe80::1%eth0]:80"."""
    address, _, port = text.rpartition(":")
    address, _, scope = address.partition("%")
    port, _, later_scope = port.partition("%")
    return address.strip("[]"), port, later_scope or scope.rstrip("]") or None
