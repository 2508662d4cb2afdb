"""The kernel's answers over NETLINK_SOCK_DIAG: a dump asked for, its messages taken apart.

What a message means is for those who asked. A dump that was interrupted, cut short or lost in part
is asked for again: half an answer would be a wrong one.

Source: netlink(7), sock_diag(7), linux/netlink.h, linux/sock_diag.h.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator

NETLINK_SOCK_DIAG = 4
TCPDIAG_GETSOCK = 18
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 0x1
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR = 2
NLMSG_DONE = 3

NLMSGHDR = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")

MAX_TRIES = 3
ANSWER_S = 5.0
# The kernel fills at most 32 KiB at a time; for a bigger one recv says that it was cut.
BUFFER = 1 << 18

_NUMBERS = itertools.count(1)


def open_diag(flags: int = 0) -> socket.socket:
    """A sock_diag socket in the network namespace of the calling thread, for good."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | flags
    return socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)


def dump(
    body: bytes, diag: socket.socket | None = None, kind: int = SOCK_DIAG_BY_FAMILY
) -> list[bytes]:
    """Everything that a request brings, each message without its header.

    Args:
        kind: The type of the request.
        diag: What ``open_diag`` opened, to ask in its namespace; None for the calling thread's.

    Raises:
        OSError: The kernel refuses (its own errno), is silent for 5 s (ETIMEDOUT), or none of
            three tries came through whole (EAGAIN, ENOBUFS).
    """
    failure = errno.EAGAIN
    for _ in range(MAX_TRIES):
        try:
            if diag is not None:
                rows = _dump_once(body, diag, kind)
            else:
                with open_diag() as netlink:
                    rows = _dump_once(body, netlink, kind)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            failure = errno.ENOBUFS
            continue
        if rows is not None:
            return rows
    raise OSError(failure, os.strerror(failure))


def _dump_once(body: bytes, netlink: socket.socket, request: int) -> list[bytes] | None:
    """One try; None when what came is not the whole."""
    rows: list[bytes] = []
    flags, number = NLM_F_REQUEST | NLM_F_DUMP, next(_NUMBERS)
    header = NLMSGHDR.pack(NLMSGHDR.size + len(body), request, flags, number, 0)
    whole = True
    netlink.settimeout(ANSWER_S)
    netlink.sendto(header + body, (0, 0))
    while True:
        data, _, flags, _ = netlink.recvmsg(BUFFER)
        if _number_of(data) != number:
            continue  # the rest of an earlier answer that was given up
        # Read on to the end all the same: the next question has to find nothing of this one.
        whole = whole and not flags & socket.MSG_TRUNC
        for kind, marks, payload in parse_messages(data):
            whole = whole and not marks & NLM_F_DUMP_INTR
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                _raise_errno(payload)
                return rows if whole else None
            rows.append(payload)


def _number_of(data: bytes) -> int | None:
    """The number of the question that a datagram answers; None when it is too short for one."""
    return NLMSGHDR.unpack_from(data)[3] if len(data) >= NLMSGHDR.size else None


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


def pack_attribute(kind: int, payload: bytes) -> bytes:
    """One rtattr; the payload's length must be a multiple of four, as all of ours are."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(payload), kind) + payload


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
