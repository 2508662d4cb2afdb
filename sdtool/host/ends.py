"""When each process of a unit ended, and how, where several sources tell of it.

The kernel's record has the moment; the wait status comes with it, from the process connector, or
from a pidfd once the process is reaped. One event is made of that, when both are known or have
been waited for long enough; a status that comes later has an event of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sdtool.host.eventlog import EventLog, now_us
from sdtool.host.members import Members
from sdtool.model.kernel import TaskEnded
from sdtool.model.stop import Event, EventKind, ExitStatus
from sdtool.sources.pidfds import REAP_WAIT_US

RECORD_WAIT_US = 20_000
"""How long the end that a pidfd tells is kept back for the moment that the record has of it."""

NOT_TOLD = "its wait status was not told"


@dataclass(slots=True)
class _End:
    """What is known of the end of one process.

    Attributes:
        told: By the record; None while only a pidfd has told it.
        seen: By a pidfd.
        heard_us: When the first of them was heard.
        is_open: The event of it is still to be made.
    """

    heard_us: int
    told: TaskEnded | None = None
    seen: Event | None = None
    status: ExitStatus | None = None
    is_open: bool = True


class Ends:
    """The ends of the processes of one unit.

    Attributes:
        has_record: The kernel's record tells of ends; without it pidfds alone do.
    """

    def __init__(self, log: EventLog, members: Members) -> None:
        self._log = log
        self._members = members
        self._ends: dict[int, _End] = {}
        self.has_record = False

    @property
    def is_settled(self) -> bool:
        """Whether nothing is kept back."""
        return not any(end.is_open for end in self._ends.values())

    def forget(self, pid: int) -> None:
        """A new process has this pid now."""
        end = self._ends.pop(pid, None)
        if end is not None and end.is_open:
            self._close(pid, end)

    def take_told(self, event: TaskEnded) -> None:
        """Take what the record says: the end, or only its status."""
        end = self._ends.setdefault(event.pid, _End(now_us()))
        if end.told is None:
            end.told = event
        self._note_status(event.pid, end, event.status, event)

    def take_seen(self, events: Iterable[Event]) -> None:
        """Take what pidfds say, as events."""
        for event in events:
            if not self.has_record or event.pid is None:
                self._log.add(event)
                continue
            end = self._ends.setdefault(event.pid, _End(now_us()))
            end.seen = end.seen or event
            self._note_status(event.pid, end, event.exit, event)

    def _note_status(
        self, pid: int, end: _End, status: ExitStatus | None, teller: Event | TaskEnded
    ) -> None:
        """Keep the first status; one that the event of the end lacked has an event of its own."""
        if status is None or end.status is not None:
            return
        end.status = status
        if not end.is_open:
            self._log.note(EventKind.PROCESS_REAPED, teller.source, **self._who(pid), exit=status)

    def settle(self) -> None:
        """Make the events of which all is known, or that have waited long enough."""
        now = now_us()
        for pid, end in self._ends.items():
            if end.is_open and _is_ready(end, now):
                self._close(pid, end)

    def _close(self, pid: int, end: _End) -> None:
        end.is_open = False
        if end.told is None:
            assert end.seen is not None, "one of the two has made it"
            self._log.add(replace(end.seen, **self._who(pid)))
            return
        why = None
        if end.status is None:
            why = end.seen.text if end.seen is not None else NOT_TOLD
        self._log.note(
            EventKind.PROCESS_EXIT,
            end.told.source,
            at_us=end.told.at_us,
            **self._who(pid),
            exit=end.status,
            text=why,
        )

    def _who(self, pid: int) -> dict[str, Any]:
        process = self._members.find(pid)
        if process is None:
            return {"pid": pid}
        return {"pid": pid, "comm": process.comm, "role": process.role}


def _is_ready(end: _End, now: int) -> bool:
    if end.told is None:
        return now - end.heard_us > RECORD_WAIT_US
    return end.status is not None or now - end.heard_us > REAP_WAIT_US
