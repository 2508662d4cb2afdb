"""Whether a port could be bound now, and what is in the way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sdtool.model.sockets import Socket, SocketFacts, endpoint


class BindVerdict(StrEnum):
    """Whether a plain bind, and listen for TCP, would succeed now."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class ReuseOption(StrEnum):
    """A socket option that lets two sockets have one address; socket(7)."""

    REUSEADDR = "SO_REUSEADDR"
    REUSEPORT = "SO_REUSEPORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class BindSpec:
    """An address and a port as asked for.

    Attributes:
        address: As the kernel writes it, without brackets and scope.
        interface: The scope of a link-local address, by name or index.
        dual: It was written as "*": all addresses of both families, whatever
            net.ipv6.bindv6only says.
    """

    address: str
    port: int
    protocol: str = "tcp"
    interface: str | None = None
    dual: bool = False

    def __str__(self) -> str:
        """As the user would write it: 127.0.0.1:80/tcp, [fe80::1%lo]:80/udp, *:80/tcp."""
        host = f"{self.address}%{self.interface}" if self.interface else self.address
        return f"{endpoint('*' if self.dual else host, self.port)}/{self.protocol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """What the kernel made of a socket of our own that was bound to the address, with no port.

    Attributes:
        refusal: The name of the errno that it met; None when it may be bound. EPERM and EACCES
            may be about ports, and not about this address.
        v6only: It takes no IPv4; None for IPv4 itself.
        interface: Index of the device that the address bound it to; None when to none.
        uid: Who it belongs to, which is who asks.
    """

    address: str
    protocol: str
    refusal: str | None
    v6only: bool | None
    interface: int | None
    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """The options of a socket that decide with whom it shares its address.

    Attributes:
        v6only: None for IPv4.
    """

    reuseaddr: bool
    reuseport: bool
    v6only: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionScan:
    """The options of sockets, as their holders' descriptors tell.

    Attributes:
        by_inode: (socket inode, its options).
        reason: Why those of others could not be read, and what would permit it; None when none
            of them was refused.
    """

    by_inode: tuple[tuple[int, SocketOptions], ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A socket that has the port.

    Attributes:
        options: None when they could not be read.
    """

    row: SocketFacts
    options: SocketOptions | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortPermission:
    """Whether a port is ours to bind.

    Attributes:
        permitted: None when that is not known.
        reason: Why it is not, with the errno in front, or why it is not known; None when it is.
    """

    permitted: bool | None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRule:
    """Some ports, as SocketBindAllow= and SocketBindDeny= name them; systemd.resource-control(5).

    Attributes:
        family: inet or inet6; None for both.
        protocol: tcp or udp; None for both.
    """

    family: str | None
    protocol: str | None
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BindRules:
    """What a unit lets its processes bind: all but what is denied and not allowed."""

    unit: str
    allow: tuple[PortRule, ...]
    deny: tuple[PortRule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BindScene:
    """All that decides about one bind.

    Attributes:
        occupants: Every socket of the protocol with that port in our network namespace.
        meeting: (index of a device, whether a TCP socket bound to it meets one bound to none),
            for the devices that occur; None when that is not known.
        options_reason: Why there are occupants whose options could not be read, as in
            ``OptionScan``.
        unseen_reason: Why there may be sockets that are not among ``occupants``.
    """

    newcomer: Newcomer
    permission: PortPermission
    occupants: tuple[Occupant, ...]
    meeting: tuple[tuple[int, bool | None], ...] = ()
    options_reason: str | None = None
    unseen_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BindConflict:
    """A socket that is in the way, or may be.

    Attributes:
        unit: Who owns it; None is no unit, or not known.
        unit_reason: Why the unit is not known; None when it is, or when there is none.
        manager: Whose unit it is, as in ``Creator``.
        reason: What keeps it there.
    """

    socket: Socket
    unit: str | None
    unit_reason: str | None
    manager: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BindAnswer:
    """Whether a port could be bound now.

    Attributes:
        v6only: Whether the newcomer would take no IPv4; None for IPv4 itself, and when its
            address was refused.
        verdict: About a socket without any option.
        verdict_reason: With the errno in front, when it is known.
        needs: The fewest options that are known to make it a yes; empty when it is one. None when
            none would, or when that is not known.
        needs_reason: Which of these, and why; None when the verdict is yes.
        conflicts: What is in the way; with an unknown verdict, what may be.
    """

    address: str
    port: int
    protocol: str
    interface: str | None
    v6only: bool | None
    verdict: BindVerdict
    verdict_reason: str
    needs: tuple[ReuseOption, ...] | None
    needs_reason: str | None
    conflicts: tuple[BindConflict, ...]
