"""Sockets that are destroyed, as the kernel says it: the end of a listener is a port that is free.

Source: sock_diag(7), the groups SKNLGRP_INET_TCP_DESTROY and its kin of linux/sock_diag.h.
"""

from __future__ import annotations

import errno
import select
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence

from sdtool.errors import Unavailable
from sdtool.model.sockets import SocketFacts, SocketFilter, SocketStates, inodes_of, is_listening
from sdtool.model.stop import Event, EventKind, EventSource
from sdtool.sources.namespaces import NetworkNamespace, explain_refusal, look_into
from sdtool.sources.netlink import open_diag, parse_messages
from sdtool.sources.sockets import MESSAGE, read_sockets

DESTROYED = 0b1111
"""TCP and UDP, both families, as a mask of groups."""


class SocketObserver:
    """Tells when listening sockets of a unit are destroyed, by the kernel's own notification.

    Any user may listen in the own network namespace. Notifications trail the close by tens of
    milliseconds (an RCU grace period). While it watches, the namespaces stay.

    Attributes:
        listeners: The sockets that are watched.
        freed: When each of them was gone, by its cookie.
    """

    name = "sockets"

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._by_cookie: dict[int, SocketFacts] = {}
        self._epoll = select.epoll()
        self._ears: dict[int, socket.socket] = {}
        self._diags: list[socket.socket] = []
        self.lost = 0
        self.freed: dict[int, int] = {}
        self.listeners: tuple[SocketFacts, ...] = ()
        self.available, self.reason = True, "sockets destroyed, by the kernel's notification"

    def arm(
        self,
        places: Sequence[NetworkNamespace],
        wanted: SocketFilter,
        inodes: Collection[int] | None = None,
    ) -> frozenset[int]:
        """Watch the listening sockets among those that are wanted, in each namespace.

        What cannot be watched is said by ``available`` and ``reason``.

        Args:
            inodes: These sockets alone; None for all.

        Returns:
            All sockets there that are wanted, by inode.
        """
        if not self.available:
            return frozenset()
        try:
            looks = look_into(places, lambda: self._arm_here(wanted))
        except (OSError, Unavailable) as error:
            self.close()
            self.listeners = ()
            self.available = False
            self.reason = f"no destroy notifications: {error}"
            return frozenset()
        refused = [found for _, found in looks if isinstance(found, OSError)]
        if refused:
            self.reason += f"; not in network namespaces of its own: {explain_refusal(refused[0])}"
        rows = [row for _, found in looks if isinstance(found, tuple) for row in found]
        rows = [row for row in rows if inodes is None or row.inode in inodes]
        # Of an MPTCP socket the TCP part is the one whose end is told.
        parts = {row.inode for row in rows if row.protocol == "tcp"}
        listening = [
            row
            for row in rows
            if is_listening(row) and (row.protocol != "mptcp" or row.inode not in parts)
        ]
        self.listeners += tuple(listening)
        self._by_cookie.update((row.cookie, row) for row in listening)
        return inodes_of(rows)

    def _arm_here(self, wanted: SocketFilter) -> tuple[SocketFacts, ...]:
        # Armed before the dump: a socket that goes between the two would never be missed.
        ear = open_diag(socket.SOCK_NONBLOCK)
        self._ears[ear.fileno()] = ear
        ear.bind((0, DESTROYED))
        self._epoll.register(ear, select.EPOLLIN)
        diag = open_diag()
        self._diags.append(diag)
        return read_sockets(wanted, diag)

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._epoll.fileno()

    def read_events(self) -> tuple[Event, ...]:
        """The watched sockets that were destroyed since the last call."""
        events: list[Event] = []
        for fd, _ in self._epoll.poll(0):
            events += self._read_from(self._ears[fd])
        return tuple(events)

    def _read_from(self, ear: socket.socket) -> Iterator[Event]:
        while True:
            try:
                data = ear.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                continue
            yield from self._parse(data)

    def _parse(self, data: bytes) -> Iterator[Event]:
        now = time.monotonic_ns() // 1000
        for _, _, payload in parse_messages(data):
            if len(payload) < MESSAGE.size:
                continue
            cookie = int.from_bytes(MESSAGE.unpack_from(payload)[9], sys.byteorder)
            row = self._by_cookie.pop(cookie, None)
            if row is not None:
                self.freed[cookie] = now
                yield Event(
                    unit=self._unit,
                    at_us=now,
                    kind=EventKind.PORT_RELEASED,
                    source=EventSource.SOCKETS,
                    protocol=row.protocol,
                    address=row.address,
                    port=row.port,
                )

    def take_closed(self, address: str, port: int, at_us: int) -> SocketFacts | None:
        """A TCP socket that is watched and was closed, by another's word; no event is made of it.

        Of several with one address (SO_REUSEPORT, other namespaces) the notification tells which.
        """
        where = address, port, "tcp"
        rows = [row for row in self.listeners if (row.address, row.port, row.protocol) == where]
        if len(rows) != 1 or rows[0].cookie not in self._by_cookie:
            return None
        self.freed[rows[0].cookie] = at_us
        return self._by_cookie.pop(rows[0].cookie)

    def read_held(self) -> tuple[SocketFacts, ...]:
        """Those of the listening sockets that are there still.

        Raises:
            Unavailable: The kernel does not say.
        """
        if not self.listeners:
            return ()
        wanted = SocketFilter(states=SocketStates.LISTENING)
        present = {row.cookie for diag in self._diags for row in read_sockets(wanted, diag)}
        return tuple(row for row in self.listeners if row.cookie in present)

    def close(self) -> None:
        """Stop listening."""
        for opened in (*self._ears.values(), *self._diags):
            opened.close()
        self._ears.clear()
        self._diags.clear()
        self._epoll.close()
