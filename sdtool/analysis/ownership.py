"""Who owns a cgroup, a socket, a port?

The creator of a socket (its cgroup id) and its holders (descriptors) are two facts: after socket
activation, a passed descriptor or a stopped .socket they differ. A port is owned by those who
hold its socket; the creator stands in only where the holders may not be seen.

Source: sd-login(3) for reading a cgroup path; systemd.socket(5).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from sdtool.analysis.phases import ENDED
from sdtool.errors import Unavailable
from sdtool.model.names import UNIT_TYPES
from sdtool.model.process import Container
from sdtool.model.scope import Scope
from sdtool.model.sockets import (
    Creator,
    Holder,
    HolderScan,
    ListenAddress,
    ListeningSocket,
    PortBlock,
    PortOwner,
    PortOwnership,
    PortSpec,
    PortVerdict,
    Socket,
    SocketFacts,
    SocketUnit,
    Via,
)
from sdtool.model.unit import CgroupOwner, ManagerRoots, Unit

USER_MANAGER = re.compile(r"user@\d+\.service")
SESSION = re.compile(r"session-(.+)\.scope")
INIT_SCOPE = "init.scope"

CONTAINER_SCOPES = (
    ("docker", re.compile(r"docker-([0-9a-f]{64})\.scope")),
    ("podman", re.compile(r"libpod-([0-9a-f]{64})\.scope")),
    ("crio", re.compile(r"crio-([0-9a-f]{64})\.scope")),
    ("containerd", re.compile(r"cri-containerd-([0-9a-f]{64})\.scope")),
    ("nspawn", re.compile(r"systemd-nspawn@([^/]+)\.service")),
    ("nspawn", re.compile(r"machine-([^/]+)\.scope")),
    ("docker", re.compile(r"docker/([0-9a-f]{64})")),
)
POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f_-]{27})(?:\.slice)?(?:/|$)")


# Cgroups -------------------------------------------------------------------------------------


def read_path(path: str, roots: ManagerRoots) -> CgroupOwner:
    """Who manages the processes of a cgroup, from its path alone, as sd-login(3) reads it."""
    if roots.user is not None and (inside := _below(path, roots.user)) is not None:
        slice_name, user_unit, _ = _split(inside)
        return CgroupOwner(
            unit=_system_part(path, roots)[1],
            user_unit=user_unit,
            slice=slice_name,
            asked=user_unit is not None,
        )
    slice_name, unit, rest = _system_part(path, roots)
    if unit is not None and USER_MANAGER.fullmatch(unit):
        inner_slice, user_unit, _ = _split(rest)
        return CgroupOwner(unit=unit, user_unit=user_unit, slice=inner_slice or slice_name)
    session = SESSION.fullmatch(unit or "")
    return CgroupOwner(unit=unit, slice=slice_name, session=session[1] if session else None)


def read_levels(path: str, roots: ManagerRoots) -> list[tuple[str, list[str]]]:
    """Every manager that a cgroup is under, outermost first, with the units that it is in.

    The units of one manager stand from "-.slice" to the innermost; the manager is named as in
    ``CgroupOwner.manager``.
    """
    asked = None if roots.user is None else _below(path, roots.user)
    parts = _below(path, roots.system)
    levels: list[tuple[str, list[str]]] = []
    if parts is not None:
        _, unit, rest = _split(parts)
        levels.append((Scope.SYSTEM, _units_on_the_way(parts, unit)))
        if asked is None and unit is not None and USER_MANAGER.fullmatch(unit):
            levels.append((unit, _units_on_the_way(rest, _split(rest)[1])))
    if asked is not None:
        levels.append((Scope.USER, _units_on_the_way(asked, _split(asked)[1])))
    return levels


def running_user_managers(units: Iterable[Unit]) -> list[str]:
    """Those of the system's units that run a user manager now, by uid.

    One on its way down counts: what keeps it from ending is asked for then most of all.
    """
    running = [unit.name for unit in units if unit.active_state not in ENDED]
    return sorted(filter(USER_MANAGER.fullmatch, running), key=uid_of_manager)


def uid_of_manager(unit: str) -> int:
    """The uid that user@UID.service runs the manager of."""
    return int(unit.removeprefix("user@").removesuffix(".service"))


def _units_on_the_way(parts: Sequence[str], unit: str | None) -> list[str]:
    slices = takewhile(lambda part: part.endswith(".slice"), parts)
    return ["-.slice", *slices, *([unit] if unit else [])]


def _system_part(path: str, roots: ManagerRoots) -> tuple[str | None, str | None, list[str]]:
    return _split(_below(path, roots.system) or [])


def _below(path: str, root: str) -> list[str] | None:
    """The components of a path below a root, None when it is elsewhere."""
    root = root.rstrip("/")
    if path != root and not path.startswith(f"{root}/"):
        return None
    return [part for part in path[len(root) :].split("/") if part]


def _split(parts: list[str]) -> tuple[str | None, str | None, list[str]]:
    """(innermost slice, the unit right below the slices, what is below the unit)."""
    slice_name = None
    for index, part in enumerate(parts):
        # systemd escapes names that clash with the kernel's own files by a leading "_".
        name = part.removeprefix("_")
        kind = name.rpartition(".")[2] if "." in name else ""
        if kind == "slice":
            slice_name = name
        elif kind in UNIT_TYPES:
            return slice_name, name, parts[index + 1 :]
        else:
            break
    return slice_name, None, []


def read_container(path: str) -> Container | None:
    """The container that a cgroup path belongs to, by the names that runtimes give."""
    for runtime, pattern in CONTAINER_SCOPES:
        found = pattern.search(path)
        if found:
            pod = POD.search(path)
            uid = pod[1].replace("_", "-") if pod else None
            return Container(runtime=runtime, id=found[1], pod=uid)
    return None


# Sockets -------------------------------------------------------------------------------------


def join(
    sockets: Iterable[SocketFacts],
    cgroups: Mapping[int, str] | None,
    scan: HolderScan | None,
    socket_units: Sequence[SocketUnit],
    roots: ManagerRoots,
) -> tuple[Socket, ...]:
    """Sockets with their creators, holders and .socket units.

    Args:
        cgroups: Cgroup id -> path, for all cgroups; None where ids say nothing (cgroup v1).
        scan: Who holds them; None when nobody looked.
        socket_units: The .socket units that could be listening on them.
    """
    holders: dict[int, list[Holder]] = {}
    for inode, ref, path in scan.by_inode if scan else ():
        owner = read_path(path, roots) if path is not None else CgroupOwner()
        holder = Holder(pid=ref.pid, comm=ref.comm, unit=owner.innermost, manager=owner.manager)
        holders.setdefault(inode, []).append(holder)
    return tuple(_join_one(row, cgroups, holders, scan, socket_units, roots) for row in sockets)


def _join_one(
    row: SocketFacts,
    cgroups: Mapping[int, str] | None,
    holders: Mapping[int, list[Holder]],
    scan: HolderScan | None,
    socket_units: Sequence[SocketUnit],
    roots: ManagerRoots,
) -> Socket:
    creator, creator_reason = _creator(row, cgroups, roots)
    held, complete, why = _holders(row, holders, scan)
    return Socket(
        family=row.family,
        protocol=row.protocol,
        type=row.type,
        address=row.address,
        port=row.port,
        path=None,
        state=row.state,
        inode=row.inode,
        uid=row.uid,
        v6only=row.v6only,
        netns=row.netns,
        netns_name=None,
        creator=creator,
        creator_reason=creator_reason,
        holders=held,
        holders_complete=complete,
        holders_reason=why,
        socket_unit=_socket_unit(row, creator, held, socket_units),
    )


def _creator(
    row: SocketFacts, cgroups: Mapping[int, str] | None, roots: ManagerRoots
) -> tuple[Creator | None, str | None]:
    if cgroups is None:
        return None, "with cgroup v1 the kernel does not tell who created it"
    if row.cgroup_id is None:
        return None, "the kernel names no creating cgroup for it"
    path = cgroups.get(row.cgroup_id)
    if path is None:
        return None, "the cgroup that created it is gone"
    owner = read_path(path, roots)
    return Creator(unit=owner.innermost, manager=owner.manager, control_group=path), None


def explain_no_creators(
    rows: Sequence[SocketFacts], cgroups: Mapping[int, str] | None
) -> str | None:
    """Why it is known of no socket who created it; None when it is known of some.

    Args:
        cgroups: As for ``join``.
    """
    if cgroups is None:
        return "with cgroup v1 the kernel does not tell who created a socket"
    if rows and all(row.cgroup_id is None for row in rows):
        return "the kernel does not tell who created a socket (needs Linux 5.9 with cgroup2)"
    return None


def _holders(
    row: SocketFacts, holders: Mapping[int, list[Holder]], scan: HolderScan | None
) -> tuple[tuple[Holder, ...] | None, bool, str | None]:
    if row.inode is None:
        return (), True, None
    if scan is None:
        return None, False, "nobody looked at the processes' descriptors"
    found = tuple(holders.get(row.inode, ()))
    if scan.complete:
        return found, True, None
    if found:
        return found, False, scan.reason or "only likely processes were looked at"
    return None, False, scan.reason or "none of the processes that were looked at holds it"


def _socket_unit(
    row: SocketFacts,
    creator: Creator | None,
    held: tuple[Holder, ...] | None,
    socket_units: Sequence[SocketUnit],
) -> str | None:
    if creator is not None and creator.unit and creator.unit.endswith(".socket"):
        return creator.unit
    if not is_managers(creator, held):
        return None
    return _find_socket_unit(row, socket_units)


def is_managers(creator: Creator | None, held: tuple[Holder, ...] | None) -> bool:
    """Whether a manager made or holds the socket, so that a .socket unit may stand behind it."""
    if creator is not None and creator.unit == INIT_SCOPE:
        return True
    return any(holder.unit == INIT_SCOPE for holder in held or ())


def is_made_by_manager(socket: Socket, manager: str) -> bool:
    """Whether a manager made the socket itself, for one of its .socket units."""
    creator = socket.creator
    return creator is not None and (creator.manager, creator.unit) == (manager, INIT_SCOPE)


def name_socket_units(
    sockets: Iterable[Socket], manager: str, units: Sequence[SocketUnit]
) -> tuple[Socket, ...]:
    """The sockets, those that a manager made itself with the .socket unit they are for."""
    return tuple(
        replace(socket, socket_unit=_find_socket_unit(socket, units))
        if is_made_by_manager(socket, manager)
        else socket
        for socket in sockets
    )


def _find_socket_unit(row: SocketFacts | Socket, units: Sequence[SocketUnit]) -> str | None:
    listening = (u.name for u in units if any(listens_on(listen, row) for listen in u.listens))
    return next(listening, None)


def listens_on(listen: ListenAddress, row: SocketFacts | Socket) -> bool:
    """Whether a Listen= line of a .socket unit is this socket's address."""
    if {"Stream": "stream", "Datagram": "dgram"}.get(listen.type) != row.type:
        return False
    address, _, port = listen.address.rpartition(":")
    address = address.partition("%")[0].strip("[]")
    return port == str(row.port) and address == row.address


