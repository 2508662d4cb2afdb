"""When each process of a unit ended, and how, where several sources tell of it.

The kernel's record has the moment; the wait status comes with it, from the process connector,
from a pidfd once the process is reaped, or from the manager for its own children. One event is
made of that, when both are known or have been waited for long enough; a status that comes later
has an event of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sdtool.host.eventlog import EventLog, names_of, now_us
from sdtool.host.members import Members
from sdtool.model.kernel import TaskEnded
from sdtool.model.process import ProcessId
from sdtool.model.stop import Event, EventKind, EventSource, ExitStatus
from sdtool.sources.pidfds import REAP_WAIT_US

RECORD_WAIT_US = 20_000
"""How long what others tell is kept back for the moment that the record has of it."""

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

    Attributes:
        has_record: The kernel's record tells of ends, and has the best word on when they were.
        has_pidfds: They are watched by pidfds.
    """

    def __init__(self, log: EventLog, members: Members, *, has_pidfds: bool = True) -> None:
        self._log = log
        self._members = members
        self._ends: dict[ProcessId, _End] = {}
        # Of thousands few are waited for at a time.
        self._open: dict[ProcessId, _End] = {}
        # Ends that the manager dates: when a pidfd saw each, and when the manager had waited.
        self._dated: list[tuple[int, int]] = []
        self.has_record = False
        self.has_pidfds = has_pidfds

    @property
    def is_settled(self) -> bool:
        """Whether nothing is kept back."""
        return not self._open

    def take_told(self, event: TaskEnded) -> None:
        """Take what the record says: the end, or only its status."""
        process = self._members.find_ended(event.pid, event.at_us)
        end = self._find(process.id)
        end.told = end.told or event
        self._note_status(process.id, end, event.status, event.source)

    def take_seen(self, events: Iterable[Event]) -> None:
        """Take what pidfds say, as events; their times have the order of the ends."""
        for event in events:
            if event.process is None:
                continue
            end = self._find(event.process)
            end.seen = end.seen or event
            self._date(event.process, end)
            self._note_status(event.process, end, event.exit, event.source)
        self.settle()

    def _date(self, identity: ProcessId, end: _End) -> None:
        """Give an end that a pidfd saw no later a time than what the manager says allows.

        On a busy machine a pidfd is looked at late, and the manager has waited for its child by
        then. What its time passes was before as well: pidfds have the order of the ends, but for
        those that were watched too late.
        """
        seen, waited = end.seen, end.waited
        if seen is not None and waited is not None and waited < seen.at_us:
            self._shift(end, seen.at_us, waited)
            process = self._members.get(identity)
            if process is not None and (process.seen_us or 0) < waited:
                self._dated.append((seen.at_us, waited))
                for other in self._ends.values():
                    self._shift(other, seen.at_us, waited)
        for seen_us, was_us in self._dated:
            self._shift(end, seen_us, was_us)

    def _shift(self, end: _End, seen_us: int, was_us: int) -> None:
        """Move an end that was seen before one, by which that was seen too late."""
        seen = end.seen
        if seen is None or not was_us < seen.at_us <= seen_us:
            return
        at_us = was_us - (seen_us - seen.at_us)
        end.seen = replace(seen, at_us=at_us, at_max_us=None if seen.at_max_us is None else at_us)
        if end.event is not None and end.event.source is seen.source:
            moved = replace(end.event, at_us=at_us, at_max_us=end.seen.at_max_us)
            self._log.exchange(end.event, moved)
            end.event = moved

    def take_waited(
        self, pid: int, at_us: int, status: ExitStatus, *, is_last: bool = False
    ) -> None:
        """Take what the manager says of a process that it has waited for.

        Args:
            is_last: Nobody has more to say of it.
        """
        identity = self._members.find_ended(pid, at_us).id
        end = self._find(identity)
        end.waited = end.waited or at_us
        self._date(identity, end)
        self._note_status(identity, end, status, EventSource.DBUS)
        if is_last and identity in self._open:
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
        if identity not in self._open:
            at_us = end.waited if source is EventSource.DBUS else None
            process = self._members.get(identity)
            self._log.note(EventKind.PROCESS_REAPED, source, process, at_us=at_us, exit=status)
        elif end.told is not None:
            self._members.release(identity)

    def settle(self) -> None:
        """Make the events of which all is known, or that have waited long enough."""
        now = now_us()
        for identity, end in tuple(self._open.items()):
            if now - end.heard_us > self._patience_us(end):
                self._close(identity)

    def _patience_us(self, end: _End) -> int:
        """How long to wait for what a better teller may still say; less than 0 for not at all."""
        if end.told is not None:
            return REAP_WAIT_US if end.status is None else -1
        if self.has_record or (end.seen is None and end.waited is None):
            return RECORD_WAIT_US
        return REAP_WAIT_US if end.seen is None and self.has_pidfds else -1

    def _close(self, identity: ProcessId) -> None:
        """Make the event of an end."""
        end = self._open.pop(identity)
        process = self._members.get(identity)
        if end.told is not None:
            source, at_us = end.told.source, end.told.at_us
        elif better := end.seen or (end.missed if end.waited is None else None):
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
