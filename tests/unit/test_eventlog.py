"""The events of one stop: what is known better later takes the place of what was noted."""

from __future__ import annotations

from dataclasses import replace

from sdtool.host.eventlog import EventLog
from sdtool.model.stop import EventKind, EventSource
from tests.unit.make import CHILD, MAIN, UNIT, ms

NEW, EXIT = EventKind.PROCESS_NEW, EventKind.PROCESS_EXIT


def test_what_several_know_better_is_all_in_one_event() -> None:
    """Each has the event as it was made, and the others may have amended it."""
    log = EventLog(UNIT)
    made = log.note(EXIT, EventSource.PIDFD, CHILD, at_us=ms(9))
    log.rename(replace(CHILD, comm="sleep"))
    earlier = log.amend(made, at_us=ms(5))
    log.amend(made, text="late")
    (event,) = log.events
    assert (ms(5), "sleep", "late") == (event.at_us, event.comm, event.text)
    assert (ms(5), "sleep") == (earlier.at_us, earlier.comm)


def test_name_is_that_of_one_process() -> None:
    """Nobody else is called so."""
    log = EventLog(UNIT)
    log.note(NEW, EventSource.CGROUP, MAIN)
    log.note(NEW, EventSource.CGROUP, CHILD)
    log.rename(replace(CHILD, comm="sleep"))
    assert [MAIN.comm, "sleep"] == [event.comm for event in log.events]


def test_what_is_dropped_is_gone_and_the_rest_keeps_its_place() -> None:
    """What was not taken yet can be taken, and what is amended later is the right one."""
    log = EventLog(UNIT)
    first = log.note(NEW, EventSource.CGROUP, MAIN, at_us=ms(1))
    second = log.note(NEW, EventSource.CGROUP, CHILD, at_us=ms(2))
    last = log.note(EXIT, EventSource.PIDFD, CHILD, at_us=ms(3))
    assert [first] == log.take(ms(1))
    amended = log.amend(second, text="amended")
    log.drop([first, amended])
    better = log.amend(last, text="better")
    assert ((better,), [better]) == (log.events, log.take(ms(9)))
    assert [] == log.take(ms(9))