# Ports ---------------------------------------------------------------------------------------


def owns(row: SocketFacts | Socket) -> bool:
    """Whether a socket in this state owns its local port: a connection accepted on it does not."""
    return row.protocol == "udp" or row.state in ("LISTEN", "BOUND")


def judge_port(
    spec: PortSpec,
    rows: Sequence[SocketFacts],
    sockets: Sequence[Socket],
    other_namespaces: int = 0,
    hidden: int = 0,
) -> tuple[PortOwnership, ...]:
    """Who owns a port: an entry for each protocol that has something, or one that says free.

    Args:
        other_namespaces: Network namespaces that were seen and not looked at.
        hidden: Processes whose network namespace may not be seen.
        rows: All that the kernel has on this port.
        sockets: ``rows`` joined with their owners, in the same order.
    """
    found = tuple(
        _judge_protocol(spec.port, protocol, pairs)
        for protocol in ((spec.protocol,) if spec.protocol else ("tcp", "udp"))
        if (pairs := _of_protocol(protocol, rows, sockets))
    )
    if found:
        return found
    return (
        PortOwnership(
            port=spec.port,
            protocol=spec.protocol,
            verdict=PortVerdict.UNKNOWN if other_namespaces or hidden else PortVerdict.FREE,
            owners=(),
            blocked_by=(),
            hint=_free_hint(other_namespaces, hidden),
        ),
    )


