"""When and how processes ended, by a record, pidfds, the manager and walks: one event for each."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdtool.host.ends import MISSED_WAIT_US, NOT_TOLD, Ends
from sdtool.host.eventlog import EventLog, now_us
from sdtool.host.members import Members
from sdtool.model.process import Role
from sdtool.model.stop import Event, EventKind, EventSource, Evidence, ExitStatus
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.pidfds import REAP_WAIT_US
from tests.unit.make import DONE, KILLED, T0, UNIT, details, event, task_born, task_ended

NOWHERE = CgroupMount(Path("/nowhere"), 2, False)
PROCEVENTS, TRACEFS = EventSource.PROCEVENTS, EventSource.TRACEFS
PIDFD, DBUS = EventSource.PIDFD, EventSource.DBUS
PID = 1 << 22
"""More than any pid: who was told to be born is gone, wherever one looks."""

LATE = "its parent has not reaped it yet"


@dataclass
class Told:
    """What the kernel's record is like."""

    tells: bool = True
    known_us: int = 0

    def adopt(self, pid: int, tasks: Collection[int]) -> None:
        """Nobody is born here but whom a test has told of."""


def born(log: EventLog, at_us: int = T0) -> Members:
    """The processes of a unit in which one was born."""
    members = Members(NOWHERE, details(), log, None, Told())
    members.meet_born(task_born(at_us, PID, 1, comm="web"), by_manager=True)
    return members


(WEB,) = born(EventLog(UNIT)).known
WHO = {"pid": PID, "start_ticks": WEB.start_ticks}


def ends(*, has_record: bool = True, has_pidfds: bool = True) -> tuple[Ends, EventLog]:
    """The ends of a unit that has one process, and the log that they come into."""
    log = EventLog(UNIT)
    record = Told(tells=has_record)
    return Ends(log, born(EventLog(UNIT)), record, has_pidfds=has_pidfds), log


def seen(
    at_us: int, status: ExitStatus | None, kind: EventKind = EventKind.PROCESS_EXIT, **fields: Any
) -> Event:
    """What a pidfd has seen, by the name that the process had before."""
    why = LATE if status is None else None
    values = {"source": PIDFD, "comm": "old", "role": Role.OTHER, "text": why}
    return event(at_us, kind, **{**WHO, **values, "exit": status, **fields})


def exited(at_us: int, status: ExitStatus | None, **fields: Any) -> Event:
    """The event of the end, by the record and with the name of the process as it is known."""
    values = {**WHO, "source": TRACEFS, "comm": "web", "role": Role.CONTROL}
    return event(at_us, EventKind.PROCESS_EXIT, **{**values, "exit": status, **fields})


def missed(at_us: int) -> Event:
    """A walk did not find it any more."""
    fields = {"source": EventSource.CGROUP, "evidence": Evidence.INFERRED, "text": "gone"}
    bounds = {"at_min_us": T0, "at_max_us": at_us}
    return event(at_us, EventKind.PROCESS_EXIT, **{**WHO, **bounds, **fields})


def wait(one: Ends, wait_us: int) -> None:
    """Let the time pass for which an end is kept back; until then it is."""
    until_us = now_us() + wait_us
    one.settle()
    assert not one.is_settled
    while now_us() <= until_us:
        time.sleep(0.001)
    one.settle()


def test_record_tells_the_end_and_then_the_status() -> None:
    """The moment is that of the trace, the status that of the process connector."""
    one, log = ends()
    one.take_told(task_ended(T0 + 5, PID))
    one.settle()
    assert ((), False) == (log.events, one.is_settled)
    one.take_told(task_ended(T0 + 9, PID, KILLED, PROCEVENTS))
    one.settle()
    assert ((exited(T0 + 5, KILLED),), True) == (log.events, one.is_settled)


