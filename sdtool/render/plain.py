"""Words for single values: names made harmless, durations, sizes, addresses, exits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sdtool.model.sockets import Socket, endpoint
from sdtool.model.stop import INFINITY, ExitSignal, ExitStatus, Limit

if TYPE_CHECKING:
    from sdtool.model.ports import PortBlock

# C0 and C1 controls, the line and paragraph separators, and what can reorder a line (bidi).
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    r"""A string of another process, safe for a terminal: controls as \x1b, bad bytes as \xff."""
    # In this order: two bad bytes side by side can make up one control character.
    return UNSAFE.sub(_escape, encodable(text))


def encodable(text: str) -> str:
    r"""A string that UTF-8 can carry: bytes that were not valid come back as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def seconds(us: int) -> str:
    """A moment in a timeline: milliseconds matter."""
    return f"{us / 1_000_000:.3f}"


def duration(limit: Limit | None) -> str:
    """A limit or a duration in one unit: 200 ms, 2 s, 1 min 30 s, infinity."""
    if limit is None:
        return "unknown"
    if limit == INFINITY:
        return "no time limit"
    if limit < 1_000_000:
        return f"{limit / 1000:.0f} ms"
    if limit < 60_000_000:
        return f"{limit / 1_000_000:.3g} s"
    minutes, rest = divmod(round(limit / 1_000_000), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def size(number: int | None) -> str:
    """Bytes in the unit that leaves one to three digits."""
    if number is None:
        return "?"
    value = float(number)
    for unit in ("B", "K", "M", "G"):
        if value < 1024:
            return f"{value:.0f}{unit}" if value >= 10 or unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def address(socket: Socket) -> str:
    """host%device:port as users type it: IPv6 in brackets, all addresses as "*"."""
    if socket.family == "unix":
        return clean(socket.path or "-")
    host = socket.address or ""
    if host == "::" and not socket.v6only:
        host = "*"
    return endpoint(f"{host}%{clean(socket.device)}" if socket.device else host, socket.port)


def namespace(socket: Socket | PortBlock) -> str | None:
    """The network namespace of a socket that is not in ours; None for one that is."""
    if not socket.elsewhere:
        return None
    return clean(socket.netns_name or f"net:[{socket.netns or '?'}]")


def exit_status(status: ExitStatus | None) -> str:
    """How a process ended."""
    if status is None:
        return "ended, its wait status is not known"
    if isinstance(status, ExitSignal):
        return f"ended by {status.signal}{' (core dumped)' if status.core else ''}"
    return f"exited {status.code}"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 process, 2 processes."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"
