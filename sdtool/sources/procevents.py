"""Forks, execs and exits of every process, from the kernel's process connector.

It is for the initial network, pid and user namespaces, and before Linux 6.6 for CAP_NET_ADMIN;
elsewhere it refuses, or takes the request and is silent: it counts only once it has acknowledged
it.

Source: linux/cn_proc.h, linux/connector.h, drivers/connector/cn_proc.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from sdtool.model.kernel import KernelEvent, TaskBorn, TaskEnded, TaskExecuted
from sdtool.model.stop import EventSource
from sdtool.sources.netlink import NLMSG_DONE, NLMSGHDR, parse_messages
from sdtool.sources.pidfds import parse_wait_status
from sdtool.sources.processes import is_initial_pid_namespace

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

READ_NS = 60_000_000
"""One call takes no longer: it ends in a storm of events too, and the next one goes on."""

GIVES = "births and ends of processes, with their wait status"

OUTSIDE = "it is silent outside of the initial pid namespace"


class What(IntEnum):
    """What happened: the kinds that are read."""

    ACKNOWLEDGED = 0
    FORK = 1
    EXEC = 2
    EXIT = 0x80000000


class ProcEvents:
    """All processes of the machine, from when it is made until it is closed.

    Attributes:
        complete_us: What happened until then has been read, or is lost; by CLOCK_MONOTONIC.

    Raises:
        OSError: The kernel refuses; ETIMEDOUT when it is silent. ``explain_silence`` says why.
    """

    def __init__(self) -> None:
        if not is_initial_pid_namespace():
            raise OSError(errno.EXDEV, OUTSIDE)
        self._lost = self._uncounted = 0
        self._request = time.monotonic_ns() & 0x7FFFFFFF
        self._numbers: dict[int, int] = {}
        self.complete_us = 0
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
        ack = self._request
        body = CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, ack, 4, 0) + struct.pack("=I", operation)
        header = NLMSGHDR.pack(NLMSGHDR.size + len(body), NLMSG_DONE, 0, 0, 0)
        self._socket.sendto(header + body, (0, 0))

    def _wait_for_acknowledgement(self) -> None:
        """Wait for ours: everybody who listens gets those of all."""
        until = time.monotonic() + ACKNOWLEDGE_S
        while (left_s := until - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            with contextlib.suppress(TimeoutError):
                for message in parse_proc_messages(self._socket.recv(BUFFER)):
                    if message.refusal is not None and message.answers == self._request + 1:
                        _raise_refusal(message.refusal)
                        return
        raise OSError(errno.ETIMEDOUT, "the kernel does not acknowledge it")

    @property
    def lost(self) -> int:
        """How many events the kernel had no room for; at least one that was not counted yet."""
        return self._lost + self._uncounted

    def read(self) -> list[KernelEvent]:
        """The events since the last call; of one processor they are in their order."""
        found: list[KernelEvent] = []
        until_ns = time.monotonic_ns() + READ_NS
        while time.monotonic_ns() < until_ns:
            now_us = time.monotonic_ns() // 1000
            try:
                data = self._socket.recv(BUFFER)
            except BlockingIOError:
                self.complete_us = now_us
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._uncounted = 1  # how many were lost the numbers will tell
                continue
            for message in parse_proc_messages(data):
                self._count(message)
                if message.event is not None:
                    found.append(message.event)
                    self.complete_us = message.event.at_us
        return found

    def _count(self, message: ProcMessage) -> None:
        """Each processor numbers its messages."""
        expected = self._numbers.get(message.cpu, message.number)
        missing = (message.number - expected) & 0xFFFFFFFF
        if missing:
            self._lost, self._uncounted = self._lost + missing, 0
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
        answers: The request that it acknowledges, by a number more than its.
    """

    cpu: int
    number: int
    event: KernelEvent | None
    refusal: int | None
    answers: int = 0


def parse_proc_messages(data: bytes) -> Iterator[ProcMessage]:
    """The messages of a datagram; what is cut off, or of another connector, is passed over."""
    for _, _, payload in parse_messages(data):
        if len(payload) < CN_MSG.size:
            continue
        index, value, number, answer, *_ = CN_MSG.unpack_from(payload)
        # Of the longest event the last words are not sent with each.
        body = payload[CN_MSG.size :].ljust(PROC_EVENT.size, b"\0")
        what, cpu, at_ns, *told = PROC_EVENT.unpack_from(body)
        if (index, value) == (CN_IDX_PROC, CN_VAL_PROC):
            refusal = told[0] if what == What.ACKNOWLEDGED else None
            yield ProcMessage(
                cpu, number, _build_event(what, at_ns // 1000, told), refusal, answer
            )


def _build_event(what: int, at_us: int, told: list[int]) -> KernelEvent | None:
    source = EventSource.PROCEVENTS
    if what == What.FORK:
        _, parent, pid, process, *_ = told
        return TaskBorn(
            at_us=at_us,
            source=source,
            pid=pid,
            # A thread has the parent of its process, which has not made it.
            maker=parent if pid == process else process,
            comm=None,
            is_thread=pid != process,
            is_elsewhere=False,
        )
    if what == What.EXIT:
        pid, _, status, *_ = told
        return TaskEnded(at_us=at_us, source=source, pid=pid, status=parse_wait_status(status))
    if what == What.EXEC:
        thread, process, *_ = told
        return TaskExecuted(at_us=at_us, source=source, pid=process, before=thread, path=None)
    return None


def _raise_refusal(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def explain_silence(error: OSError) -> str:
    """Why nothing is told to us, and what would permit it."""
    if isinstance(error, PermissionError):
        return "needs CAP_NET_ADMIN (root), before Linux 6.6"
    if isinstance(error, ConnectionRefusedError):
        return "it is for the initial network namespace alone"
    if error.errno == errno.EPROTONOSUPPORT:
        return "this kernel has no process connector (CONFIG_PROC_EVENTS)"
    return error.strerror or str(error)


def probe_procevents() -> tuple[bool, str]:
    """Whether the kernel tells us of births and ends, and why not."""
    try:
        ProcEvents().close()
    except OSError as error:
        return False, explain_silence(error)
    return True, GIVES