def test_status_comes_from_a_pidfd_before_the_record_tells_the_end() -> None:
    """It waits for the moment, and the record's second word changes nothing."""
    one, log = ends()
    one.take_seen([seen(T0 + 9, KILLED)])
    one.settle()
    assert () == log.events
    one.take_told(task_ended(T0 + 5, PID))
    one.take_told(task_ended(T0 + 6, PID, DONE, PROCEVENTS))
    one.settle()
    one.settle()
    assert (exited(T0 + 5, KILLED),) == log.events


def test_end_that_only_a_pidfd_tells_is_its() -> None:
    """With its time and its status, once the record has come to that moment without a word."""
    record, log = Told(), EventLog(UNIT)
    one = Ends(log, born(EventLog(UNIT)), record)
    one.take_seen([seen(T0 + 9, KILLED)])
    one.settle()
    assert ((), False) == (log.events, one.is_settled)
    record.known_us = now_us()
    one.settle()
    assert ((exited(T0 + 9, KILLED, source=PIDFD),), True) == (log.events, one.is_settled)


def test_record_that_comes_late_has_the_better_word() -> None:
    """The event that was made without it is its own then."""
    one, log = ends()
    one.take_seen([seen(T0 + 9, KILLED, at_min_us=T0, at_max_us=T0 + 9)])
    one.finish()
    assert T0 + 9 == log.events[0].at_us
    one.take_told(task_ended(T0 + 5, PID))
    one.take_told(task_ended(T0 + 6, PID, DONE, PROCEVENTS))
    assert (exited(T0 + 5, KILLED),) == log.events


def test_status_that_comes_while_the_record_is_waited_for_is_in_the_event() -> None:
    """It was reaped right after a pidfd had told its end."""
    one, log = ends()
    one.take_seen([seen(T0 + 9, None)])
    one.take_seen([seen(T0 + 10, KILLED, EventKind.PROCESS_REAPED)])
    assert () == log.events
    one.finish()
    assert (exited(T0 + 9, KILLED, source=PIDFD),) == log.events


def test_status_that_comes_late_has_its_own_event() -> None:
    """Its parent takes its time to reap it, and then it has one status."""
    one, log = ends()
    one.take_told(task_ended(T0 + 5, PID))
    one.take_seen([seen(T0 + 5, None)])
    wait(one, REAP_WAIT_US)
    assert (exited(T0 + 5, None, text=LATE),) == log.events
    one.take_seen([seen(T0 + 10, KILLED, EventKind.PROCESS_REAPED)])
    one.take_told(task_ended(T0 + 6, PID, DONE, PROCEVENTS))
    (_, reaped) = log.events
    assert (EventKind.PROCESS_REAPED, PIDFD, KILLED) == (reaped.kind, reaped.source, reaped.exit)
    assert (PID, "web", Role.CONTROL) == (reaped.pid, reaped.comm, reaped.role)


def test_status_that_nobody_tells_has_its_reason() -> None:
    """No pidfd has seen the end."""
    one, log = ends()
    one.take_told(task_ended(T0 + 5, PID))
    wait(one, REAP_WAIT_US)
    assert (exited(T0 + 5, None, text=NOT_TOLD),) == log.events
    one.take_told(task_ended(T0 + 6, PID, DONE, PROCEVENTS))
    assert (PROCEVENTS, DONE) == (log.events[-1].source, log.events[-1].exit)


def test_pid_comes_again() -> None:
    """Each end is that of who had the pid then, whatever comes late."""
    log, later_us = EventLog(UNIT), T0 + 10_000_000
    members = born(EventLog(UNIT))
    one = Ends(log, members, Told())
    members.meet_born(task_born(later_us, PID, 1, comm="job"), by_manager=False)
    (first, second) = members.known
    one.take_told(task_ended(T0 + 5, PID))
    one.take_told(task_ended(later_us + 7, PID, DONE))
    one.take_seen([seen(later_us + 8, KILLED)])
    one.settle()
    told = {event.process: (event.at_us, event.comm, event.exit) for event in log.events}
    assert {first.id: (T0 + 5, "web", KILLED), second.id: (later_us + 7, "job", DONE)} == told
    assert one.is_settled


