"""The kernel's own record while units stop: one trace, one process connector, for all of them.

What they tell is of the whole machine: it is put in order, and each unit gets what is about its
processes. It has times of its own, so it is read a few times in a blink and not for each event:
a storm of them elsewhere on the machine costs no more than its reading.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import Protocol

from sdtool.analysis.lineage import Lineage, Routed
from sdtool.analysis.tiers import explain_switch, tier_of
from sdtool.host.eventlog import now_us
from sdtool.model.kernel import KernelEvent
from sdtool.model.stop import EventSource, ObserverState, Tier
from sdtool.sources import cgroups, libc, procevents, tracepoints
from sdtool.sources.procevents import ProcEvents, explain_silence
from sdtool.sources.tracefs import explain_refusal
from sdtool.sources.tracepoints import KernelTrace

log = logging.getLogger(__name__)

HOLD_US = 2_000
"""What is so young waits until the next reading: something older may still come."""

FINISH_US = 500_000
"""How long the last reading takes at most: in a storm of events elsewhere it needs several."""

UNREAD = "not all events of {source} could be read: signals, births and ends may be missing"

LOSS = "{lost} events of {source} were lost: signals, births and ends may be missing"


class Recorder(Protocol):
    """What records for the whole machine."""

    @property
    def lost(self) -> int:
        """How many events were lost so far."""

    @property
    def complete_us(self) -> int:
        """What happened until then has been read, or is lost."""

    def read(self) -> list[KernelEvent]:
        """The events since the last call."""

    def close(self) -> None:
        """Stop recording."""


class Watcher(Protocol):
    """Somebody who watches one unit, and is told what the kernel says of its processes."""

    def take_kernel_event(self, event: KernelEvent) -> None:
        """Take what happened to one of its processes."""

    def take_loss(self, source: EventSource, since_us: int, until_us: int, text: str) -> None:
        """Take note that something may have happened which is not told."""


class KernelRecord:
    """Both sources, from before the stops until they are over; a context manager.

    Entering it takes no time: the kernel is asked beside what follows, and waited for when the
    record is needed. It is let go of in the same way.

    Args:
        wanted: Names of ``OBSERVERS`` to use; None for all.

    Attributes:
        manager: The process of the manager; None while that is not known.
        known_us: What happened until then has been handed out.
    """

    def __init__(self, wanted: frozenset[str] | None) -> None:
        self.manager: int | None = None
        self.known_us = 0
        self._wanted = wanted
        self._recorders: dict[EventSource, Recorder] = {}
        self._reasons: dict[EventSource, str] = {}
        # How many each had lost before the stops, and since.
        self._lost_before: dict[EventSource, int] = {}
        self._lost: dict[EventSource, int] = {}
        self._waiting: list[KernelEvent] = []
        self._lineage: Lineage | None = None
        self._units: Mapping[str, Watcher] = {}
        self._pumped_us = now_us()
        self._opening: threading.Thread | None = None
        self._home: str | None = None
        self._failure: Exception | None = None
        self._is_closed = False

    def __enter__(self) -> KernelRecord:
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Begin to make the sources ready, beside whatever else there is to do."""
        with contextlib.suppress(OSError):
            libc.load()
        self._opening = _start(self._open)

    def _open(self) -> None:
        try:
            self._try_all()
        except Exception as error:
            self._failure = error  # for who waits for us: a thread can tell nobody

    def _ready(self) -> None:
        """Wait for the sources; they take less than a tenth of a second, a deaf one one more."""
        if self._opening is not None:
            self._opening.join()
            self._opening = None
        if self._failure is not None:
            raise self._failure

    def _try_all(self) -> None:
        self._try(EventSource.TRACEFS, KernelTrace, tracepoints.GIVES, explain_refusal)
        self._try(EventSource.PROCEVENTS, ProcEvents, procevents.GIVES, explain_silence)

    def _try(
        self,
        source: EventSource,
        make: Callable[[], Recorder],
        gives: str,
        explain: Callable[[OSError], str],
    ) -> None:
        if off := explain_switch(source.value, self._wanted):
            self._reasons[source] = off
            return
        try:
            self._recorders[source] = make()
            self._reasons[source] = gives
            self._lost_before[source] = self._lost[source] = 0
        except OSError as error:
            self._reasons[source] = explain(error)
        except (ValueError, KeyError) as error:
            self._reasons[source] = f"this kernel speaks of it in another way: {error}"

    def attach(
        self,
        units: Mapping[str, Watcher],
        groups: Mapping[str, str],
        signals: Iterable[str],
        manager: int | None,
    ) -> None:
        """Have it ready: from now on each unit is told of its processes.

        Args:
            groups: The units by their cgroups.
            signals: Those that may end the units, by name.
            manager: The process of the manager; None when that is not known.
        """
        self.manager = manager
        self._home = cgroups.read_process_cgroup(manager) if manager is not None else None
        self._ready()
        self._forget_the_past()
        self._units = units
        self.record_signals(signals)
        if self._recorders:
            managers = () if self.manager is None else (self.manager,)
            self._lineage = Lineage(next(iter(self._recorders)), managers, groups)

    def _forget_the_past(self) -> None:
        """Read, and lose, what happened before: who is in the units by now is found there."""
        for source, recorder in tuple(self._recorders.items()):
            try:
                recorder.read()
            except OSError as error:
                self._lose(source, error.strerror or str(error))
            else:
                self._lost_before[source] = recorder.lost
        self._pumped_us = now_us()

    def record_signals(self, signals: Iterable[str]) -> None:
        """Have the trace record these signals too; one that does not says too little."""
        trace = self._recorders.get(EventSource.TRACEFS)
        if self._is_closed or not isinstance(trace, KernelTrace):
            return
        try:
            trace.record_signals(signals)
        except OSError as error:
            self._lose(EventSource.TRACEFS, explain_refusal(error))

    def _lose(self, source: EventSource, reason: str) -> None:
        """A source works no more: from here on nothing is told by it."""
        _start(partial(_let_go, self._recorders.pop(source)))
        self._reasons[source] = reason
        if self._lineage is not None:
            text = f"{source.value} tells nothing any more: {reason}"
            self._lineage.mistrust()
            for other in self._recorders:
                self._lineage.rely_on(other)
            self._tell_gap(source, now_us(), text)

    def tier(self, *, tell_status: bool) -> Tier:
        """How much of a stop can be seen.

        Args:
            tell_status: Somebody else tells how processes end.
        """
        self._ready()
        return tier_of(
            sees_signals=EventSource.TRACEFS in self._recorders,
            sees_births=EventSource.PROCEVENTS in self._recorders,
            sees_status=tell_status,
        )

    @property
    def sees_signals(self) -> bool:
        """Whether all signals that were sent so far are, or will be, handed out."""
        self._ready()
        return EventSource.TRACEFS in self._recorders and not self._lost[EventSource.TRACEFS]

    @property
    def sources(self) -> frozenset[EventSource]:
        """Those that work."""
        self._ready()
        return frozenset(self._recorders)

    def adopt(self, unit: str, pid: int, tasks: Collection[int]) -> None:
        """A process was found in a unit: from now on the unit is told of it."""
        if self._lineage is not None:
            self._hand_out(self._lineage.adopt(unit, pid, tasks, now_us()))

    def pump(self, until_us: int) -> None:
        """Hand out what happened until then, unless that was done; and what has come since."""
        if self._lineage is not None and self._pumped_us < until_us:
            self._read(self._lineage, HOLD_US)

    def finish(self) -> None:
        """Hand out all that has happened until now; what cannot be read any more is a gap."""
        for source in self.catch_up(now_us()):
            self._lost[source] += 1  # at least
            self._tell_gap(source, now_us(), UNREAD.format(source=source.value))

    def catch_up(self, at_us: int) -> list[EventSource]:
        """Hand out all that had happened by a moment; the sources that are behind all the same."""
        if self._lineage is None or self.known_us >= at_us:
            return []
        until_us = now_us() + FINISH_US
        self._read(self._lineage, 0)
        while (behind := self._behind(at_us)) and now_us() < until_us:
            self._read(self._lineage, 0)
        return behind

    def _behind(self, at_us: int) -> list[EventSource]:
        """The sources of which something is unread that happened before."""
        return [source for source, one in self._recorders.items() if one.complete_us < at_us]

    def _read(self, lineage: Lineage, hold_us: int) -> None:
        # What happened until now is in the buffers by now, whatever processor it happened on; a
        # processor that was taken away in between may be a moment late.
        until_us = now_us()
        for source, recorder in tuple(self._recorders.items()):
            try:
                self._waiting += recorder.read()
            except OSError as error:
                self._lose(source, error.strerror or str(error))
                continue
            lost = recorder.lost - self._lost_before[source]
            if lost > self._lost[source]:
                self._note_loss(source, lost, until_us)
        self._waiting.sort(key=attrgetter("at_us"))
        # What is unread by one may be older than what another has told.
        known_us = min([until_us, *(one.complete_us for one in self._recorders.values())])
        ready = [event for event in self._waiting if event.at_us <= known_us - hold_us]
        self._waiting = self._waiting[len(ready) :]
        self._pumped_us = until_us
        for event in ready:
            self._hand_out(lineage.feed(event))
        self._find_strays(lineage)
        self.known_us = known_us - hold_us

    def _hand_out(self, routed: Iterable[Routed]) -> None:
        for name, event in routed:
            self._units[name].take_kernel_event(event)

    def _find_strays(self, lineage: Lineage) -> None:
        """Look where a manager has put its children, which it moves or makes there."""
        for pid in lineage.strays:
            path = cgroups.read_process_cgroup(pid)
            if path is None or path == self._home:
                continue  # gone, or not moved yet
            unit = lineage.unit_of(path)
            if unit is None:
                lineage.dismiss(pid)
            else:
                self._hand_out(lineage.adopt(unit, pid, (), now_us()))

    def _note_loss(self, source: EventSource, lost: int, until_us: int) -> None:
        text = LOSS.format(lost=lost - self._lost[source], source=source.value)
        self._lost[source] = lost
        if self._lineage is not None:
            self._lineage.mistrust()
        self._tell_gap(source, until_us, text)

    def _tell_gap(self, source: EventSource, until_us: int, text: str) -> None:
        for unit in self._units.values():
            unit.take_loss(source, self._pumped_us, until_us, text)

    def leave(self, pid: int) -> None:
        """A process has left its unit: what becomes of it is not told any more."""
        if self._lineage is not None:
            self._lineage.leave(pid)

    def states(self) -> tuple[ObserverState, ...]:
        """What each gave, or why it is not there."""
        self._ready()
        return tuple(
            ObserverState(
                name=source.value,
                available=source in self._recorders,
                reason=reason,
                lost=self._lost.get(source, 0),
            )
            for source, reason in self._reasons.items()
        )

    def close(self) -> None:
        """Let go of everything, beside whatever else there is to do; safe at any moment.

        What worked, and what was lost, can still be asked for.
        """
        self._lineage = None
        if self._opening is not None:
            self._opening.join()
            self._opening = None
        if not self._is_closed:
            self._is_closed = True
            for recorder in self._recorders.values():
                _start(partial(_let_go, recorder))


