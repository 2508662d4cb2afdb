"""Sockets: what the kernel says of them, who made them and who holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sdtool.model.process import Container, ProcessRef


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
    """A .socket unit with what it listens on.

    Attributes:
        namespace_path: Its NetworkNamespacePath=; None for where its manager is.
        netns: Inode of the network namespace it listens in; None when that is not known.
        device: Its BindToDevice=; None without one.
        triggers: The units that it starts.
        is_inactive: It does not listen, by what its manager says.
    """

    name: str
    listens: tuple[ListenAddress, ...]
    namespace_path: str | None = None
    netns: int | None = None
    device: str | None = None
    triggers: tuple[str, ...] = ()
    is_inactive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FdStore:
    """Descriptors that a manager keeps for a service, systemd.service(5) FileDescriptorStoreMax=.

    Attributes:
        inodes: Of the sockets in it; None when the manager does not tell (before systemd 254).
    """

    unit: str
    inodes: frozenset[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagersSockets:
    """What one manager holds sockets for.

    Attributes:
        manager: As in ``Creator``.
        pid: Its own process; None when that is not known.
        units: Its .socket units.
        stores: Its services with anything in their fd store.
        held: The inodes of the sockets that it held after it had told these; None when that may
            not be seen.
    """

    manager: str
    pid: int | None = None
    units: tuple[SocketUnit, ...] = ()
    stores: tuple[FdStore, ...] = ()
    held: frozenset[int] | None = None


class SocketSource(StrEnum):
    """Who told of a socket: what PROCFS (/proc/net) does not show, sock_diag does.

    ``COPY`` is a copy of a process's descriptor, of a socket that neither of them lists.
    """

    SOCK_DIAG = "sock_diag"
    PROCFS = "procfs"
    COPY = "pidfd_getfd"


class SocketStates(StrEnum):
    """Sockets in which states: to ask for less is faster.

    ``LISTENING`` are those that take connections or datagrams from anybody: LISTEN, unconnected
    UDP, AF_UNIX with a name. ``OWNING`` are all that own their port: connected UDP too, and of TCP
    those that are bound and do not listen. Of one port these come only from a network namespace
    where nobody listens on it.
    """

    ALL = "all"
    LISTENING = "listening"
    OWNING = "owning"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFilter:
    """Which sockets are asked for.

    Attributes:
        protocols: tcp, mptcp, udp, unix.
        port: Only those with this local port; 0 for all.
        cgroups: Only those made in one of these, by id; None for all. AF_UNIX has no such id,
            and all of its sockets come.
    """

    protocols: tuple[str, ...] = ("tcp", "mptcp", "udp")
    states: SocketStates = SocketStates.ALL
    port: int = 0
    cgroups: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """One socket as the kernel shows it.

    Attributes:
        address: None for AF_UNIX, as the port.
        path: Its name for AF_UNIX, None when it has none; an abstract one begins with "@".
        state: The kernel's name without TCP_; BOUND for bound and not listening, UNCONN for
            an unconnected UDP socket.
        inode: None when no process holds it (TIME_WAIT and other orphans).
        uid: None when the kernel does not say (AF_UNIX before Linux 5.3).
        cookie: The kernel's own identity of the socket, 8 bytes as a number.
        cgroup_id: The cgroup that created it (not who holds it); None when the kernel does
            not say.
        v6only: None when the kernel does not say (always for IPv4).
        expires_us: What is left of the timer that will free it, for TIME_WAIT and orphans in
            FIN_WAIT2.
        netns: Inode of its network namespace; None when that is hidden.
        netns_name: Its name below /run/netns, or the path of another mount; None without one.
        elsewhere: It is in another network namespace than ours.
        interface: Index of the device that it is bound to; None when to none.
        device: The name of that device, "if7" where its index has none (any more).
    """

    family: str
    protocol: str
    type: str
    address: str | None
    port: int | None
    peer_address: str | None
    peer_port: int | None
    state: str
    inode: int | None
    uid: int | None
    cookie: int
    cgroup_id: int | None
    v6only: bool | None
    expires_us: int | None
    netns: int | None
    interface: int | None = None
    device: str | None = None
    netns_name: str | None = None
    elsewhere: bool = False
    path: str | None = None
    source: SocketSource = SocketSource.SOCK_DIAG


def endpoint(address: str, port: int | None) -> str:
    """Both as users type them: IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def inodes_of(rows: Iterable[SocketFacts]) -> frozenset[int]:
    """Of the sockets that a process can hold."""
    return frozenset(row.inode for row in rows if row.inode)


def owns_port(row: SocketFacts | Socket) -> bool:
    """Whether a socket in this state owns its local port: a connection accepted on it does not."""
    return row.protocol == "udp" or row.state in ("LISTEN", "BOUND")


def is_listening(row: SocketFacts | Socket) -> bool:
    """Whether it takes connections or datagrams from anybody who knows its address."""
    named = row.family != "unix" or row.path is not None
    return named and row.state in ("LISTEN", "UNCONN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Creator:
    """The cgroup that a socket was created in.

    Attributes:
        unit: The innermost unit of that cgroup; None outside every unit.
        manager: Whose unit it is: a ``Scope``, USER the manager asked, or a user@UID.service.
        control_group: Its path.
        container: The container that the cgroup is of, by its path.
    """

    unit: str | None
    manager: str | None
    control_group: str
    container: Container | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process with a descriptor of the socket.

    Attributes:
        unit, manager, container: As in ``Creator``.
        is_manager: It is the manager itself, and no other process in its init.scope.
    """

    pid: int
    comm: str
    unit: str | None
    manager: str | None
    container: Container | None = None
    is_manager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderScan:
    """What a look through processes' descriptors found.

    Attributes:
        by_inode: (socket inode, holding process, its cgroup), sorted.
        complete: All processes of this pid namespace were looked at.
        reason: Which were not, and what would permit it; None when complete or not needed.
        outside: There are processes outside this pid namespace.
    """

    by_inode: tuple[tuple[int, ProcessRef, str | None], ...] = ()
    complete: bool = False
    reason: str | None = None
    outside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """A socket with the two facts about its owner: who created it, and who holds it.

    Attributes:
        type: stream, dgram or seqpacket.
        path: For unix sockets; an abstract name begins with "@".
        netns, netns_name, elsewhere, expires_us: As in ``SocketFacts``.
        device: The only one it is reached by, SO_BINDTODEVICE; None when by any, or not known
            (``source`` is procfs).
        peer: "address:port" of the other end, None when there is none.
        creator_reason: Why ``creator`` is None.
        holders: None when they may not be seen (``holders_reason`` says why).
        holders_complete: All processes were looked at, so there are no others.
        socket_unit: The .socket unit that listens on it.
        activates: The units that this starts, and passes the socket to.
        fd_store_unit: The service that its manager keeps it for.
        behind_manager: Whose units these two are, as in ``Creator``.
        source: Who told of it.
    """

    family: str
    protocol: str
    type: str
    address: str | None
    port: int | None
    path: str | None
    state: str
    inode: int | None
    uid: int | None
    v6only: bool | None
    netns: int | None
    netns_name: str | None
    elsewhere: bool
    peer: str | None
    expires_us: int | None
    creator: Creator | None
    creator_reason: str | None
    holders: tuple[Holder, ...] | None
    holders_complete: bool
    holders_reason: str | None
    socket_unit: str | None
    fd_store_unit: str | None = None
    behind_manager: str | None = None
    activates: tuple[str, ...] = ()
    device: str | None = None
    source: SocketSource = SocketSource.SOCK_DIAG