def test_process_that_nobody_has_seen_is_of_the_unit() -> None:
    """It was gone before anybody could look at it, and its end was told."""
    log, members = EventLog(UNIT), born(EventLog(UNIT))
    one = Ends(log, members, Told())
    one.take_told(task_ended(T0 + 5, PID))
    one.take_told(task_ended(T0 + 6, PID + 1, DONE))
    one.settle()
    unseen = {"pid": PID + 1, "start_ticks": 0, "comm": "?", "role": Role.OTHER}
    assert (exited(T0 + 6, DONE, **unseen),) == log.events
    assert not one.is_settled
    assert [PID, PID + 1] == [process.pid for process in members.known]


def test_pidfds_alone_are_believed_where_there_is_no_record() -> None:
    """At once, and the status when it can be read."""
    one, log = ends(has_record=False)
    one.take_seen([seen(T0 + 9, None)])
    assert (exited(T0 + 9, None, source=PIDFD, text=LATE),) == log.events
    one.take_seen([seen(T0 + 10, KILLED, EventKind.PROCESS_REAPED)])
    (_, reaped) = log.events
    assert (EventKind.PROCESS_REAPED, PIDFD, KILLED) == (reaped.kind, reaped.source, reaped.exit)


# The manager's word --------------------------------------------------------------------------


def test_manager_gives_the_status_where_the_record_has_the_moment() -> None:
    """It has waited for the process, a little later."""
    one, log = ends()
    one.take_told(task_ended(T0 + 5, PID))
    one.take_waited(PID, T0 + 8, KILLED)
    assert (exited(T0 + 5, KILLED),) == log.events


def test_manager_gives_the_moment_where_nobody_else_does() -> None:
    """At once without pidfds and a record."""
    one, log = ends(has_record=False, has_pidfds=False)
    one.take_waited(PID, T0 + 8, KILLED)
    assert (exited(T0 + 8, KILLED, source=DBUS),) == log.events


def test_pidfd_has_a_better_moment_than_the_manager() -> None:
    """It is waited for, and the status is there already."""
    one, log = ends(has_record=False)
    one.take_waited(PID, T0 + 8, KILLED)
    assert () == log.events
    one.take_seen([seen(T0 + 6, None)])
    assert (exited(T0 + 6, KILLED, source=PIDFD),) == log.events


def test_who_ended_before_one_that_the_manager_dates_did_so_before_that() -> None:
    """Pidfds that were looked at late: they have the order of the ends, it has the moment."""
    main, others = PID, (PID + 1, PID + 2, PID + 3)
    one, log = ends(has_record=False)
    one.take_waited(main, T0 + 100, DONE)
    first, second, last = others
    one.take_seen(
        [
            seen(T0 + 50, KILLED, pid=first),
            seen(T0 + 201, KILLED, pid=last, at_min_us=T0, at_max_us=T0 + 201),
            seen(T0 + 200, DONE, pid=main),
        ]
    )
    one.take_seen([seen(T0 + 199, KILLED, pid=second, at_min_us=T0, at_max_us=T0 + 199)])
    told = {event.pid: (event.at_us - T0, event.at_max_us) for event in log.events}
    expected = {main: (100, None), first: (50, None), second: (99, T0 + 99)}
    assert {**expected, last: (201, T0 + 201)} == told


def test_end_that_was_told_already_moves_before_one_that_the_manager_dates() -> None:
    """A parent reaps its child and ends, and the manager says so when the child has been told."""
    one, log = ends(has_record=False)
    one.take_seen([seen(T0 + 200, KILLED, pid=PID + 1)])
    assert [T0 + 200] == [event.at_us for event in log.events]
    one.take_waited(PID, T0 + 100, DONE)
    one.take_seen([seen(T0 + 201, DONE)])
    told = [(event.pid, event.at_us, event.exit) for event in log.events]
    assert [(PID + 1, T0 + 99, KILLED), (PID, T0 + 100, DONE)] == told
    assert list(log.events) == log.take(T0 + 100)


