"""Sockets from the text files of /proc/PID/net: for where sock_diag is closed to us.

Everybody may read those of any process, and so see the sockets of its network namespace without
entering it. They tell less: neither creator nor cookie, and no socket that is bound and does not
listen. An MPTCP socket is in there as TCP. net/unix is left alone: the names in it may hold a
newline, unescaped, and so forge the lines of other sockets.

Source: proc_pid_net(5), net/ipv4/tcp_ipv4.c (get_tcp4_sock).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator

from sdtool.model.sockets import SocketFacts, SocketFilter, SocketSource, SocketStates
from sdtool.sources.sockets import (
    SOCKET_TYPES,
    STATES,
    TIMER_TIME_WAIT,
    by_address,
    state_bits,
    state_name,
)

FILES = {"tcp": (("tcp", "inet"), ("tcp6", "inet6")), "udp": (("udp", "inet"), ("udp6", "inet6"))}


def read_sockets(
    pids: Iterable[int | str], wanted: SocketFilter, netns: int | None
) -> tuple[SocketFacts, ...] | None:
    """The sockets of the namespace that all these processes are in, as ``sockets.read_sockets``.

    None when none of them is there any more, or lets us read. A filter by cgroup cannot be
    applied, and is not: what no creator is known of may be anybody's.
    """
    for pid in pids:
        try:
            rows = list(_read_of(pid, wanted, netns))
        except OSError:
            continue
        return tuple(sorted(rows, key=by_address))
    return None


def shows_all(wanted: SocketFilter) -> bool:
    """Whether the text files have every socket that is wanted."""
    if "unix" in wanted.protocols:
        return False
    return wanted.states is SocketStates.LISTENING or "tcp" not in wanted.protocols


def _read_of(pid: int | str, wanted: SocketFilter, netns: int | None) -> Iterator[SocketFacts]:
    for protocol in wanted.protocols:
        for name, family in FILES.get(protocol, ()):
            data = _read(f"/proc/{pid}/net/{name}")
            yield from parse_inet(data, protocol, family, wanted, netns)
    # A process that is gone has no files at all: it may have left while they were read.
    os.stat(f"/proc/{pid}/net/tcp")


def _read(path: str) -> bytes:
    """A file of /proc/PID/net; nothing where the kernel has no such protocol."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def parse_inet(
    data: bytes, protocol: str, family: str, wanted: SocketFilter, netns: int | None
) -> Iterator[SocketFacts]:
    """The lines of net/tcp, tcp6, udp or udp6, behind their head; odd ones are passed over."""
    for line in data.split(b"\n")[1:]:
        fields = line.split()
        try:
            number = int(fields[3], 16)
            row = _parse_inet_line(fields, protocol, family, netns)
        except (ValueError, IndexError, OSError):
            continue
        if not 0 < number < len(STATES):
            continue
        if not 1 << number & state_bits(wanted.states, protocol):
            continue
        if wanted.port in (0, row.port):
            yield row


def _parse_inet_line(
    fields: list[bytes], protocol: str, family: str, netns: int | None
) -> SocketFacts:
    address, port = _parse_address(fields[1])
    peer, peer_port = _parse_address(fields[2])
    return SocketFacts(
        family=family,
        protocol=protocol,
        type=SOCKET_TYPES[protocol],
        address=address,
        port=port,
        peer_address=peer if peer_port else None,
        peer_port=peer_port or None,
        state=state_name(protocol, int(fields[3], 16)),
        inode=int(fields[9]) or None,
        uid=int(fields[7]),
        cookie=0,
        cgroup_id=None,
        v6only=None,
        expires_us=_parse_timer(fields[5]),
        netns=netns,
        source=SocketSource.PROCFS,
    )


def _parse_timer(field: bytes) -> int | None:
    """Take "03:0000176F" apart: a timer that frees the socket, and its clock ticks."""
    kind, _, ticks = field.partition(b":")
    if int(kind, 16) != TIMER_TIME_WAIT:
        return None
    return int(ticks, 16) * 1_000_000 // os.sysconf("SC_CLK_TCK")


def _parse_address(field: bytes) -> tuple[str, int]:
    """Take "0100007F:0050" apart: words in the machine's byte order, and the port."""
    host, _, port = field.partition(b":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, raw), int(port, 16)
