"""What does the journal add to what was seen of a stop? Whom the manager killed, and when.

The manager writes of a SIGKILL before it sends it, and of SIGTERM never. That it wrote nothing
proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdtool.analysis.events import group_by_pid, had_pid_at, states_of
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
    states, had = states_of(record.events), group_by_pid(record.processes)
    events: list[Event] = []
    for entry in records:
        if entry.kind is RecordKind.KILLING and (entry.pid, entry.signal) not in sent:
            process = had_pid_at(had.get(entry.pid, ()), entry.at_us)
            events.append(_killing(entry, record, process))
        elif entry.kind is RecordKind.TIMEOUT:
            state = _overdue(entry, states)
            if state is not None and state.sub_state not in passed:
                events.append(_timeout(entry, state, record))
    return tuple(events)


def _overdue(entry: JournalRecord, states: Sequence[Event]) -> Event | None:
    """The phase that ran out of its time; the last one where the manager does not name it."""
    before = [state for state in states if state.at_us <= entry.at_us]
    named = [s for s in before if entry.sub_state in (None, s.sub_state)]
    return named[-1] if named else None


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


def _timeout(entry: JournalRecord, state: Event, record: StopRecord) -> Event:
    return Event(
        unit=record.unit,
        at_us=entry.at_us,
        kind=EventKind.TIMEOUT,
        source=EventSource.JOURNAL,
        sub_state=state.sub_state,
        limit_us=state.limit_us,
        then=state.then,
    )