def test_each_of_several_that_the_manager_dates_has_its_own_moment() -> None:
    """What one is moved by moves no other one further."""
    for late in (False, True):
        log, members = EventLog(UNIT), born(EventLog(UNIT))
        members.meet_born(task_born(T0 + 1, PID + 1, 1, comm="job"), by_manager=True)
        one = Ends(log, members, Told(tells=False))
        first, second = members.known
        looks = [
            seen(T0 + 200, DONE, pid=first.pid, start_ticks=first.start_ticks),
            seen(T0 + 201, DONE, pid=second.pid, start_ticks=second.start_ticks),
        ]
        if late:
            one.take_seen(looks)
        one.take_waited(second.pid, T0 + 150, DONE)
        one.take_waited(first.pid, T0 + 100, DONE)
        if not late:
            one.take_seen(looks)
        assert [100, 150] == sorted(event.at_us - T0 for event in log.events)


def test_one_that_was_found_when_it_had_ended_says_nothing_of_the_others() -> None:
    """Its pidfd was readable at once: that others were so before says nothing of their time."""
    log, members = EventLog(UNIT), born(EventLog(UNIT), T0 + 150)
    (late,) = members.known
    one = Ends(log, members, Told(tells=False))
    found = {"pid": late.pid, "start_ticks": late.start_ticks}
    one.take_seen([seen(T0 + 200, KILLED, pid=PID + 1), seen(T0 + 201, None, **found)])
    one.take_waited(PID, T0 + 100, DONE)
    told = [event.at_us - T0 for event in log.events if event.kind is EventKind.PROCESS_EXIT]
    assert [200, 100] == told


def test_manager_dates_an_end_that_was_told_already() -> None:
    """Its word comes behind what a pidfd has seen late."""
    one, log = ends(has_record=False)
    one.take_seen([seen(T0 + 200, KILLED, at_min_us=T0, at_max_us=T0 + 200)])
    one.take_waited(PID, T0 + 100, KILLED)
    (event,) = log.events
    assert (T0 + 100, T0 + 100, PIDFD) == (event.at_us, event.at_max_us, event.source)


def test_manager_is_believed_when_no_pidfd_says_anything() -> None:
    """It may not have watched that one."""
    one, log = ends(has_record=False)
    one.take_waited(PID, T0 + 8, KILLED)
    wait(one, REAP_WAIT_US)
    assert (exited(T0 + 8, KILLED, source=DBUS),) == log.events


def test_status_that_the_manager_tells_late_has_its_moment() -> None:
    """That of its wait(2)."""
    one, log = ends(has_record=False)
    one.take_seen([seen(T0 + 6, None)])
    one.take_waited(PID, T0 + 8, KILLED)
    (_, reaped) = log.events
    assert EventKind.PROCESS_REAPED is reaped.kind
    assert (DBUS, T0 + 8, KILLED) == (reaped.source, reaped.at_us, reaped.exit)


# Walks ---------------------------------------------------------------------------------------


def test_walk_is_believed_when_nobody_else_says_anything() -> None:
    """It has bounds for the moment, and no status; a status that comes late has the moment too."""
    one, log = ends(has_record=False)
    one.take_missed([missed(T0 + 9)])
    wait(one, MISSED_WAIT_US)
    assert (replace(missed(T0 + 9), comm="web", role=Role.CONTROL),) == log.events
    one.take_waited(PID, T0 + 7, KILLED)
    assert (exited(T0 + 7, KILLED, source=DBUS),) == log.events


def test_walk_is_the_last_to_be_believed() -> None:
    """Whoever else knows of the end knows more."""
    one, log = ends()
    one.take_missed([missed(T0 + 9)])
    one.take_told(task_ended(T0 + 5, PID, KILLED))
    one.settle()
    assert (exited(T0 + 5, KILLED),) == log.events
    one, log = ends(has_record=False, has_pidfds=False)
    one.take_missed([missed(T0 + 9)])
    one.take_waited(PID, T0 + 8, KILLED)
    assert (exited(T0 + 8, KILLED, source=DBUS),) == log.events
