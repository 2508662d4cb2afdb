"""The kernel's record of two sources that read scripts: order, what is behind, what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from sdtool.host import record as module
from sdtool.host.eventlog import now_us
from sdtool.host.record import KernelRecord
from sdtool.model.kernel import KernelEvent
from sdtool.model.stop import EventSource
from tests.unit.make import UNIT, task_born, task_ended

TRACEFS, PROCEVENTS = EventSource.TRACEFS, EventSource.PROCEVENTS
MAIN = 10
FOREVER = 1 << 62


@dataclass
class Reading:
    """What one call gives, what is complete by then, and how much was lost so far."""

    events: Sequence[KernelEvent] = ()
    complete_us: int = FOREVER
    lost: int = 0


@dataclass
class Script:
    """A source that gives one reading after the other, and the last one's counts for ever."""

    readings: list[Reading]
    complete_us: int = FOREVER
    lost: int = 0
    closed: bool = False

    def read(self) -> list[KernelEvent]:
        """The next reading."""
        if not self.readings:
            return []
        reading = self.readings.pop(0)
        self.complete_us, self.lost = reading.complete_us, reading.lost
        return list(reading.events)

    def close(self) -> None:
        """It was let go of."""
        self.closed = True


@dataclass
class Heard:
    """Who watches the unit: all that it was told."""

    events: list[KernelEvent] = field(default_factory=list)
    gaps: list[tuple[EventSource, str]] = field(default_factory=list)

    def take_kernel_event(self, event: KernelEvent) -> None:
        """Keep it."""
        self.events.append(event)

    def take_loss(self, source: EventSource, since_us: int, until_us: int, text: str) -> None:
        """Keep it, of whatever time."""
        assert since_us <= until_us
        self.gaps.append((source, text))


@contextmanager
def record_of(
    monkeypatch: pytest.MonkeyPatch, trace: list[Reading], connector: list[Reading]
) -> Iterator[tuple[KernelRecord, Heard]]:
    """A record of these readings, the first of which are of before it was attached."""

    class Trace(Script):
        def __init__(self) -> None:
            super().__init__(trace)

        def record_signals(self, signals: Iterable[str]) -> None:
            assert [] == list(signals)

    monkeypatch.setattr(module, "KernelTrace", Trace)
    monkeypatch.setattr(module, "ProcEvents", lambda: Script(connector))
    heard = Heard()
    with KernelRecord(None) as record:
        record.attach({UNIT: heard}, {}, [], None)
        record.adopt(UNIT, MAIN, {MAIN})
        yield record, heard


def lost_by(record: KernelRecord) -> dict[str, int]:
    """What each source has lost."""
    return {state.name: state.lost for state in record.states()}


def test_what_one_has_not_read_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end that the connector tells is younger than the birth that the trace is behind with."""
    soon_us = now_us()
    born, ended = task_born(soon_us, 11, MAIN), task_ended(soon_us + 2, 11)
    trace = [Reading(), Reading([], soon_us - 1), Reading([born, ended], FOREVER)]
    second = task_born(soon_us + 1, 12, 11, source=PROCEVENTS)
    with record_of(monkeypatch, trace, [Reading(), Reading([second])]) as (record, heard):
        record.pump(FOREVER)
        assert [] == heard.events
        record.finish()
        assert [born, ended] == heard.events
        assert ([], {"tracefs": 0, "procevents": 0}) == (heard.gaps, lost_by(record))


def test_last_reading_goes_on_until_all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a storm elsewhere one reading does not get to what has happened last."""
    soon_us = now_us()
    ends = [task_ended(soon_us + number, MAIN + number) for number in range(3)]
    births = [task_born(soon_us - 9, end.pid, MAIN) for end in ends]
    trace = [Reading(), *(Reading([b, e], e.at_us) for b, e in zip(births, ends, strict=True))]
    with record_of(monkeypatch, [*trace, Reading()], []) as (record, heard):
        record.finish()
        assert {event.pid for event in ends} == {event.pid for event in heard.events}
        assert [] == heard.gaps


def test_what_is_never_read_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last reading has its end too, and says what it did not come to."""
    monkeypatch.setattr(module, "FINISH_US", 1000)
    with record_of(monkeypatch, [Reading(), Reading([], 1)], []) as (record, heard):
        record.finish()
        ((source, text),) = heard.gaps
        assert TRACEFS is source
        assert "not all events of tracefs could be read" in text
        assert {"tracefs": 1, "procevents": 0} == lost_by(record)


def test_loss_before_the_stops_is_none_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there was before is found in the units; what is lost from then on is told."""
    old = task_born(1, 11, MAIN)
    trace = [Reading([old], lost=7), Reading(lost=7), Reading(lost=9)]
    with record_of(monkeypatch, trace, []) as (record, heard):
        record.finish()
        assert ([], [], 0) == (heard.events, heard.gaps, lost_by(record)["tracefs"])
        record.finish()
        ((source, text),) = heard.gaps
        assert (TRACEFS, True, 2) == (source, "2 events" in text, lost_by(record)["tracefs"])
