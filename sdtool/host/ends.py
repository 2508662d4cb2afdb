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

from sdtool.host.eventlog import EventLog, now_us
from sdtool.host.members import Members
from sdtool.model.kernel import TaskEnded
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
    """

    heard_us: int
    told: TaskEnded | None = None
    seen: Event | None = None
    waited: int | None = None
    missed: Event | None = None
    status: ExitStatus | None = None


class Ends:
    """The ends of the processes of one unit.

    Attributes:
        has_record: The kernel's record tells of ends, and has the best word on when they were.
        has_pidfds: They are watched by pidfds.
    """

    def __init__(self, log: EventLog, members: Members, *, has_pidfds: bool = True) -> None:
        self._log = log
        self._members = members
        self._ends: dict[int, _End] = {}
        # Of thousands few are waited for at a time.
        self._open: dict[int, _End] = {}
        self.has_record = False
        self.has_pidfds = has_pidfds

    @property
    def is_settled(self) -> bool:
        """Whether nothing is kept back."""
        return not self._open

    def forget(self, pid: int) -> None:
        """A new process has this pid now."""
        if pid in self._open:
            self._close(pid)
        self._ends.pop(pid, None)

    def take_told(self, event: TaskEnded) -> None:
        """Take what the record says: the end, or only its status."""
        end = self._find(event.pid)
        end.told = end.told or event
        self._note_status(event.pid, end, event.status, event.source)

    def take_seen(self, events: Iterable[Event]) -> None:
        """Take what pidfds say, as events."""
        for event in events:
            if event.pid is None:
                continue
            end = self._find(event.pid)
            end.seen = end.seen or event
            self._note_status(event.pid, end, event.exit, event.source)
        self.settle()

    def take_waited(
        self, pid: int, at_us: int, status: ExitStatus, *, is_last: bool = False
    ) -> None:
        """Take what the manager says of a process that it has waited for.

        Args:
            is_last: Nobody has more to say of it.
        """
        end = self._find(pid)
        end.waited = end.waited or at_us
        self._note_status(pid, end, status, EventSource.DBUS)
        if is_last and pid in self._open:
            self._close(pid)
        self.settle()

    def take_missed(self, events: Iterable[Event]) -> None:
        """Take what walks of the cgroup say, of processes that nothing better watches."""
        for event in events:
            if event.pid is not None:
                end = self._find(event.pid)
                end.missed = end.missed or event

    def _find(self, pid: int) -> _End:
        end = self._ends.get(pid)
        if end is None:
            end = self._ends[pid] = self._open[pid] = _End(now_us())
        return end

    def _note_status(
        self, pid: int, end: _End, status: ExitStatus | None, source: EventSource
    ) -> None:
        """Keep the first status; one that the event of the end lacked has an event of its own."""
        if status is None or end.status is not None:
            return
        end.status = status
        if pid not in self._open:
            at_us = end.waited if source is EventSource.DBUS else None
            who = self._who(pid)
            self._log.note(EventKind.PROCESS_REAPED, source, at_us=at_us, **who, exit=status)
        elif end.told is not None:
            self._members.release(pid)

    def settle(self) -> None:
        """Make the events of which all is known, or that have waited long enough."""
        now = now_us()
        for pid, end in tuple(self._open.items()):
            if now - end.heard_us > self._patience_us(end):
                self._close(pid)

    def _patience_us(self, end: _End) -> int:
        """How long to wait for what a better teller may still say; less than 0 for not at all."""
        if end.told is not None:
            return REAP_WAIT_US if end.status is None else -1
        if self.has_record or (end.seen is None and end.waited is None):
            return RECORD_WAIT_US
        return REAP_WAIT_US if end.seen is None and self.has_pidfds else -1

    def _close(self, pid: int) -> None:
        """Make the event of an end."""
        end = self._open.pop(pid)
        who = self._who(pid)
        if end.told is not None:
            source, at_us = end.told.source, end.told.at_us
        elif better := end.seen or (end.missed if end.waited is None else None):
            why = better.text if end.status is None else None
            if end.waited is not None and end.waited < better.at_us:
                # The manager had waited for it by then.
                better = replace(better, at_us=end.waited, at_min_us=None, at_max_us=None)
            self._log.add(replace(better, **who, exit=end.status, text=why))
            return
        else:
            source, at_us = EventSource.DBUS, end.waited or end.heard_us
        why = None
        if end.status is None:
            why = end.seen.text if end.seen is not None else NOT_TOLD
        self._log.note(
            EventKind.PROCESS_EXIT, source, at_us=at_us, **who, exit=end.status, text=why
        )

    def _who(self, pid: int) -> dict[str, Any]:
        process = self._members.find(pid)
        if process is None:
            return {"pid": pid}
        return {"pid": pid, "comm": process.comm, "role": process.role}
