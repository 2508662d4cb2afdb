"""The events of one stop: kept as they came, taken when nothing earlier can come any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from sdtool.model.stop import Event, EventKind, EventSource, WatchedProcess

HOLD_BACK_US = 50_000
"""Events are handed on this late, so that those of slower sources can be sorted in."""

OnEvents = Callable[[tuple[Event, ...]], None]


def now_us() -> int:
    """CLOCK_MONOTONIC in microseconds."""
    return time.monotonic_ns() // 1000


def names_of(process: WatchedProcess) -> dict[str, Any]:
    """What an event says of the process that it happened to."""
    return {
        "pid": process.pid,
        "start_ticks": process.start_ticks,
        "comm": process.comm,
        "role": process.role,
    }


class EventLog:
    """What was observed of one unit, with the times it happened."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._events: list[Event] = []
        # Places in the list: of those not taken yet, and of each event by its id().
        self._held: list[int] = []
        self._places: dict[int, int] = {}
        self._replaced: list[Event] = []

    @property
    def events(self) -> tuple[Event, ...]:
        """All of them, in the order they came."""
        return tuple(self._events)

    def of_kind(self, kind: EventKind) -> list[Event]:
        """Those of one kind."""
        return [event for event in self._events if event.kind is kind]

    def add(self, *events: Event) -> None:
        """Take events as an observer made them."""
        for event in events:
            self._places[id(event)] = len(self._events)
            self._held.append(len(self._events))
            self._events.append(event)

    def note(
        self,
        kind: EventKind,
        source: EventSource,
        process: WatchedProcess | None = None,
        *,
        at_us: int | None = None,
        **fields: Any,
    ) -> Event:
        """Make an event of this unit and take it; now, unless it has a time of its own.

        Args:
            process: Whom it happened to.
        """
        at_us = now_us() if at_us is None else at_us
        if process is not None:
            fields |= names_of(process)
        event = Event(unit=self._unit, at_us=at_us, kind=kind, source=source, **fields)
        self.add(event)
        return event

    def amend(self, event: Event, **better: Any) -> Event:
        """Have what is known better by now in an event, whoever else has amended it meanwhile.

        One may have taken it as it was.
        """
        return self.exchange(event, replace(self._events[self._places[id(event)]], **better))

    def exchange(self, event: Event, better: Event) -> Event:
        """Have another event in the place of one."""
        place = self._places[id(event)]
        # By its id() it is known as long as it lives.
        self._replaced.append(self._events[place])
        self._places[id(better)] = place
        self._events[place] = better
        return better

    def rename(self, process: WatchedProcess) -> None:
        """Have the name of a process in all that happened to it."""
        for event in [event for event in self._events if event.process == process.id]:
            self.amend(event, comm=process.comm)

    def drop(self, events: Iterable[Event]) -> None:
        """Forget events; one may have taken them."""
        gone = {self._places[id(event)] for event in events}
        kept = [place for place in range(len(self._events)) if place not in gone]
        moved = {place: number for number, place in enumerate(kept)}
        self._events = [self._events[place] for place in kept]
        self._held = [moved[place] for place in self._held if place in moved]
        self._places = {one: moved[at] for one, at in self._places.items() if at in moved}

    def take(self, until_us: int) -> list[Event]:
        """What happened until then and was not taken yet."""
        held, self._held = self._held, []
        ready = []
        for place in held:
            event = self._events[place]
            if event.at_us <= until_us:
                ready.append(event)
            else:
                self._held.append(place)
        return ready