def _free_hint(other_namespaces: int, hidden: int) -> str:
    if other_namespaces:
        return f"free in this network namespace; {other_namespaces} more were not looked at"
    if hidden:
        many = "1 process" if hidden == 1 else f"{hidden} processes"
        return f"free in this network namespace; that of {many} may not be seen (root may)"
    return "nothing in this network namespace has it"


def _of_protocol(
    protocol: str, rows: Sequence[SocketFacts], sockets: Sequence[Socket]
) -> list[tuple[SocketFacts, Socket]]:
    wanted = ("tcp", "mptcp") if protocol == "tcp" else (protocol,)
    pairs = zip(rows, sockets, strict=True)
    return [(row, joined) for row, joined in pairs if row.protocol in wanted]


def _judge_protocol(
    port: int, protocol: str, pairs: Sequence[tuple[SocketFacts, Socket]]
) -> PortOwnership:
    taken = [joined for row, joined in pairs if owns(row)]
    owners = tuple(dict.fromkeys(owner for joined in taken for owner in socket_owners(joined)))
    blocked: tuple[PortBlock, ...] = ()
    if owners:
        verdict, hint = PortVerdict.OWNED, _owned_hint(taken)
    elif taken:
        verdict, hint = PortVerdict.UNKNOWN, _unknown_hint(taken)
    else:
        blocked = tuple(_block(row, joined) for row, joined in pairs)
        verdict, hint = PortVerdict.BLOCKED, _blocked_hint(blocked)
    return PortOwnership(
        port=port,
        protocol=protocol,
        verdict=verdict,
        owners=owners,
        blocked_by=blocked,
        hint=hint,
    )


