"""Sockets, from the kernel over NETLINK_SOCK_DIAG: TCP, MPTCP, UDP and AF_UNIX.

It is the only source that names the creating cgroup of another user's socket without privilege,
and the fastest. It sees one network namespace: the calling thread's. Filters (protocol, state,
port, cgroup) run in the kernel, because a row costs 5 us in Python. Where the kernel has no
sock_diag for us, ``procnet`` reads the same from text files, with less in it.

Source: sock_diag(7), linux/sock_diag.h, linux/inet_diag.h, linux/unix_diag.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from sdtool.errors import Unavailable
from sdtool.model.sockets import SocketFacts, SocketFilter, SocketStates, is_listening, owns_port
from sdtool.sources.netlink import (
    SOCK_DIAG_BY_FAMILY,
    TCPDIAG_GETSOCK,
    dump,
    pack_attribute,
    parse_attributes,
)
from sdtool.sources.processes import read_netns

REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
OLD_REQUEST = struct.Struct("=4B48sII")  # family, lengths, extensions, sockid, states, (dbs)
SOCKID = struct.Struct("=2s2s16s16sI8s")  # sport, dport, src, dst, interface, cookie
MESSAGE = struct.Struct("=4B2s2s16s16sI8s5I")
UNIX_REQUEST = struct.Struct("=BBxxIII8s")  # family, protocol, states, inode, show, cookie
UNIX_MESSAGE = struct.Struct("=4BI8s")  # family, type, state, pad, inode, cookie

INET_DIAG_SKV6ONLY = 11
INET_DIAG_CGROUP_ID = 21
INET_DIAG_REQ_BYTECODE = 1
INET_DIAG_REQ_PROTOCOL = 3
INET_DIAG_BC_S_EQ = 11
INET_DIAG_BC_CGROUP_COND = 13

UDIAG_SHOW_NAME = 1
UDIAG_SHOW_UID = 0x40
UNIX_DIAG_NAME = 0
UNIX_DIAG_UID = 7

# tcp_states.h; BOUND_INACTIVE (since 6.8) is asked for with bit 13 and answers as CLOSE.
STATES = (
    *("UNKNOWN", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"),
    *("CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV", "BOUND"),
)
FIN_WAIT2 = 5
CLOSE = 7
STATE_LISTEN = 1 << 10
STATE_CLOSE = 1 << CLOSE
STATE_BOUND = 1 << 13
STATES_OWNING = STATE_LISTEN | STATE_BOUND
ALL_STATES = 0x3FFF

TIMER_KEEPALIVE = 2
TIMER_TIME_WAIT = 3

PROTOCOLS: Mapping[str, int] = {"tcp": 6, "udp": 17, "mptcp": 262}
SOCKET_TYPES: Mapping[str, str] = {"tcp": "stream", "udp": "dgram", "mptcp": "stream"}
UNIX_TYPES: Mapping[int, str] = {1: "stream", 2: "dgram", 5: "seqpacket"}

MAX_CGROUPS = 20
"""Conditions in one filter: a jump to its end is a byte long, and a condition twelve."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to ask the kernel for: the sockets of one protocol.

    Attributes:
        family: AF_UNSPEC for both, which only TCP's own kind of request can: one walk through
            the kernel's tables instead of two.
        states: Bit n for state n.
        port: Only sockets of this local port, 0 for all.
        cgroups: Only sockets made in one of these, by id; none for all. Not with a port.
    """

    protocol: str
    family: int = socket.AF_UNSPEC
    states: int = ALL_STATES
    port: int = 0
    cgroups: tuple[int, ...] = ()

    @property
    def kind(self) -> int:
        """The type of the request."""
        return TCPDIAG_GETSOCK if self.family == socket.AF_UNSPEC else SOCK_DIAG_BY_FAMILY

    def pack(self) -> bytes:
        """As struct inet_diag_req_v2, or inet_diag_req for both families, with its attributes."""
        number = PROTOCOLS[self.protocol]
        sport = struct.pack("!H", self.port)
        sockid = SOCKID.pack(sport, b"", b"", b"", 0, b"\xff" * 8)
        if self.family == socket.AF_UNSPEC:
            body = OLD_REQUEST.pack(self.family, 0, 0, 0, sockid, self.states, 0)
        else:
            body = REQUEST.pack(self.family, min(number, 255), 0, self.states) + sockid
        if number > 255:
            body += pack_attribute(INET_DIAG_REQ_PROTOCOL, struct.pack("=I", number))
        if self.port:
            program = struct.pack("=BBHBBH", INET_DIAG_BC_S_EQ, 8, 12, 0, 0, self.port)
            body += pack_attribute(INET_DIAG_REQ_BYTECODE, program)
        elif self.cgroups:
            body += pack_attribute(INET_DIAG_REQ_BYTECODE, _pack_cgroups(self.cgroups))
        return body


def _pack_cgroups(ids: tuple[int, ...]) -> bytes:
    """A filter that lets pass what was made in one of the cgroups.

    Each condition jumps to the very end when it holds, else to the next; behind the last one a
    jump beyond the end says no.
    """
    size = 12
    last = len(ids) - 1
    return b"".join(
        struct.pack(
            "=BBHQ",
            INET_DIAG_BC_CGROUP_COND,
            size * (len(ids) - index),
            size if index < last else size + 4,
            number,
        )
        for index, number in enumerate(ids)
    )


def read_sockets(
    wanted: SocketFilter, diag: socket.socket | None = None
) -> tuple[SocketFacts, ...]:
    """The sockets of this thread's network namespace, by port and address, then by path.

    Args:
        diag: Made by ``netlink.open_diag`` in the namespace to ask instead; the sockets are then
            said to be in this thread's all the same.

    Raises:
        Unavailable: The kernel does not list them.
    """
    netns = read_netns("thread-self")
    found: dict[tuple[object, ...], SocketFacts] = {}
    families: set[int] = set()
    for query in _queries(wanted):
        if _is_needless(query, families):
            continue
        for row in _ask(query, diag):
            facts = _with_device(parse_message(row, query.protocol, netns))
            if _is_wanted(facts, wanted):
                # An MPTCP listener shows its TCP subflow too, with a cookie of its own.
                found[query.protocol, facts.cookie, facts.inode, facts.peer_port] = facts
                families.add(row[0])
    if "unix" in wanted.protocols:
        named = wanted.states is not SocketStates.ALL
        for row in _dump(pack_unix_query(named), "unix", socket.AF_UNIX, diag):
            facts = parse_unix_message(row, netns)
            if facts.path is not None or not named:
                found["unix", facts.cookie] = facts
    return tuple(sorted(found.values(), key=by_address))


def split(protocols: Collection[str]) -> list[tuple[str, ...]]:
    """The protocols, those apart that the kernel lists independently of each other."""
    parts = (("tcp", "mptcp"), ("udp",), ("unix",))
    found = [tuple(one for one in part if one in protocols) for part in parts]
    return [part for part in found if part]


def _with_device(row: SocketFacts) -> SocketFacts:
    return row if row.interface is None else replace(row, device=name_device(row.interface))


def name_device(index: int) -> str:
    """A device of this thread's network namespace; one that is not there (any more) as "if7"."""
    with contextlib.suppress(OSError):
        return socket.if_indextoname(index)
    return f"if{index}"