class UnitRecord:
    """The record as it is for one unit; it can work at one moment and not at the next."""

    def __init__(self, record: KernelRecord, unit: str) -> None:
        self._record = record
        self._unit = unit

    @property
    def tells(self) -> bool:
        """Whether it tells of births and ends, and has the best word on when they were."""
        return bool(self._record.sources)

    @property
    def sees_signals(self) -> bool:
        """Whether those that are sent are told: none has to be concluded."""
        return self._record.sees_signals

    @property
    def known_us(self) -> int:
        """What happened until then has been told."""
        return self._record.known_us

    @property
    def manager(self) -> int | None:
        """The process of the manager; None while that is not known."""
        return self._record.manager

    def adopt(self, pid: int, tasks: Collection[int]) -> None:
        """Have the unit told of a process that was found in it, by its tasks."""
        self._record.adopt(self._unit, pid, tasks)

    def leave(self, pid: int) -> None:
        """Have it told no more of a process."""
        self._record.leave(pid)


def _start(work: Callable[[], None]) -> threading.Thread | None:
    """Have it done in a thread; where there may be none more it is done at once."""
    thread = threading.Thread(target=work, name="sdtool record")
    try:
        thread.start()
    except RuntimeError:
        work()
        return None
    return thread


def _let_go(recorder: Recorder) -> None:
    try:
        recorder.close()
    except OSError as error:
        # Somebody looks into it just now; the next stop removes it.
        log.debug("a source of the kernel's record stays: %s", error)
