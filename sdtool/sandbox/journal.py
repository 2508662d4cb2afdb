"""A stand-in for journald inside a sandbox: it takes in what is said, as one text.

A user manager logs to the journal or to the machine's console, never to its standard error,
and its units' output goes to the journal by default. So the guardian offers journald's two
sockets where the sandbox looks for them. Nothing is stored, indexed or answered: journalctl
finds no journal. The truth about the protocols: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
and systemd's journald-stream.c.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from pathlib import Path

# What precedes a stream's text, a line each: identifier, unit, priority, and four flags.
_HEADER_LINES = 7


def parse_record(datagram: bytes) -> dict[str, str]:
    """Parse one record of the native protocol into its fields; what is cut off is left out."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:  # 64 bits little-endian of size, then the value, then a newline
            end = 8 + int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8:end], datagram[end + 1 :]
        fields[name.decode(errors="replace")] = value.decode(errors="replace")
    return fields


class Journal:
    """The two sockets of journald, served from somebody else's event loop.

    Args:
        selector: Where the sockets are registered, with a callable that returns True as data.
        write: Called with every line, "IDENTIFIER: TEXT" and a newline.
    """

    def __init__(self, selector: selectors.BaseSelector, write: Callable[[str], None]) -> None:
        self._selector = selector
        self._write = write
        self._streams: list[_Stream] = []
        self._records = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._records.setblocking(False)
        self._listener.setblocking(False)

    def open(self, directory: Path) -> None:
        """Offer the sockets in ``directory``, the sandbox's /run/systemd/journal."""
        for sock, name in ((self._records, "socket"), (self._listener, "stdout")):
            sock.bind(str(directory / name))
        self._listener.listen()
        self._selector.register(self._records, selectors.EVENT_READ, self._take_records)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def drain(self) -> None:
        """Take in what has been said already."""
        with contextlib.suppress(OSError):  # it was never opened
            self._accept()
            self._take_records()
        for stream in self._streams:
            stream.take()

    def _take_records(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while datagram := self._records.recv(1 << 20):
                fields = parse_record(datagram)
                if "MESSAGE" in fields:
                    self._write(f"{fields.get('SYSLOG_IDENTIFIER', '?')}: {fields['MESSAGE']}\n")
        return True

    def _accept(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                stream = _Stream(self._listener.accept()[0], self._write)
                self._streams.append(stream)
                self._selector.register(
                    stream.socket, selectors.EVENT_READ, lambda stream=stream: self._hear(stream)
                )
        return True

    def _hear(self, stream: _Stream) -> bool:
        if not stream.take():
            self._selector.unregister(stream.socket)
            self._streams.remove(stream)
            stream.socket.close()
        return True


class _Stream:
    """The standard output and error of one process tree."""

    def __init__(self, connection: socket.socket, write: Callable[[str], None]) -> None:
        self.socket = connection
        self._write = write
        self._header: list[str] = []
        self._rest = b""
        connection.setblocking(False)

    def take(self) -> bool:
        """Pass on the lines that have come; False once there can be no more."""
        with contextlib.suppress(BlockingIOError):
            while data := self.socket.recv(65536):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._take_line(line.decode(errors="replace"))
            if self._rest:
                self._take_line(self._rest.decode(errors="replace"))
            return False
        return True

    def _take_line(self, line: str) -> None:
        if len(self._header) < _HEADER_LINES:
            self._header.append(line)
        else:
            self._write(f"{self._header[0]}: {line}\n")
