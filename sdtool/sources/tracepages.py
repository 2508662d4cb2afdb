"""Pages of the kernel's trace buffer, as trace_pipe_raw gives them: events with their fields.

The trace's text could be forged: the name of a process or a file may hold a newline, and after it
whatever looks like an event. Here each field is where the event's format file says.

Source: Documentation/trace/events.rst, include/linux/ring_buffer.h, kernel/trace/ring_buffer.c.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FIELD = re.compile(
    r"field:(?P<declared>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);"
)

WORD = struct.Struct("=I")
PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31
TIME_BITS = 27
PAGE_SECONDS_BITS = 0xF8 << 56
"""The part of an absolute time stamp that only the page's own has."""

MISSED_EVENTS = 1 << 31
MISSED_STORED = 1 << 30
LENGTH = MISSED_STORED - 1

Value = int | bytes


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an event.

    Attributes:
        is_text: An array of characters, which ends at its first NUL.
        is_dynamic: In its place stand where it is (the lower half) and how long.
    """

    name: str
    offset: int
    size: int
    is_signed: bool
    is_text: bool
    is_dynamic: bool


@dataclass(frozen=True, slots=True)
class EventFormat:
    """An event's name, its number in this kernel, and its fields."""

    name: str
    number: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Where in a page the length of its data stands, and where these begin."""

    length: Field
    data: Field


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One event.

    Attributes:
        at_ns: By the clock of the instance.
        pid: The thread that it happened in, in the initial pid namespace.
    """

    at_ns: int
    name: str
    pid: int
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Page:
    """The events of a page, in their order.

    Attributes:
        lost: How many were overwritten before it; None when that is not told, 0 for none.
    """

    events: tuple[TraceEvent, ...]
    lost: int | None


def parse_fields(text: str) -> dict[str, Field]:
    """The fields of a format file, by name."""
    return {field.name: field for field in map(_read_field, FIELD.finditer(text))}


def _read_field(match: re.Match[str]) -> Field:
    declared = match["declared"]
    name = declared.partition("[")[0].split()[-1]
    if declared.startswith("__data_loc"):
        name = declared.split()[-1]
    return Field(
        name=name,
        offset=int(match["offset"]),
        size=int(match["size"]),
        is_signed=match["signed"] == "1",
        is_text="char" in declared and "[" in declared,
        is_dynamic=declared.startswith("__data_loc"),
    )


def parse_event_format(text: str) -> EventFormat:
    """A format file of an event.

    Raises:
        ValueError: It is none.
    """
    name = re.search(r"^name: (\S+)$", text, re.MULTILINE)
    number = re.search(r"^ID: (\d+)$", text, re.MULTILINE)
    fields = parse_fields(text)
    if name is None or number is None or "common_pid" not in fields:
        raise ValueError("no format of an event")
    return EventFormat(name[1], int(number[1]), tuple(fields.values()))


def parse_page_format(text: str) -> PageFormat:
    """The file events/header_page.

    Raises:
        ValueError: It is none.
    """
    fields = parse_fields(text)
    if "commit" not in fields or "data" not in fields:
        raise ValueError("no format of a page")
    return PageFormat(fields["commit"], fields["data"])


def parse_page(data: bytes, layout: PageFormat, formats: Mapping[int, EventFormat]) -> Page:
    """Take a page apart; unknown events are passed over, and what is cut off is dropped."""
    if len(data) < layout.data.offset:
        return Page((), 0)
    commit = _read_int(data, layout.length)
    start = layout.data.offset
    end = min(start + (commit & LENGTH), len(data))
    events = tuple(_parse_events(data, start, end, formats))
    return Page(events, _read_lost(data, commit, end))


def _read_lost(data: bytes, commit: int, end: int) -> int | None:
    if not commit & MISSED_EVENTS:
        return 0
    if commit & MISSED_STORED and end + 8 <= len(data):
        return int.from_bytes(data[end : end + 8], sys.byteorder)
    return None


def _parse_events(
    data: bytes, at: int, end: int, formats: Mapping[int, EventFormat]
) -> Iterator[TraceEvent]:
    (now,) = struct.unpack_from("=Q", data)
    while at + WORD.size <= end:
        kind, delta = _split(WORD.unpack_from(data, at)[0])
        at += WORD.size
        (word,) = WORD.unpack_from(data, at) if at + WORD.size <= end else (0,)
        if kind == PADDING:
            if delta == 0:
                return  # to the end of the page
            now, at = now + delta, at + word
        elif kind == TIME_EXTEND:
            now, at = now + delta + (word << TIME_BITS), at + WORD.size
        elif kind == TIME_STAMP:
            now = now & PAGE_SECONDS_BITS | word << TIME_BITS | delta
            at += WORD.size
        else:
            now += delta
            begin, size = (at + WORD.size, word) if kind == 0 else (at, kind * WORD.size)
            if at + size > end or at + size < begin:
                return
            event = _parse_event(now, data[begin : at + size], formats)
            if event is not None:
                yield event
            at += size


def _split(head: int) -> tuple[int, int]:
    """(type or length, time since the event before) of the first word of an event."""
    if sys.byteorder == "little":
        return head & 31, head >> 5
    return head >> TIME_BITS, head & (1 << TIME_BITS) - 1


def _parse_event(
    at_ns: int, payload: bytes, formats: Mapping[int, EventFormat]
) -> TraceEvent | None:
    form = formats.get(int.from_bytes(payload[:2], sys.byteorder))
    if form is None or any(field.offset + field.size > len(payload) for field in form.fields):
        return None
    values = {field.name: _read_value(payload, field) for field in form.fields}
    pid = values.pop("common_pid")
    return TraceEvent(at_ns, form.name, pid if isinstance(pid, int) else 0, values)


def _read_value(payload: bytes, field: Field) -> Value:
    if field.is_dynamic:
        where = _read_int(payload, field)
        begin, size = where & 0xFFFF, where >> 16
        return payload[begin : begin + size].partition(b"\0")[0]
    if field.is_text:
        return payload[field.offset : field.offset + field.size].partition(b"\0")[0]
    if field.size > 8:
        return payload[field.offset : field.offset + field.size]
    return _read_int(payload, field)


def _read_int(data: bytes, field: Field) -> int:
    raw = data[field.offset : field.offset + field.size]
    return int.from_bytes(raw, sys.byteorder, signed=field.is_signed)
