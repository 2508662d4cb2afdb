"""What does the journal add to what was seen of a stop? Whom the manager killed, and when.

The manager writes of a SIGKILL before it sends it, and of SIGTERM never. That it wrote nothing
proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdtool.model.journal import JournalRecord, RecordKind
from sdtool.model.process import Disposition, Role
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    StopRecord,
    WatchedProcess,
)

UNSEEN = "only the journal has it: it was born and gone unseen"


def build_events(records: Iterable[JournalRecord], record: StopRecord) -> tuple[Event, ...]:
    """What the manager wrote, of which nothing was seen or concluded."""
    known = record.events
    events: list[Event] = []
    for entry in records:
        if entry.kind is RecordKind.KILLING and not _is_sent(entry, known):
            events.append(_killing(entry, record))
        elif entry.kind is RecordKind.TIMEOUT and not _is_timed_out(entry, known):
            events.append(_timeout(entry, record.unit))
    return tuple(events)


def find_unseen(
    events: Iterable[Event], processes: Iterable[WatchedProcess]
) -> tuple[WatchedProcess, ...]:
    """The processes of which nothing but the journal tells."""
    pids = {process.pid for process in processes}
    return tuple(
        WatchedProcess(
            pid=event.pid,
            start_ticks=0,
            comm=event.comm or "?",
            role=Role.OTHER,
            disposition=Disposition.UNKNOWN,
            disposition_reason=UNSEEN,
            seen_us=event.at_us,
        )
        for event in events
        if event.pid is not None and event.pid not in pids
    )


def _is_sent(entry: JournalRecord, events: Sequence[Event]) -> bool:
    return any(
        event.kind is EventKind.SIGNAL_SENT
        and (event.pid, event.signal) == (entry.pid, entry.signal)
        for event in events
    )


def _is_timed_out(entry: JournalRecord, events: Sequence[Event]) -> bool:
    return any(
        event.kind is EventKind.TIMEOUT and event.sub_state == entry.sub_state for event in events
    )


def _killing(entry: JournalRecord, record: StopRecord) -> Event:
    process = next((one for one in record.processes if one.pid == entry.pid), None)
    return Event(
        unit=record.unit,
        at_us=entry.at_us,
        kind=EventKind.SIGNAL_SENT,
        source=EventSource.JOURNAL,
        pid=entry.pid,
        comm=process.comm if process is not None else entry.comm,
        role=process.role if process is not None else Role.OTHER,
        signal=entry.signal,
        sender_pid=record.manager_pid,
    )


def _timeout(entry: JournalRecord, unit: str) -> Event:
    return Event(
        unit=unit,
        at_us=entry.at_us,
        kind=EventKind.TIMEOUT,
        source=EventSource.JOURNAL,
        sub_state=entry.sub_state,
        then=entry.action,
    )
