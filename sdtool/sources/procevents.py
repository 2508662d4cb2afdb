"""Forks, execs and exits of every process, from the kernel's process connector.

It needs CAP_NET_ADMIN and the initial network, pid and user namespaces; elsewhere it refuses, or
takes the request and is silent: it counts only once it has acknowledged it.

Source: linux/cn_proc.h, linux/connector.h, drivers/connector/cn_proc.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from sdtool.sources.netlink import NLMSG_DONE, NLMSGHDR, parse_messages

NETLINK_CONNECTOR = 11
CN_IDX_PROC = 1
CN_VAL_PROC = 1
PROC_CN_MCAST_LISTEN = 1
PROC_CN_MCAST_IGNORE = 2

CN_MSG = struct.Struct("=4I2H")  # idx, val, seq, ack, len, flags
PROC_EVENT = struct.Struct("=IIQ6I")  # what, cpu, timestamp_ns, and what the event says

SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 4 << 20
BUFFER = 1 << 16
ACKNOWLEDGE_S = 1.0


NONE = 0  # an acknowledgement


class What(IntEnum):
    """What happened: the events that are read."""

    FORK = 1
    EXEC = 2
    COREDUMP = 0x40000000
    EXIT = 0x80000000


@dataclass(frozen=True, slots=True)
class ProcEvent:
    """One event.

    Attributes:
        at_ns: CLOCK_MONOTONIC.
        pid: The thread that it is about; the new one of a fork.
        tgid: Its process.
        parent: The process that forked it, or has to reap it; None where that is not told.
        status: The wait status of an exit, as wait(2) gives it; None for others.
    """

    at_ns: int
    what: What
    pid: int
    tgid: int
    parent: int | None = None
    status: int | None = None


class ProcEvents:
    """All processes of the machine, from when it is made until it is closed.

    Attributes:
        lost: How many events the kernel had no room for.

    Raises:
        OSError: The kernel refuses; ETIMEDOUT when it is silent.
    """

    def __init__(self) -> None:
        self.lost = 0
        self._numbers: dict[int, int] = {}
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_CONNECTOR)
        try:
            self._enlarge()
            self._socket.bind((0, CN_IDX_PROC))
            self._tell(PROC_CN_MCAST_LISTEN)
            self._wait_for_acknowledgement()
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def _enlarge(self) -> None:
        """A storm of forks fits in; beyond the usual limit as root alone."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)

    def _tell(self, operation: int) -> None:
        body = CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, 4, 0) + struct.pack("=I", operation)
        header = NLMSGHDR.pack(NLMSGHDR.size + len(body), NLMSG_DONE, 0, 0, 0)
        self._socket.sendto(header + body, (0, 0))

    def _wait_for_acknowledgement(self) -> None:
        self._socket.settimeout(ACKNOWLEDGE_S)
        try:
            while True:
                for message in parse_proc_messages(self._socket.recv(BUFFER)):
                    if message.refusal is not None:
                        _raise_refusal(message.refusal)
                        return
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "the kernel does not acknowledge it") from None

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._socket.fileno()

    def read(self) -> tuple[ProcEvent, ...]:
        """The events since the last call; of one processor they are in their order."""
        found: list[ProcEvent] = []
        while True:
            try:
                data = self._socket.recv(BUFFER)
            except BlockingIOError:
                return tuple(found)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue  # how many were lost the numbers will tell
            for message in parse_proc_messages(data):
                self._count(message)
                if message.event is not None:
                    found.append(message.event)

    def _count(self, message: ProcMessage) -> None:
        """Each processor numbers its messages."""
        expected = self._numbers.get(message.cpu, message.number)
        self.lost += (message.number - expected) & 0xFFFFFFFF
        self._numbers[message.cpu] = (message.number + 1) & 0xFFFFFFFF

    def close(self) -> None:
        """Have the kernel go on without us."""
        with contextlib.suppress(OSError):
            self._tell(PROC_CN_MCAST_IGNORE)
        self._socket.close()


class ProcMessage(NamedTuple):
    """What comes with a number among those of its processor.

    Attributes:
        event: None for kinds that are not read.
        refusal: Its errno, 0 for an acknowledgement; None for anything else.
    """

    cpu: int
    number: int
    event: ProcEvent | None
    refusal: int | None


def parse_proc_messages(data: bytes) -> Iterator[ProcMessage]:
    """The messages of a datagram; what is cut off, or of another connector, is passed over."""
    for _, _, payload in parse_messages(data):
        if len(payload) < CN_MSG.size:
            continue
        index, value, number, *_ = CN_MSG.unpack_from(payload)
        # Of the longest event the last words are not sent with each.
        body = payload[CN_MSG.size :].ljust(PROC_EVENT.size, b"\0")
        what, cpu, at_ns, *told = PROC_EVENT.unpack_from(body)
        if (index, value) == (CN_IDX_PROC, CN_VAL_PROC):
            refusal = told[0] if what == NONE else None
            yield ProcMessage(cpu, number, _build_event(what, at_ns, told), refusal)


def _build_event(what: int, at_ns: int, told: list[int]) -> ProcEvent | None:
    if what == What.FORK:
        _, parent, pid, tgid, *_ = told
        return ProcEvent(at_ns, What.FORK, pid, tgid, parent)
    if what == What.EXIT:
        pid, tgid, status, _, _, parent = told
        return ProcEvent(at_ns, What.EXIT, pid, tgid, parent or None, status)
    if what in (What.EXEC, What.COREDUMP):
        return ProcEvent(at_ns, What(what), told[0], told[1])
    return None


def _raise_refusal(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