def socket_owners(socket: Socket) -> tuple[PortOwner, ...]:
    """The owners of one socket, the ones that hold it first; empty when they are not known."""
    if socket.holders:
        doors: dict[tuple[str | None, str | None, Via], list[Holder]] = {}
        for holder in socket.holders:
            unit, via = _door(socket, holder.unit)
            doors.setdefault((unit, holder.manager, via), []).append(holder)
        return tuple(
            PortOwner(unit=unit, manager=manager, via=via, holders=tuple(held), socket=socket)
            for (unit, manager, via), held in doors.items()
        )
    if socket.holders == () and socket.holders_complete:
        in_root = socket.creator is not None and socket.creator.control_group == "/"
        kernel = socket.inode is not None and in_root
        return (_owner_without_holder(socket, None, None, Via.KERNEL),) if kernel else ()
    if socket.creator is not None:
        unit, via = _door(socket, socket.creator.unit)
        via = Via.CREATOR if via is Via.HOLDER else via
        return (_owner_without_holder(socket, unit, socket.creator.manager, via),)
    return ()


def _owner_without_holder(
    socket: Socket, unit: str | None, manager: str | None, via: Via
) -> PortOwner:
    return PortOwner(unit=unit, manager=manager, via=via, holders=(), socket=socket)


def _door(socket: Socket, unit: str | None) -> tuple[str | None, Via]:
    if socket.socket_unit is not None and unit in (INIT_SCOPE, socket.socket_unit):
        return socket.socket_unit, Via.SOCKET_UNIT
    return unit, Via.HOLDER


