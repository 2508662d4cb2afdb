"""What do the events of a stop say together: their order, each process's own, what went untold?

Nothing is concluded here but what the events themselves say; ``timeline`` and ``fates`` read on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sdtool.analysis.phases import SIGKILL
from sdtool.model.process import ProcessId, Role
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ExitStatus,
    SignalResult,
    StopRecord,
    Tier,
    WatchedProcess,
)

TIMER_LEAD_US = 50_000
"""The clock of a phase runs before its stamp: while the manager forks ExecStop= or signals."""

SIGNAL_LEAD_US = 10_000
"""The manager stamps a phase after it has sent its signals: measured up to 4.4 ms later."""

EXIT_LAG_US = 100_000
"""An exit that ended a phase can be noticed so much later than the phase that followed it."""

DELIVERED = frozenset({SignalResult.DELIVERED, SignalResult.LOSE_INFO})
"""What the kernel says of a signal that came to its process."""

CAUSES: tuple[EventKind, ...] = (
    EventKind.OBSERVER,
    EventKind.JOB_NEW,
    EventKind.GAP,
    EventKind.TIMEOUT,
    EventKind.SIGNAL_SENT,
    EventKind.PROCESS_NEW,
    EventKind.CONTROL_START,
)
"""What stands before its effects, where both are of one moment."""


def sees_signals(record: StopRecord) -> bool:
    """Whether all signals that were sent are among the events of a record."""
    trace = [one for one in record.observers if one.name == EventSource.TRACEFS]
    return record.tier is Tier.A and not any(one.lost for one in trace)


def sort_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events by time; at the same moment a cause stands before its effect."""
    return tuple(sorted(events, key=_order))


def _order(event: Event) -> tuple[int, int]:
    return event.at_us, CAUSES.index(event.kind) if event.kind in CAUSES else len(CAUSES)


def order_lives(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same, where nobody appears after his end: some are found, or heard of, only then."""
    events = tuple(events)
    exits = exits_by_process(events)
    return tuple(_before_end(event, exits) for event in events)


def _before_end(event: Event, exits: Mapping[ProcessId, Event]) -> Event:
    late = (EventKind.PROCESS_NEW, EventSource.CGROUP), (EventKind.CONTROL_START, EventSource.DBUS)
    found = (event.kind, event.source) in late
    gone = exits.get(event.process) if found and event.process is not None else None
    if gone is None or gone.at_us >= event.at_us:
        return event
    return replace(event, at_us=gone.at_us)


def group_by_process(events: Iterable[Event]) -> dict[ProcessId, list[Event]]:
    """The events of each process, in the order given."""
    groups: dict[ProcessId, list[Event]] = {}
    for event in events:
        if event.process is not None:
            groups.setdefault(event.process, []).append(event)
    return groups


def states_of(events: Iterable[Event]) -> list[Event]:
    """The state events by time, each with the limit that held at its end: a reload can move it."""
    states: list[Event] = []
    for event in sort_events(events):
        if event.kind is EventKind.STATE:
            states.append(event)
        elif event.kind is EventKind.GAP and event.limit_us is not None and states:
            states[-1] = replace(states[-1], limit_us=event.limit_us, then=event.then)
    return states


def unseen_spans(events: Iterable[Event]) -> list[tuple[int, int]]:
    """Times in which the unit went through phases that nobody told.

    Where its state at the end of a gap is still that of before, nothing was missed.
    """
    kinds = (EventKind.STATE, EventKind.GAP)
    events = [event for event in events if event.kind in kinds]
    spans = []
    for gap in (event for event in events if _is_managers_gap(event)):
        since = gap.at_us if gap.at_min_us is None else gap.at_min_us
        missed = [
            event.at_us
            for event in events
            if event.kind is EventKind.STATE and since <= event.at_us <= gap.at_us
        ]
        if missed:
            spans.append((since - SIGNAL_LEAD_US, max(missed) + EXIT_LAG_US))
    return spans


def _is_managers_gap(event: Event) -> bool:
    """Whether the manager was out of reach; the kernel's record can have gaps of its own."""
    return event.kind is EventKind.GAP and event.source is EventSource.SDTOOL


def group_by_pid(
    processes: Iterable[WatchedProcess],
) -> dict[int | None, list[WatchedProcess]]:
    """Who has had each pid, in the order they were seen."""
    groups: dict[int | None, list[WatchedProcess]] = {}
    for process in processes:
        groups.setdefault(process.pid, []).append(process)
    return groups


def had_pid_at(had: Sequence[WatchedProcess], at_us: int | None = None) -> WatchedProcess | None:
    """Who had a pid at a moment, or has it now; None where nobody ever had it.

    Args:
        had: All that have had it, in the order they were seen.
    """
    if at_us is not None:
        then = [process for process in had if process.seen_us is None or process.seen_us <= at_us]
        # What came before the first one was seen was about the first one.
        had = then or had[:1]
    return had[-1] if had else None


def exits_by_process(events: Iterable[Event]) -> dict[ProcessId, Event]:
    """The exit event of each process that has one."""
    exits: dict[ProcessId, Event] = {}
    for event in events:
        if event.kind is EventKind.PROCESS_EXIT and event.process is not None:
            exits.setdefault(event.process, event)
    return exits


def is_kill(event: Event) -> bool:
    """Whether an event is a SIGKILL that can have ended somebody."""
    is_sent = event.kind is EventKind.SIGNAL_SENT and event.signal == SIGKILL
    return is_sent and event.result in (None, *DELIVERED)


def status_of(own: Iterable[Event]) -> ExitStatus | None:
    """The wait status: in the exit event, or in the reap event when it was pending."""
    kinds = (EventKind.PROCESS_EXIT, EventKind.PROCESS_REAPED)
    return next((e.exit for e in own if e.kind in kinds and e.exit is not None), None)


def main_end(processes: Iterable[WatchedProcess], exits: Mapping[ProcessId, Event]) -> int | None:
    """When the main process ended, None when it has not."""
    mains = (process.id for process in processes if process.role is Role.MAIN)
    return min((exits[main].at_us for main in mains if main in exits), default=None)
