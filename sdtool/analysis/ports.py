"""Who owns a port, or what keeps it from being bound?

A port is owned by those who hold its socket; the creator stands in only where the holders may not
be seen. Connections accepted on a port do not own it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sdtool.analysis.cgroups import INIT_SCOPE
from sdtool.analysis.ownership import doubt_owner, is_made_outside, is_rootless, is_unexplained
from sdtool.analysis.phases import ENDED
from sdtool.errors import Unavailable
from sdtool.model.ports import (
    ListeningSocket,
    PortBlock,
    PortOwner,
    PortOwnership,
    PortSpec,
    PortVerdict,
    Via,
)
from sdtool.model.process import Container
from sdtool.model.sockets import Creator, Holder, Socket, owns_port
from sdtool.model.unit import Unit

BOUND_BESIDE = "on its other addresses --all-holders looks for what is bound, and does not listen"


def judge_port(
    spec: PortSpec,
    sockets: Sequence[Socket],
    reason: str | None = None,
    *,
    outside: bool = False,
    at_first_sight: bool = False,
) -> tuple[PortOwnership, ...]:
    """Who owns a port: an entry for each protocol that has something, or one that says free.

    Args:
        sockets: All that were found on this port.
        reason: Why there may be more; None when there are not.
        outside: There may be processes outside our pid namespace; where they are nobody looked.
        at_first_sight: What is bound beside a socket that listens was not looked for.
    """
    found = tuple(
        _judge_protocol(spec.port, protocol, ours, reason, at_first_sight)
        for protocol in ((spec.protocol,) if spec.protocol else ("tcp", "udp"))
        if (ours := [socket for socket in sockets if port_protocol(socket) == protocol])
    )
    if found:
        return found
    return (
        PortOwnership(
            port=spec.port,
            protocol=spec.protocol,
            verdict=PortVerdict.UNKNOWN if reason else PortVerdict.FREE,
            owners=(),
            blocked_by=(),
            hint=_free_hint(reason, outside),
        ),
    )


def is_settled(spec: PortSpec, found: Iterable[PortOwnership]) -> bool:
    """Whether it is known at first sight what is to be known: no closer look can change it.

    UDP has no old connections that block a port, and its sockets are listed by every kernel:
    where TCP has an owner and UDP has not, it is not looked at again.
    """
    owned = {entry.protocol for entry in found if entry.verdict is PortVerdict.OWNED}
    return (spec.protocol or "tcp") in owned


def _free_hint(reason: str | None, outside: bool) -> str:
    where = "nothing has it in any network namespace"
    if reason is not None:
        return f"{where} that was seen, but {reason}"
    return f"{where} that this pid namespace shows" if outside else where


def port_protocol(socket: Socket) -> str:
    """The protocol whose port it has: an MPTCP listener has one of TCP."""
    return "tcp" if socket.protocol == "mptcp" else socket.protocol


def _judge_protocol(
    port: int,
    protocol: str,
    sockets: Sequence[Socket],
    reason: str | None,
    at_first_sight: bool,
) -> PortOwnership:
    taken = [socket for socket in sockets if owns_port(socket)]
    owners = tuple(dict.fromkeys(owner for socket in taken for owner in socket_owners(socket)))
    blocked: tuple[PortBlock, ...] = ()
    hint: str | None
    if owners:
        more = f"there may be more owners: {reason}" if reason else None
        beside = BOUND_BESIDE if at_first_sight and _leaves_addresses(taken) else None
        verdict, hint = PortVerdict.OWNED, _owned_hint(taken) or more or beside
    elif taken:
        verdict, hint = PortVerdict.UNKNOWN, _unknown_hint(taken)
    else:
        blocked = tuple(_block(socket) for socket in sockets)
        verdict, hint = PortVerdict.BLOCKED, _blocked_hint(blocked)
        if reason is not None:
            hint = f"{hint}, as far as was seen, but {reason}"
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
        doors: dict[tuple[str | None, str | None, Via, Container | None], list[Holder]] = {}
        for holder in socket.holders:
            unit, via = _door(socket, holder)
            doors.setdefault((unit, holder.manager, via, holder.container), []).append(holder)
        return tuple(
            PortOwner(
                unit=unit,
                manager=manager,
                via=via,
                holders=tuple(held),
                socket=socket,
                container=container,
            )
            for (unit, manager, via, container), held in doors.items()
        )
    if socket.holders == () and socket.holders_complete:
        return _kernels(socket)
    if socket.creator is not None and not is_made_outside(socket):
        unit, via = _door(socket, socket.creator)
        return (
            PortOwner(
                unit=unit,
                manager=socket.creator.manager,
                via=Via.CREATOR if via is Via.HOLDER else via,
                holders=(),
                socket=socket,
                container=socket.creator.container,
            ),
        )
    return ()


def _kernels(socket: Socket) -> tuple[PortOwner, ...]:
    """The kernel as the owner of what it made itself: VXLAN, WireGuard, nfsd."""
    if not is_rootless(socket):
        return ()
    return (PortOwner(unit=None, manager=None, via=Via.KERNEL, holders=(), socket=socket),)


def _door(socket: Socket, one: Creator | Holder) -> tuple[str | None, Via]:
    """What a process, or a cgroup, has the socket for."""
    managers = one.is_manager if isinstance(one, Holder) else one.unit == INIT_SCOPE
    if socket.socket_unit is not None and (managers or one.unit == socket.socket_unit):
        return socket.socket_unit, Via.SOCKET_UNIT
    if socket.fd_store_unit is not None and managers:
        return socket.fd_store_unit, Via.FD_STORE
    return one.unit, Via.HOLDER


def _leaves_addresses(taken: Iterable[Socket]) -> bool:
    """Whether TCP sockets listen on some addresses of a network namespace, and not on all."""
    covered: dict[int | None, set[str | None]] = {}
    for socket in taken:
        if socket.state == "LISTEN":
            here = covered.setdefault(socket.netns, set())
            if socket.device is None:
                here |= {socket.address, "0.0.0.0" if socket.v6only is False else None}
    return any(not {"0.0.0.0", "::"} <= addresses for addresses in covered.values())


def _owned_hint(taken: Sequence[Socket]) -> str | None:
    reasons = (s.holders_reason for s in taken if s.holders is None)
    if any(map(is_unexplained, taken)):
        return "its manager holds it for a .socket or in a fd store: for which unit is not known"
    return next((reason for reason in reasons if reason), None)


def _unknown_hint(taken: Iterable[Socket]) -> str:
    return "; ".join(dict.fromkeys(filter(None, map(doubt_owner, taken))))


def _block(socket: Socket) -> PortBlock:
    held: Sequence[Creator | Holder] = socket.holders or ()
    whose = next(iter(held), socket.creator)
    unit = whose.unit if whose else None
    return PortBlock(
        state=socket.state,
        expires_us=socket.expires_us,
        peer=socket.peer,
        unit=unit,
        unit_reason=doubt_owner(socket) if unit is None and not held else None,
        manager=whose.manager if whose else None,
        holders=socket.holders,
        netns=socket.netns,
        netns_name=socket.netns_name,
        elsewhere=socket.elsewhere,
    )


def _blocked_hint(blocked: Sequence[PortBlock]) -> str:
    waits = [block.expires_us for block in blocked if block.state in ("TIME_WAIT", "FIN_WAIT2")]
    if len(waits) == len(blocked) and all(wait is not None for wait in waits):
        longest = max(wait for wait in waits if wait is not None)
        return (
            f"nobody listens; old connections free it in {longest / 1_000_000:.0f} s (before "
            "that a server binds with SO_REUSEADDR, if the old one had set it too)"
        )
    return "nobody listens, but connections still use it as their local port"


# Listeners -----------------------------------------------------------------------------------


def name_listeners(sockets: Iterable[Socket]) -> tuple[ListeningSocket, ...]:
    """An entry for each unit that owns each socket, by unit, then port; unowned ones last."""
    rows: list[ListeningSocket] = []
    for socket in sockets:
        units = dict.fromkeys((o.unit, o.manager) for o in socket_owners(socket))
        doubt = None if units else doubt_owner(socket)
        rows.extend(
            ListeningSocket(unit=unit, unit_reason=doubt, manager=manager, socket=socket)
            for unit, manager in units or {(None, None): None}
        )
    return tuple(sorted(rows, key=by_unit))


def by_unit(row: ListeningSocket) -> tuple[bool, str, int, str, str, str]:
    """The order of listeners: by unit, then port; those of no unit last."""
    socket = row.socket
    return (
        row.unit is None,
        row.unit or "",
        socket.port or 0,
        socket.protocol,
        socket.address or "",
        socket.path or "",
    )


def doubt_unfound(
    units: Iterable[Unit],
    found: Collection[str | None],
    rows: Iterable[ListeningSocket],
    reason: str | None = None,
) -> tuple[Unavailable, ...]:
    """An error for each unit that may have a listening socket all the same, in their order.

    Args:
        found: The names of those that have one for certain.
        rows: All listening sockets; one without an owner may be any unit's that can have one.
        reason: Why there may be more of them; None when there are not.
    """
    rows = tuple(rows)
    why = explain_unowned(rows) or reason
    behind = explain_unexplained(rows)
    passed = explain_passed(row.socket for row in rows)
    doubtful = (
        (unit, (behind if unit.unit_type == "socket" else passed.get(unit.name)) or why)
        for unit in units
        if unit.name not in found and _can_listen(unit)
    )
    return tuple(
        Unavailable(f"Whether {unit.name} listens is not known: {doubt}.", subject=unit.name)
        for unit, doubt in doubtful
        if doubt is not None
    )


def explain_unexplained(rows: Iterable[ListeningSocket]) -> str | None:
    """That managers hold sockets for units that are not known; None when all are known."""
    unknown = {row.socket for row in rows if is_unexplained(row.socket)}
    if not unknown:
        return None
    return f"which unit its manager holds {_many(unknown)} for is not known"


def explain_passed(sockets: Iterable[Socket]) -> dict[str, str]:
    """Units that a .socket may have passed its socket to, and why it is not known whether."""
    return {
        name: f"whether {socket.socket_unit} has passed it a socket is not seen: "
        f"{socket.holders_reason}"
        for socket in sockets
        if socket.holders is None
        for name in socket.activates
    }


def _many(sockets: Collection[Socket]) -> str:
    return "1 socket" if len(sockets) == 1 else f"{len(sockets)} sockets"


def _can_listen(unit: Unit) -> bool:
    """Whether the unit is in a state to have sockets: its own, or the manager's for it."""
    if unit.unit_type == "socket" and unit.active_state not in ENDED:
        return True
    # Slices have a cgroup too, and only other units in it.
    return unit.control_group is not None and unit.unit_type != "slice"


def explain_unowned(rows: Iterable[ListeningSocket]) -> str | None:
    """Why it is not known whose some of the sockets are; None when it is known of all."""
    sockets = [row.socket for row in rows if row.unit is None]
    unknown = [s for s in sockets if s.creator is None and s.holders is None]
    if not unknown:
        return None
    return f"the owner of {_many(unknown)} is not known: {_unknown_hint(unknown)}"