def _owned_hint(taken: Sequence[Socket]) -> str | None:
    reasons = (s.holders_reason for s in taken if s.holders is None)
    return next((reason for reason in reasons if reason), None)


def _unknown_hint(taken: Sequence[Socket]) -> str:
    reasons = (reason for s in taken for reason in (s.creator_reason, s.holders_reason) if reason)
    return "; ".join(dict.fromkeys(reasons)) or "the socket has neither creator nor holder"


def _block(row: SocketFacts, joined: Socket) -> PortBlock:
    peer = None
    if row.peer_address is not None:
        host = f"[{row.peer_address}]" if ":" in row.peer_address else row.peer_address
        peer = f"{host}:{row.peer_port}"
    return PortBlock(
        state=row.state,
        expires_us=row.expires_us,
        peer=peer,
        unit=joined.creator.unit if joined.creator else None,
    )


def _blocked_hint(blocked: Sequence[PortBlock]) -> str:
    waits = [block.expires_us for block in blocked if block.state == "TIME_WAIT"]
    if len(waits) == len(blocked) and all(wait is not None for wait in waits):
        longest = max(wait for wait in waits if wait is not None)
        return (
            f"nobody listens; old connections free it in {longest / 1_000_000:.0f} s "
            "(a server with SO_REUSEADDR can bind now)"
        )
    return "nobody listens, but connections still use it as their local port"


def name_listeners(sockets: Iterable[Socket]) -> tuple[ListeningSocket, ...]:
    """An entry for each unit that owns each socket, by unit, then port; unowned ones last."""
    rows: list[ListeningSocket] = []
    for socket in sockets:
        units = dict.fromkeys((o.unit, o.manager) for o in socket_owners(socket))
        rows.extend(
            ListeningSocket(unit=unit, manager=manager, socket=socket)
            for unit, manager in units or {(None, None): None}
        )
    return tuple(sorted(rows, key=_by_unit))


def _by_unit(row: ListeningSocket) -> tuple[bool, str, int, str, str]:
    socket = row.socket
    return (
        row.unit is None,
        row.unit or "",
        socket.port or 0,
        socket.protocol,
        socket.address or "",
    )


def doubt_unfound(
    units: Iterable[Unit], found: Collection[str | None], rows: Iterable[ListeningSocket]
) -> tuple[Unavailable, ...]:
    """An error for each unit that may have a listening socket all the same, in their order.

    Args:
        found: The names of those that have one for certain.
        rows: All listening sockets; one without an owner may be any unit's that can have one.
    """
    why = _explain_unowned(rows)
    if why is None:
        return ()
    return tuple(
        Unavailable(f"Whether {unit.name} listens is not known: {why}.", subject=unit.name)
        for unit in units
        if unit.name not in found and _can_listen(unit)
    )


def _can_listen(unit: Unit) -> bool:
    """Whether the unit is in a state to have sockets: its own, or the manager's for it."""
    if unit.unit_type == "socket" and unit.active_state not in ENDED:
        return True
    # Slices have a cgroup too, and only other units in it.
    return unit.control_group is not None and unit.unit_type != "slice"


def _explain_unowned(rows: Iterable[ListeningSocket]) -> str | None:
    """Why it is not known whose some of the sockets are; None when it is known of all."""
    sockets = [row.socket for row in rows if row.unit is None]
    unknown = [s for s in sockets if s.creator is None and s.holders is None]
    if not unknown:
        return None
    many = "1 socket" if len(unknown) == 1 else f"{len(unknown)} sockets"
    return f"the owner of {many} is not known: {_unknown_hint(unknown)}"