def _is_needless(query: Query, families: set[int]) -> bool:
    """Whether what was seen of a port says already that a walk of milliseconds finds nothing.

    What is bound beside a socket that listens is left to a look at all states. And every MPTCP
    socket has a part that is TCP's, and has the port.

    Args:
        families: Of the sockets that were found.
    """
    if not query.port:
        return False
    if query.states == STATE_BOUND:
        return bool(families)  # never when these are asked for first
    return query.protocol == "mptcp" and query.family not in families


def read_inodes() -> frozenset[int]:
    """Of every socket with a port in this thread's network namespace, and nothing else of them.

    Those of a protocol that the kernel does not list are missing.
    """
    found: set[int] = set()
    for query in _queries(SocketFilter()):
        with contextlib.suppress(Unavailable):
            found.update(MESSAGE.unpack_from(row)[14] for row in _ask(query))
    return frozenset(found)


def _is_wanted(row: SocketFacts, wanted: SocketFilter) -> bool:
    """The kernel does not apply its filter to rows that are bound and inactive."""
    if wanted.cgroups is not None and row.cgroup_id not in wanted.cgroups:
        return False
    return wanted.port in (0, row.port)


def fits(row: SocketFacts, wanted: SocketFilter) -> bool:
    """Whether a socket is one of those wanted, wherever it was made."""
    if row.protocol not in wanted.protocols or wanted.port not in (0, row.port):
        return False
    if wanted.states is SocketStates.LISTENING:
        return is_listening(row)
    return wanted.states is SocketStates.ALL or owns_port(row)


