"""What does the journal add to what was seen of a stop? Whom the manager killed, and when.

The manager writes of a SIGKILL before it sends it, and of SIGTERM never. That it wrote nothing
proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdtool.analysis.events import had_pid_at
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
    sent = {(e.pid, e.signal) for e in record.events if e.kind is EventKind.SIGNAL_SENT}
    passed = {e.sub_state for e in record.events if e.kind is EventKind.TIMEOUT}
    events: list[Event] = []
    for entry in records:
        if entry.kind is RecordKind.KILLING and (entry.pid, entry.signal) not in sent:
            process = had_pid_at(record.processes, entry.pid or 0, entry.at_us)
            events.append(_killing(entry, record, process))
        elif entry.kind is RecordKind.TIMEOUT and entry.sub_state not in passed:
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


def _killing(entry: JournalRecord, record: StopRecord, process: WatchedProcess | None) -> Event:
    return Event(
        unit=record.unit,
        at_us=entry.at_us,
        kind=EventKind.SIGNAL_SENT,
        source=EventSource.JOURNAL,
        pid=entry.pid,
        start_ticks=process.start_ticks if process is not None else 0,
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
