"""The model as JSON: the contract that scripts rely on. Field names are the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from sdtool.errors import SdtoolError
from sdtool.model.stop import Event, EventKind, Evidence
from sdtool.render.plain import encodable

SCHEMA = 1

PROCESS = ("pid", "start_ticks", "comm", "role")
SIGNAL = (*PROCESS, "signal", "sender_pid", "sender_comm", "result")

EVENT_FIELDS: Mapping[EventKind, tuple[str, ...]] = {
    EventKind.OBSERVER: ("text",),
    EventKind.JOB_NEW: (),
    EventKind.JOB_DONE: ("result",),
    EventKind.STATE: ("active_state", "sub_state", "result", "limit_us", "then"),
    EventKind.CONTROL_START: (*PROCESS, "text"),
    EventKind.CONTROL_EXIT: PROCESS,
    EventKind.SIGNAL_SENT: SIGNAL,
    EventKind.SIGNAL_DELIVERED: SIGNAL,
    EventKind.SIGNAL_IGNORED: SIGNAL,
    EventKind.PROCESS_NEW: PROCESS,
    EventKind.PROCESS_EXEC: (*PROCESS, "text"),
    EventKind.PROCESS_EXIT: (*PROCESS, "exit", "text"),
    EventKind.PROCESS_REAPED: (*PROCESS, "exit", "text"),
    EventKind.TIMEOUT: ("sub_state", "limit_us", "then"),
    EventKind.LEFTOVER: PROCESS,
    EventKind.PORT_RELEASED: ("protocol", "address", "port"),
    EventKind.CGROUP_EMPTY: (),
    EventKind.CGROUP_POPULATED: (),
    EventKind.CGROUP_REMOVED: (),
    EventKind.GAP: ("text", "sub_state", "limit_us", "then"),
}
"""What an event of each kind carries beside its time and source."""


def envelope(
    command: str,
    data: Iterable[Any],
    errors: Sequence[SdtoolError],
    exit_status: int,
    notes: Iterable[str] = (),
) -> str:
    """The one document of a command's run."""
    return json.dumps(
        {
            "sdtool": SCHEMA,
            "command": command,
            "exit": exit_status,
            "data": [to_plain(entry) for entry in data],
            "errors": [_error(error) for error in errors],
            "notes": [encodable(note) for note in notes],
        }
    )


def event_line(event: Event) -> str:
    """One event as one line."""
    return json.dumps(to_plain(event))


def _error(error: SdtoolError) -> dict[str, Any]:
    return {
        "code": error.code,
        "subject": None if error.subject is None else encodable(error.subject),
        "message": encodable(str(error)),
        "hint": None if error.hint is None else encodable(error.hint),
    }


def to_plain(value: Any) -> Any:
    """A model value as what json.dumps takes."""
    if isinstance(value, Event):
        return _event(value)
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    return encodable(value) if isinstance(value, str) else value


def _event(event: Event) -> dict[str, Any]:
    names = ["unit", "at_us", "kind", "source", "evidence"]
    if event.evidence is Evidence.INFERRED or event.at_min_us is not None:
        names += ["at_min_us", "at_max_us"]
    return {name: to_plain(getattr(event, name)) for name in (*names, *EVENT_FIELDS[event.kind])}