def _queries(wanted: SocketFilter) -> Iterator[Query]:
    groups = wanted.cgroups or ()
    chunks = [groups[at : at + MAX_CGROUPS] for at in range(0, len(groups), MAX_CGROUPS)]
    if wanted.cgroups is None:
        chunks = [()]
    for protocol in wanted.protocols:
        if protocol not in PROTOCOLS:
            continue
        states = state_bits(wanted.states, protocol)
        turns: tuple[int, ...] = (states,)
        if states == STATES_OWNING:
            turns = (STATE_LISTEN, STATE_BOUND)
        elif wanted.port and states & STATE_BOUND and protocol == "tcp":
            # The kernel would list these last, when one of them may listen, and be in no list.
            turns = (STATE_BOUND, states & ~STATE_BOUND)
        families = (socket.AF_UNSPEC,) if protocol == "tcp" else (socket.AF_INET, socket.AF_INET6)
        for family, turn, chunk in product(families, turns, chunks):
            yield Query(protocol, family, turn, wanted.port, chunk)


def state_bits(states: SocketStates, protocol: str) -> int:
    """The states that are meant, bit n for state n."""
    if states is SocketStates.ALL:
        return ALL_STATES
    if protocol == "udp":
        return STATE_CLOSE if states is SocketStates.LISTENING else ALL_STATES
    return STATE_LISTEN if states is SocketStates.LISTENING else STATES_OWNING


def _ask(query: Query, diag: socket.socket | None = None) -> list[bytes]:
    return _dump(query.pack(), query.protocol, query.family, diag, query.kind)


def by_address(row: SocketFacts) -> tuple[int, str, str, str, int, str, int]:
    """The order of sockets in every answer."""
    return (
        row.port or 0,
        row.protocol,
        row.family,
        row.address or "",
        row.peer_port or 0,
        row.path or "",
        row.inode or 0,
    )


def _dump(
    body: bytes,
    protocol: str,
    family: int,
    diag: socket.socket | None = None,
    kind: int = SOCK_DIAG_BY_FAMILY,
) -> list[bytes]:
    try:
        return dump(body, diag, kind)
    except OSError as error:
        if _is_absent(protocol, family, error.errno):
            return []
        raise Unavailable(
            f"The kernel does not list {protocol} sockets: "
            f"{os.strerror(error.errno or 0)} (NETLINK_SOCK_DIAG).",
            hint=f"modprobe {protocol}_diag, if the kernel has it as a module"
            if error.errno == errno.ENOENT
            else None,
        ) from error


def _is_absent(protocol: str, family: int, code: int | None) -> bool:
    """Whether the error says that there can be no such sockets, not that they cannot be listed."""
    if protocol == "mptcp":
        return code in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EINVAL)
    return family == socket.AF_INET6 and code in (errno.EINVAL, errno.EAFNOSUPPORT)


