"""When and how processes ended, by a record, pidfds, the manager and walks: one event for each."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtool.host.ends import NOT_TOLD, RECORD_WAIT_US, Ends
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


def ends(*, has_record: bool = True, has_pidfds: bool = True) -> tuple[Ends, EventLog]:
    """The ends of a unit that has one process, and the log that they come into."""
    log = EventLog(UNIT)
    members = Members(NOWHERE, details(), EventLog(UNIT), None)
    members.meet_born(task_born(T0, PID, 1, comm="web"), by_manager=True)
    one = Ends(log, members, has_pidfds=has_pidfds)
    one.has_record = has_record
    return one, log


def seen(
    at_us: int, status: ExitStatus | None, kind: EventKind = EventKind.PROCESS_EXIT, **fields: Any
) -> Event:
    """What a pidfd has seen, by the name that the process had before."""
    why = LATE if status is None else None
    values = {"source": PIDFD, "pid": PID, "comm": "old", "role": Role.OTHER, "text": why}
    return event(at_us, kind, **{**values, "exit": status, **fields})


def exited(at_us: int, status: ExitStatus | None, **fields: Any) -> Event:
    """The event of the end, by the record and with the name of the process as it is known."""
    values = {"source": TRACEFS, "pid": PID, "comm": "web", "role": Role.CONTROL}
    return event(at_us, EventKind.PROCESS_EXIT, **{**values, "exit": status, **fields})


def missed(at_us: int) -> Event:
    """A walk did not find it any more."""
    fields = {"source": EventSource.CGROUP, "evidence": Evidence.INFERRED, "text": "gone"}
    return event(at_us, EventKind.PROCESS_EXIT, pid=PID, at_min_us=T0, at_max_us=at_us, **fields)


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
    """With its time and its status, after a while in which the record could have told it."""
    one, log = ends()
    one.take_seen([seen(T0 + 9, KILLED)])
    wait(one, RECORD_WAIT_US)
    assert ((exited(T0 + 9, KILLED, source=PIDFD),), True) == (log.events, one.is_settled)
    one.take_told(task_ended(T0 + 5, PID))
    one.settle()
    assert 1 == len(log.events)


def test_status_that_comes_while_the_record_is_waited_for_is_in_the_event() -> None:
    """It was reaped right after a pidfd had told its end."""
    one, log = ends()
    one.take_seen([seen(T0 + 9, None)])
    one.take_seen([seen(T0 + 10, KILLED, EventKind.PROCESS_REAPED)])
    wait(one, RECORD_WAIT_US)
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
    """What is known of the first one is told at once; the second has an end of its own."""
    one, log = ends()
    one.forget(PID)
    one.take_told(task_ended(T0 + 5, PID))
    one.forget(PID)
    assert ((exited(T0 + 5, None, text=NOT_TOLD),), True) == (log.events, one.is_settled)
    one.take_told(task_ended(T0 + 7, PID, DONE))
    one.settle()
    one.forget(PID)
    assert (exited(T0 + 7, DONE),) == log.events[1:]


def test_each_process_has_its_own_end() -> None:
    """One that nobody knows has but its pid."""
    one, log = ends()
    one.take_told(task_ended(T0 + 5, PID))
    one.take_told(task_ended(T0 + 6, PID + 1, DONE))
    one.settle()
    assert (exited(T0 + 6, DONE, pid=PID + 1, comm=None, role=None),) == log.events
    assert not one.is_settled


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
    """It has bounds for the moment, and no status."""
    for has_record in (True, False):
        one, log = ends(has_record=has_record)
        one.take_missed([missed(T0 + 9)])
        wait(one, RECORD_WAIT_US)
        assert (replace(missed(T0 + 9), comm="web", role=Role.CONTROL),) == log.events


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
