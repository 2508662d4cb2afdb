"""Sockets, who made them, who holds them, and what that says about a port."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sdtool.model.process import ProcessRef


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
class ListenAddress:
    """One Listen*= line of a .socket unit, as its Listen property gives it.

    Attributes:
        type: Stream, Datagram, SequentialPacket, FIFO ... in systemd's spelling.
        address: "127.0.0.1:80", "[::]:80", "/run/x.sock", "@abstract".
    """

    type: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketUnit:
    """A .socket unit with what it listens on."""

    name: str
    listens: tuple[ListenAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """One socket as NETLINK_SOCK_DIAG shows it.

    Attributes:
        state: The kernel's name without TCP_; BOUND for bound and not listening, UNCONN for
            an unconnected UDP socket.
        inode: None when no process holds it (TIME_WAIT and other orphans).
        cookie: The kernel's own identity of the socket, 8 bytes as a number.
        cgroup_id: The cgroup that created it (not who holds it); None when the kernel does
            not say.
        v6only: None when the kernel does not say (always for IPv4).
        expires_us: What is left of the timer that will free it, for TIME_WAIT and orphans.
        netns: Inode of its network namespace.
        interface: Index of the device that it is bound to; None when to none.
    """

    family: str
    protocol: str
    type: str
    address: str
    port: int
    peer_address: str | None
    peer_port: int | None
    state: str
    inode: int | None
    uid: int
    cookie: int
    cgroup_id: int | None
    v6only: bool | None
    expires_us: int | None
    netns: int | None
    interface: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Creator:
    """The cgroup that a socket was created in.

    Attributes:
        unit: The innermost unit of that cgroup; None outside every unit.
        manager: Whose unit it is: a ``Scope``, USER the manager asked, or a user@UID.service.
        control_group: Its path.
    """

    unit: str | None
    manager: str | None
    control_group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process with a descriptor of the socket; unit and manager as in ``Creator``."""

    pid: int
    comm: str
    unit: str | None
    manager: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderScan:
    """What a look through processes' descriptors found.

    Attributes:
        by_inode: (socket inode, holding process, its cgroup), sorted.
        complete: All processes of this pid namespace were looked at.
        reason: Which were not, and what would permit it; None when complete or not needed.
    """

    by_inode: tuple[tuple[int, ProcessRef, str | None], ...] = ()
    complete: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """A socket with the two facts about its owner: who created it, and who holds it.

    Attributes:
        type: stream, dgram or seqpacket.
        path: For unix sockets; an abstract name begins with "@".
        creator_reason: Why ``creator`` is None.
        holders: None when they may not be seen (``holders_reason`` says why).
        holders_complete: All processes were looked at, so there are no others.
        socket_unit: The .socket unit that listens on it.
    """

    family: str
    protocol: str
    type: str
    address: str | None
    port: int | None
    path: str | None
    state: str
    inode: int | None
    uid: int
    v6only: bool | None
    netns: int | None
    netns_name: str | None
    creator: Creator | None
    creator_reason: str | None
    holders: tuple[Holder, ...] | None
    holders_complete: bool
    holders_reason: str | None
    socket_unit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortOwner:
    """One owner of a port.

    Attributes:
        unit: None for processes outside every unit, and for the kernel.
        manager: Whose unit it is, as in ``Creator``.
        holders: The holders of the socket that belong to this owner.
    """

    unit: str | None
    manager: str | None
    via: Via
    holders: tuple[Holder, ...]
    socket: Socket


@dataclass(frozen=True, slots=True, kw_only=True)
class PortBlock:
    """A connection that keeps a port from being bound although nobody listens.

    Attributes:
        expires_us: When its timer frees it, from now; None when it has none.
        peer: "address:port" of the other end.
        unit: Who made it, when the kernel still says.
    """

    state: str
    expires_us: int | None
    peer: str | None
    unit: str | None


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
    """One listening socket with the unit that owns it; None is no unit or not known."""

    unit: str | None
    manager: str | None
    socket: Socket
