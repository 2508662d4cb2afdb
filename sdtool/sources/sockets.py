"""Sockets, from the kernel over NETLINK_SOCK_DIAG: what there is, and what is destroyed.

It is the only source that names the creating cgroup of another user's socket without privilege,
and the fastest. It sees one network namespace: the caller's. Filters (protocol, state, port) run
in the kernel, because a row costs 5 us in Python.

Source: sock_diag(7), linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sdtool.errors import Unavailable
from sdtool.model.sockets import SocketFacts
from sdtool.model.stop import Event, EventKind, EventSource
from sdtool.sources.processes import read_netns

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 0x1
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR = 2
NLMSG_DONE = 3

NLMSGHDR = struct.Struct("=IHHII")
REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
SOCKID = struct.Struct("=2s2s16s16sI8s")  # sport, dport, src, dst, interface, cookie
MESSAGE = struct.Struct("=4B2s2s16s16sI8s5I")
ATTRIBUTE = struct.Struct("=HH")

INET_DIAG_SKV6ONLY = 11
INET_DIAG_CGROUP_ID = 21
INET_DIAG_REQ_BYTECODE = 1
INET_DIAG_REQ_PROTOCOL = 3
INET_DIAG_BC_S_EQ = 11

# tcp_states.h; BOUND_INACTIVE (since 6.8) is asked for with bit 13 and answers as CLOSE.
STATES = (
    *("UNKNOWN", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"),
    *("CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV", "BOUND"),
)
STATE_LISTEN = 1 << 10
STATE_CLOSE = 1 << 7
ALL_STATES = 0x3FFF

PROTOCOLS: Mapping[str, int] = {"tcp": 6, "udp": 17, "mptcp": 262}
SOCKET_TYPES: Mapping[str, str] = {"tcp": "stream", "udp": "dgram", "mptcp": "stream"}

MAX_INTERRUPTED_DUMPS = 3


@dataclass(frozen=True, slots=True)
class Query:
    """What to ask the kernel for.

    Attributes:
        states: Bit n for state n.
        port: Only sockets of this local port, 0 for all.
    """

    protocol: str
    family: int = socket.AF_INET
    states: int = ALL_STATES
    port: int = 0

    def pack(self) -> bytes:
        """As struct inet_diag_req_v2 with its attributes."""
        number = PROTOCOLS[self.protocol]
        body = REQUEST.pack(self.family, min(number, 255), 0, self.states)
        sport = struct.pack("!H", self.port)
        body += SOCKID.pack(sport, b"", b"", b"", 0, b"\xff" * 8)
        if number > 255:
            body += ATTRIBUTE.pack(8, INET_DIAG_REQ_PROTOCOL) + struct.pack("=I", number)
        if self.port:
            program = struct.pack("=BBHBBH", INET_DIAG_BC_S_EQ, 8, 12, 0, 0, self.port)
            body += ATTRIBUTE.pack(4 + len(program), INET_DIAG_REQ_BYTECODE) + program
        return NLMSGHDR.pack(
            NLMSGHDR.size + len(body),
            SOCK_DIAG_BY_FAMILY,
            NLM_F_REQUEST | NLM_F_DUMP,
            1,
            0,
        ) + body  # fmt: skip


def read_listeners() -> tuple[SocketFacts, ...]:
    """Every socket that takes connections or datagrams: TCP and MPTCP LISTEN, unconnected UDP."""
    return _read_inet(
        Query(protocol, family, STATE_CLOSE if protocol == "udp" else STATE_LISTEN)
        for protocol in PROTOCOLS
        for family in (socket.AF_INET, socket.AF_INET6)
    )


def read_port(port: int, protocols: tuple[str, ...]) -> tuple[SocketFacts, ...]:
    """Every socket with this local port, in whatever state."""
    found = _read_inet(
        Query(protocol, family, port=port)
        for protocol in protocols
        for family in (socket.AF_INET, socket.AF_INET6)
    )
    # The kernel does not apply the filter to rows that are bound and inactive.
    return tuple(row for row in found if row.port == port)


def read_sockets() -> tuple[SocketFacts, ...]:
    """Every TCP, MPTCP and UDP socket, in whatever state."""
    return _read_inet(
        Query(protocol, family)
        for protocol in PROTOCOLS
        for family in (socket.AF_INET, socket.AF_INET6)
    )


def _read_inet(queries: Iterator[Query]) -> tuple[SocketFacts, ...]:
    netns = read_netns("thread-self")
    found = {}
    for query in queries:
        for row in _dump(query):
            facts = parse_message(row, query.protocol, netns)
            # An MPTCP listener shows its TCP subflow too, with a cookie of its own.
            found[query.protocol, facts.cookie, facts.inode, facts.peer_port] = facts
    return tuple(sorted(found.values(), key=_by_address))


def _by_address(row: SocketFacts) -> tuple[int, str, str, str, int]:
    return row.port, row.protocol, row.family, row.address, row.peer_port or 0


def _dump(query: Query) -> list[bytes]:
    """One dump, repeated when the kernel says that the table changed under it."""
    rows: list[bytes] = []
    for _ in range(MAX_INTERRUPTED_DUMPS):
        try:
            rows, interrupted = _dump_once(query)
        except OSError as error:
            if _is_absent(query, error.errno):
                return []
            raise Unavailable(
                f"The kernel does not list {query.protocol} sockets: "
                f"{os.strerror(error.errno or 0)} (NETLINK_SOCK_DIAG).",
                hint=f"modprobe {query.protocol}_diag, if the kernel has it as a module",
            ) from error
        if not interrupted:
            break
    return rows


def _is_absent(query: Query, code: int | None) -> bool:
    """Whether the error says that there can be no such sockets, not that they cannot be listed."""
    if query.protocol == "mptcp":
        return code in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EINVAL)
    return query.family == socket.AF_INET6 and code in (errno.EINVAL, errno.EAFNOSUPPORT)


def _dump_once(query: Query) -> tuple[list[bytes], bool]:
    rows: list[bytes] = []
    interrupted = False
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(5.0)
        netlink.sendto(query.pack(), (0, 0))
        while True:
            for kind_of, flags, payload in parse_messages(netlink.recv(1 << 18)):
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if kind_of in (NLMSG_DONE, NLMSG_ERROR):
                    _raise_errno(payload)
                    return rows, interrupted
                rows.append(payload)


def _raise_errno(payload: bytes) -> None:
    """A failed dump carries its errno in NLMSG_DONE, not in NLMSG_ERROR."""
    if len(payload) >= 4:
        (code,) = struct.unpack_from("=i", payload)
        if code:
            raise OSError(-code, os.strerror(-code))


def parse_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, payload) of each netlink message in a datagram; a truncated one is dropped."""
    offset = 0
    while offset + NLMSGHDR.size <= len(data):
        length, kind, flags, _, _ = NLMSGHDR.unpack_from(data, offset)
        if length < NLMSGHDR.size or offset + length > len(data):
            return
        yield kind, flags, data[offset + NLMSGHDR.size : offset + length]
        offset += (length + 3) & ~3


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """The rtattr list behind a message."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


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
        state=_state(protocol, state),
        inode=inode or None,
        uid=uid,
        cookie=int.from_bytes(row[9], sys.byteorder),
        cgroup_id=int.from_bytes(cgroup[:8], sys.byteorder) if cgroup else None,
        v6only=bool(v6only[0]) if v6only else None,
        expires_us=expires_ms * 1000 if timer else None,
        netns=netns,
        interface=row[8] or None,
    )


def _address(family: int, raw: bytes) -> str:
    return socket.inet_ntop(family, raw[:4] if family == socket.AF_INET else raw)


def _state(protocol: str, number: int) -> str:
    if number == 7:
        return "UNCONN" if protocol == "udp" else "BOUND"
    return STATES[number] if number < len(STATES) else str(number)


class SocketObserver:
    """Tells when listening sockets of a unit are destroyed, by the kernel's own notification.

    The groups SKNLGRP_INET_TCP_DESTROY .. INET6_UDP_DESTROY of sock_diag; any user may listen.
    Notifications trail the close by tens of milliseconds (an RCU grace period).
    """

    name = "sock_diag"

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._by_cookie: dict[int, SocketFacts] = {}
        self.lost = 0
        self._netlink: socket.socket | None = None
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._netlink = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
            self._netlink.bind((0, 0b1111))
            self.available, self.reason = True, "sockets destroyed, by the kernel's notification"
        except OSError as error:
            self.close()
            self.available = False
            self.reason = f"no destroy notifications: {os.strerror(error.errno or 0)}"

    def watch(self, sockets: Iterable[SocketFacts]) -> None:
        """Tell of these sockets from now on, and of what happened to them since the start."""
        self._by_cookie.update((row.cookie, row) for row in sockets)

    def fileno(self) -> int:
        """Readable when there is something to read; -1 when not available."""
        return self._netlink.fileno() if self._netlink is not None else -1

    def read_events(self) -> tuple[Event, ...]:
        """The watched sockets that were destroyed since the last call."""
        events: list[Event] = []
        while self._netlink is not None:
            try:
                data = self._netlink.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                continue
            events.extend(self._parse(data))
        return tuple(events)

    def _parse(self, data: bytes) -> Iterator[Event]:
        now = time.monotonic_ns() // 1000
        for _, _, payload in parse_messages(data):
            if len(payload) < MESSAGE.size:
                continue
            cookie = int.from_bytes(MESSAGE.unpack_from(payload)[9], sys.byteorder)
            row = self._by_cookie.pop(cookie, None)
            if row is not None:
                yield Event(
                    unit=self._unit,
                    at_us=now,
                    kind=EventKind.PORT_RELEASED,
                    source=EventSource.SOCKETS,
                    protocol=row.protocol,
                    address=row.address,
                    port=row.port,
                )

    def close(self) -> None:
        """Stop listening."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
