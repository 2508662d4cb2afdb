"""When each process of a unit ended, and how, where several sources tell of it.

The kernel's record has the moment; the wait status comes with it, from the process connector,
from a pidfd once the process is reaped, or from the manager for its own children. One event is
made of that, when both are known or have been waited for long enough; a status that comes later
has an event of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sdtool.host.eventlog import EventLog, names_of, now_us
from sdtool.host.members import Members
from sdtool.host.record import UnitRecord
from sdtool.model.kernel import TaskEnded
from sdtool.model.process import ProcessId
from sdtool.model.stop import Event, EventKind, EventSource, Evidence, ExitStatus
from sdtool.sources.pidfds import REAP_WAIT_US

MISSED_WAIT_US = 20_000
"""How long an end that a walk has missed is kept back for who knows more of it."""

LATEST_US = 1_000_000
"""How long what others tell is kept back at most, where a storm of events is read."""

NOT_TOLD = "its wait status was not told"


@dataclass(slots=True)
class _End:
    """What is known of the end of one process.

    Attributes:
        heard_us: When it was first heard of.
        told: By the kernel's record.
        seen: By a pidfd.
        waited: By the manager, which was told by wait(2): when it was.
        missed: By a walk of the cgroup, which it was in before.
        event: What was made of all that, once it was.
    """

    heard_us: int
    told: TaskEnded | None = None
    seen: Event | None = None
    waited: int | None = None
    missed: Event | None = None
    status: ExitStatus | None = None
    event: Event | None = None


class Ends:
    """The ends of the processes of one unit.

    Args:
        record: The kernel's: where it tells of ends it has the best word on when they were.
        has_pidfds: They are watched by pidfds.
    """

    def __init__(
        self, log: EventLog, members: Members, record: UnitRecord, *, has_pidfds: bool = True
    ) -> None:
        self._log = log
        self._members = members
        self._record = record
        self._has_pidfds = has_pidfds
        self._ends: dict[ProcessId, _End] = {}
        # Of thousands few are waited for at a time.
        self._open: dict[ProcessId, _End] = {}
        # What the manager says of when an end was that pidfds have seen too, by their order.
        self._dated: list[tuple[int, int]] = []

    @property
    def is_settled(self) -> bool:
        """Whether nothing is kept back."""
        return not self._open

    def take_told(self, event: TaskEnded) -> None:
        """Take what the record says: the end, or only its status."""
        process = self._members.find_ended(event.pid, event.at_us)
        end = self._find(process.id)
        end.told = end.told or event
        if end.told is event:
            # It may come late, and has the better word all the same.
            self._exchange(end, source=event.source, at_us=event.at_us)
        self._note_status(process.id, end, event.status, event.source)

    def take_seen(self, events: Iterable[Event]) -> None:
        """Take what pidfds say, as events; their times have the order of the ends."""
        for event in events:
            if event.process is None:
                continue
            end = self._find(event.process)
            end.seen = end.seen or event
            self._members.look_again(event.process.pid)
            self._date(event.process, end)
            self._note_status(event.process, end, event.exit, event.source)
        self.settle()

    def _date(self, identity: ProcessId, end: _End) -> None:
        """Give an end that a pidfd saw no later a time than what the manager says allows.

        On a busy machine a pidfd is looked at late, and the manager has waited for its child by
        then. Those that were seen before that one had ended before as well: pidfds have the order
        of the ends, but for who was watched too late to be in it.
        """
        seen, waited = end.seen, end.waited
        if seen is not None and waited is not None and waited < seen.at_us:
            process = self._members.get(identity)
            if process is not None and (process.seen_us or 0) < waited:
                self._dated.append((seen.at_us, waited))
                for other in self._ends.values():
                    self._redate(other)
        self._redate(end)

    def _redate(self, end: _End) -> None:
        """Have the latest moment that is possible in the event of an end, where it was made."""
        if end.seen is None or end.event is None or end.event.source is not end.seen.source:
            return
        better = self._place(end, end.seen)
        if better.at_us < end.event.at_us:
            changes = {"at_us": better.at_us, "at_max_us": better.at_max_us}
            end.event = self._log.amend(end.event, **changes)

    def _exchange(self, end: _End, **better: Any) -> None:
        """Have a better word on an end, if it is in the log: it was seen, at its moment."""
        if end.event is None:
            return
        seen = {"at_min_us": None, "at_max_us": None, "evidence": Evidence.OBSERVED}
        end.event = self._log.amend(end.event, **{**seen, **better})

    def _place(self, end: _End, seen: Event) -> Event:
        """What a pidfd saw, at the latest moment that it can have been."""
        before = [waited - 1 for seen_us, waited in self._dated if seen.at_us < seen_us]
        at_us = min([seen.at_us, *before, *([end.waited] if end.waited is not None else ())])
        if at_us == seen.at_us:
            return seen
        # Its lower bound stands: the look before had not found it.
        return replace(seen, at_us=at_us, at_max_us=None if seen.at_max_us is None else at_us)

    def take_waited(
        self, pid: int, at_us: int, status: ExitStatus, *, is_last: bool = False
    ) -> None:
        """Take what the manager says of a process that it has waited for.

        Args:
            is_last: Only the kernel's record may have more to say of it.
        """
        identity = self._members.find_ended(pid, at_us).id
        end = self._find(identity)
        end.waited = end.waited or at_us
        self._date(identity, end)
        self._note_status(identity, end, status, EventSource.DBUS)
        if is_last and identity in self._open and not self._record.tells:
            self._close(identity)
        self.settle()

    def take_missed(self, events: Iterable[Event]) -> None:
        """Take what walks of the cgroup say, of processes that nothing better watches."""
        for event in events:
            if event.process is not None:
                end = self._find(event.process)
                end.missed = end.missed or event

    def _find(self, identity: ProcessId) -> _End:
        end = self._ends.get(identity)
        if end is None:
            end = self._ends[identity] = self._open[identity] = _End(now_us())
        return end

    def _note_status(
        self, identity: ProcessId, end: _End, status: ExitStatus | None, source: EventSource
    ) -> None:
        """Keep the first status; one that the event of the end lacked has an event of its own."""
        if status is None or end.status is not None:
            return
        end.status = status
        inferred = end.event is not None and end.event.evidence is Evidence.INFERRED
        if inferred and end.waited is not None:
            self._exchange(end, source=source, at_us=end.waited, exit=status, text=None)
        elif identity not in self._open:
            at_us = end.waited if source is EventSource.DBUS else None
            process = self._members.get(identity)
            self._log.note(EventKind.PROCESS_REAPED, source, process, at_us=at_us, exit=status)
        elif end.told is not None:
            self._members.release(identity)

    def finish(self) -> None:
        """Make the events of all: nobody has more to say."""
        for identity in tuple(self._open):
            self._close(identity)

    def settle(self) -> None:
        """Make the events of which all is known, or that have waited long enough."""
        now = now_us()
        for identity, end in tuple(self._open.items()):
            if self._is_awaited(end):
                continue
            if now - end.heard_us > self._patience_us(end):
                self._close(identity)

    def _is_awaited(self, end: _End) -> bool:
        """Whether the record may still tell of it: it has not come to when it was heard of."""
        if end.told is not None or not self._record.tells:
            return False
        late = now_us() - end.heard_us > LATEST_US
        return self._record.known_us < end.heard_us and not late

    def _patience_us(self, end: _End) -> int:
        """How long to wait for what a better teller may still say; less than 0 for not at all."""
        if end.told is not None or self._record.tells:
            return REAP_WAIT_US if end.status is None else -1
        if end.seen is None and end.waited is None:
            return MISSED_WAIT_US
        return REAP_WAIT_US if end.seen is None and self._has_pidfds else -1

    def _best(self, end: _End) -> Event | None:
        """What was seen of an end; the manager knows more than what a walk has missed."""
        if end.seen is not None:
            return self._place(end, end.seen)
        return end.missed if end.waited is None else None

    def _close(self, identity: ProcessId) -> None:
        """Make the event of an end."""
        end = self._open.pop(identity)
        process = self._members.get(identity)
        if end.told is not None:
            source, at_us = end.told.source, end.told.at_us
        elif better := self._best(end):
            why = better.text if end.status is None else None
            who = {} if process is None else names_of(process)
            end.event = replace(better, **who, exit=end.status, text=why)
            self._log.add(end.event)
            return
        else:
            source, at_us = EventSource.DBUS, end.waited or end.heard_us
        why = None
        if end.status is None:
            why = end.seen.text if end.seen is not None else NOT_TOLD
        end.event = self._log.note(
            EventKind.PROCESS_EXIT, source, process, at_us=at_us, exit=end.status, text=why
        )