def parse_message(data: bytes, protocol: str, netns: int | None) -> SocketFacts:
    """Read a struct inet_diag_msg with its attributes."""
    row = MESSAGE.unpack_from(data)
    family, state, timer = row[0], row[1], row[2]
    expires_ms, uid, inode = row[10], row[13], row[14]
    attributes = parse_attributes(data[MESSAGE.size :])
    cgroup = attributes.get(INET_DIAG_CGROUP_ID)
    v6only = attributes.get(INET_DIAG_SKV6ONLY)
    peer_port = int.from_bytes(row[5], "big")
    return SocketFacts(
        family="inet" if family == socket.AF_INET else "inet6",
        protocol=protocol,
        type=SOCKET_TYPES[protocol],
        address=_address(family, row[6]),
        port=int.from_bytes(row[4], "big"),
        peer_address=_address(family, row[7]) if peer_port else None,
        peer_port=peer_port or None,
        state=state_name(protocol, state),
        inode=inode or None,
        uid=uid,
        cookie=int.from_bytes(row[9], sys.byteorder),
        cgroup_id=int.from_bytes(cgroup[:8], sys.byteorder) if cgroup else None,
        v6only=bool(v6only[0]) if v6only else None,
        expires_us=expires_ms * 1000 if _frees(timer, state, inode) else None,
        netns=netns,
        interface=row[8] or None,
    )


def _frees(timer: int, state: int, inode: int) -> bool:
    """Whether a timer's end is the socket's; others only send something again."""
    if timer == TIMER_TIME_WAIT:
        return True
    return timer == TIMER_KEEPALIVE and state == FIN_WAIT2 and not inode


def _address(family: int, raw: bytes) -> str:
    return socket.inet_ntop(family, raw[:4] if family == socket.AF_INET else raw)


def state_name(protocol: str, number: int) -> str:
    """The kernel's name of a state without TCP_, with words for the two that CLOSE stands for."""
    if number == CLOSE:
        return "BOUND" if protocol in ("tcp", "mptcp") else "UNCONN"
    return STATES[number] if number < len(STATES) else str(number)


# AF_UNIX -------------------------------------------------------------------------------------


def pack_unix_query(named: bool) -> bytes:
    """A struct unix_diag_req for all sockets, or those that others may reach by a name."""
    states = STATE_LISTEN | STATE_CLOSE if named else ALL_STATES
    show = UDIAG_SHOW_NAME | UDIAG_SHOW_UID
    return UNIX_REQUEST.pack(socket.AF_UNIX, 0, states, 0, show, b"\xff" * 8)


def parse_unix_message(data: bytes, netns: int | None) -> SocketFacts:
    """Read a struct unix_diag_msg with its attributes; the kernel tells no creator of these."""
    _, kind, state, _, inode, cookie = UNIX_MESSAGE.unpack_from(data)
    attributes = parse_attributes(data[UNIX_MESSAGE.size :])
    uid = attributes.get(UNIX_DIAG_UID)
    return SocketFacts(
        family="unix",
        protocol="unix",
        type=UNIX_TYPES.get(kind, str(kind)),
        address=None,
        port=None,
        path=parse_unix_name(attributes.get(UNIX_DIAG_NAME, b"")),
        peer_address=None,
        peer_port=None,
        state=state_name("unix", state),
        inode=inode or None,
        uid=int.from_bytes(uid, sys.byteorder) if uid else None,
        cookie=int.from_bytes(cookie, sys.byteorder),
        cgroup_id=None,
        v6only=None,
        expires_us=None,
        netns=netns,
    )


def parse_unix_name(name: bytes) -> str | None:
    """A path, or an abstract name with "@" for its NUL; any bytes may be in it. None if unnamed.

    A path ends at its first NUL, an abstract name has none that ends it: unix(7).
    """
    if name.startswith(b"\0"):
        return "@" + os.fsdecode(name[1:])
    return os.fsdecode(name.partition(b"\0")[0]) or None
