"""What sockets say about a port: who owns it, and through which door; what blocks it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sdtool.model.process import Container
from sdtool.model.sockets import Holder, Socket


class PortVerdict(StrEnum):
    """Whether a port has an owner; ``BLOCKED`` has none and cannot be bound all the same."""

    OWNED = "owned"
    BLOCKED = "blocked"
    FREE = "free"
    UNKNOWN = "unknown"


class Via(StrEnum):
    """Through which door a unit owns a port."""

    HOLDER = "holder"
    CREATOR = "creator"
    SOCKET_UNIT = "socket-unit"
    FD_STORE = "fd-store"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSpec:
    """A port as asked for; ``protocol`` None means tcp and udp."""

    port: int
    protocol: str | None = None

    def __str__(self) -> str:
        """As the user would write it: 8080 or 8080/tcp."""
        return f"{self.port}/{self.protocol}" if self.protocol else str(self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPort:
    """A container's port that a proxy outside hands on to, as the proxy's command line says.

    Attributes:
        unit: Who listens there, in whatever network namespace has the address; None when nobody
            was found.
        container: The container of who listens there.
    """

    address: str
    port: int
    protocol: str
    unit: str | None
    container: Container | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortOwner:
    """One owner of a port.

    Attributes:
        unit: None for processes outside every unit, and for the kernel.
        manager: Whose unit it is, as in ``Creator``.
        container: The container that its processes are in.
        holders: The holders of the socket that belong to this owner.
        published: Where it hands on to, when it is a container runtime's proxy.
    """

    unit: str | None
    manager: str | None
    via: Via
    holders: tuple[Holder, ...]
    socket: Socket
    container: Container | None = None
    published: PublishedPort | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortBlock:
    """A connection that keeps a port from being bound although nobody listens.

    Attributes:
        expires_us: When its timer frees it, from now; None when it has none.
        peer: "address:port" of the other end.
        unit: Whose process holds it, else who made it; None when it is of none.
        unit_reason: Why that is not known; None where it is, and where it is nobody's any more.
        manager: Whose unit that is, as in ``Creator``.
        holders: As in ``Socket``; an orphan has none.
        netns, netns_name, elsewhere: The network namespace that it is in, as in ``Socket``.
    """

    state: str
    expires_us: int | None
    peer: str | None
    unit: str | None
    unit_reason: str | None
    manager: str | None
    holders: tuple[Holder, ...] | None
    netns: int | None
    netns_name: str | None
    elsewhere: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PortOwnership:
    """Which unit owns a port.

    Attributes:
        protocol: tcp or udp; None when neither was asked for and neither has anything.
    """

    port: int
    protocol: str | None
    verdict: PortVerdict
    owners: tuple[PortOwner, ...]
    blocked_by: tuple[PortBlock, ...]
    hint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningSocket:
    """One listening socket with the unit that owns it; None is no unit or not known.

    Attributes:
        unit_reason: Why it is not known; None where it is, and where it is of no unit.
    """

    unit: str | None
    unit_reason: str | None
    manager: str | None
    socket: Socket
