"""A stand-in for journald inside a sandbox: it takes in what is said, as one text.

A user manager logs to the journal or to the machine's console, never to its standard error,
and its units' output goes to the journal by default. So the guardian offers journald's two
sockets where the sandbox looks for them. Nothing is stored, indexed or answered: journalctl
finds no journal. However much a unit says, a turn takes one bounded piece of it: who says more
than is taken waits, and the guardian never does. The truth about the protocols:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ and systemd's journald-stream.c.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path

# What precedes a stream's text, a line each: identifier, unit, priority, and four flags.
_HEADER_LINES = 7

# What is taken of a stream at a time, and of a line before it is broken: as journald does
# (journald.conf(5), LineMax=).
_CHUNK = 65536
_LINE_MAX = 49152
_DRAIN_TIMEOUT = 1.0


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
    """The two sockets of journald, served a turn at a time from somebody else's event loop.

    Args:
        write: Called with whole lines, "IDENTIFIER: TEXT" and a newline each.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._selector = selectors.EpollSelector()
        self._records = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._records.setblocking(False)
        self._listener.setblocking(False)

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._selector.fileno()

    def open(self, directory: Path) -> None:
        """Offer the sockets in ``directory``, the sandbox's /run/systemd/journal."""
        for sock, name in ((self._records, "socket"), (self._listener, "stdout")):
            sock.bind(str(directory / name))
        self._listener.listen()
        self._selector.register(self._records, selectors.EVENT_READ, self._take_record)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def take(self) -> bool:
        """Take one piece of whatever has come on each socket; whether there was any."""
        ready = self._selector.select(0)
        for key, _ in ready:
            key.data()
        return bool(ready)

    def drain(self) -> None:
        """Take in what has been said already, as far as a second allows."""
        deadline = time.monotonic() + _DRAIN_TIMEOUT
        while self.take() and time.monotonic() < deadline:
            pass

    def _take_record(self) -> None:
        with contextlib.suppress(BlockingIOError):
            fields = parse_record(self._records.recv(1 << 20))
            if "MESSAGE" in fields:
                line = f"{fields.get('SYSLOG_IDENTIFIER', '?')}: {fields['MESSAGE']}\n"
                self._write(line.encode())

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # More speakers than we may have descriptors: the next one waits for another's end.
            self._selector.unregister(self._listener)
            return
        stream = _Stream(connection, self._write)
        self._selector.register(stream.socket, selectors.EVENT_READ, lambda: self._hear(stream))

    def _hear(self, stream: _Stream) -> None:
        if not stream.take():
            self._selector.unregister(stream.socket)
            stream.socket.close()
            if self._listener not in self._selector.get_map():
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)


class _Stream:
    """The standard output and error of one process tree."""

    def __init__(self, connection: socket.socket, write: Callable[[bytes], None]) -> None:
        self.socket = connection
        self._write = write
        self._header: list[bytes] = []
        self._rest = b""
        connection.setblocking(False)

    def take(self) -> bool:
        """Pass on the lines of the next piece; False once there can be no more."""
        try:
            data = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            data = b""
        text = self._skip_header(self._rest + data)
        lines, newline, self._rest = text.rpartition(b"\n")
        if newline:
            self._say(lines)
        if len(self._rest) > _LINE_MAX or (self._rest and not data):
            self._say(self._rest)
            self._rest = b""
        return bool(data)

    def _skip_header(self, text: bytes) -> bytes:
        while len(self._header) < _HEADER_LINES and b"\n" in text:
            line, _, text = text.partition(b"\n")
            self._header.append(line)
        return text

    def _say(self, lines: bytes) -> None:
        """Write lines, all in one go: a line at a time would be too slow for some units."""
        if len(self._header) == _HEADER_LINES:
            prefix = self._header[0] + b": "
            self._write(prefix + lines.replace(b"\n", b"\n" + prefix) + b"\n")
