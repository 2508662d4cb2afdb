"""What the manager said of a unit, from literal signals: no manager, no cgroup, no bus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtool.host.ends import Ends
from sdtool.host.eventlog import EventLog, now_us
from sdtool.host.members import Members
from sdtool.host.record import KernelRecord, UnitRecord
from sdtool.host.told import UNTOLD_END, Told
from sdtool.model.manager import JobChange, ManagerGap, UnitChange
from sdtool.model.names import unit_path
from sdtool.model.stop import Event, EventKind, Evidence, WatchedProcess
from sdtool.model.unit import UnitDetails
from sdtool.sources.cgroups import CgroupMount
from tests.unit.make import CHILD, MAIN, UNIT, details, gone, policy, unit

NOWHERE = CgroupMount(Path("/nowhere"), 2, False)
JOB = "/org/freedesktop/systemd1/job/7"


def told(
    before: UnitDetails | None = None, processes: Iterable[WatchedProcess] = ()
) -> tuple[Told, EventLog]:
    """What is told of a unit that has no processes but those that others know, and its log."""
    before = before or running()
    log = EventLog(UNIT)
    record = UnitRecord(KernelRecord(frozenset()), UNIT)
    members = Members(NOWHERE, before, log, None, record)
    members.take_unseen(processes)
    ends = Ends(log, members, record, has_pidfds=False)
    return Told(before, log, members, ends, record), log


def stopping() -> tuple[Told, EventLog]:
    """The same of one whose stop was asked for, and answered with its job."""
    one, log = told()
    one.begin()
    one.expect_job()
    one.take_job(JOB)
    return one, log


def running(**fields: Any) -> UnitDetails:
    """A unit without a cgroup, that runs."""
    return details(unit=unit(result="success", invocation_id="1"), policy=policy(), **fields)


def state(active_state: str, sub_state: str, at_us: int, **fields: Any) -> UnitChange:
    """The unit came into a state."""
    return UnitChange(
        unit_path=unit_path(UNIT),
        active_state=active_state,
        sub_state=sub_state,
        changed_us=at_us,
        **fields,
    )


def job(result: str | None, path: str = JOB) -> JobChange:
    """A job of the unit was queued, or has ended."""
    return JobChange(job=path, unit=UNIT, result=result)


def gap(since_us: int) -> ManagerGap:
    """Nothing was heard for a second."""
    return ManagerGap(since_us=since_us, until_us=since_us + 1_000_000, reason="away")


def kinds(events: tuple[Event, ...]) -> list[EventKind]:
    """What happened, in the order it came."""
    return [event.kind for event in events]


def test_stop_that_is_told_ends_with_its_job() -> None:
    """The end of the unit is the manager's time, not that of the job."""
    one, log = told()
    one.begin()
    one.expect_job()
    one.on_signal(job(None))
    one.take_job(JOB)
    ended_us = now_us()
    one.on_signal(state("deactivating", "stop-sigterm", ended_us - 1))
    one.on_signal(state("inactive", "dead", ended_us))
    one.on_signal(job("done"))
    assert [EventKind.JOB_NEW, *[EventKind.STATE] * 2, EventKind.JOB_DONE] == kinds(log.events)
    assert (True, "done", ended_us) == (one.over.is_set(), one.job_result, one.ended_us)


def test_phase_has_its_limit_and_what_comes_then() -> None:
    """By the policy that holds when the phase is entered."""
    one, log = told()
    one.begin()
    one.on_signal(state("deactivating", "stop-sigterm", now_us()))
    (entered,) = log.events
    assert (policy().timeout_stop_us, "SIGKILL") == (entered.limit_us, entered.then)


def test_job_that_ends_before_its_path_is_known_counts() -> None:
    """Its end is kept until the answer says that it was ours."""
    one, _ = told()
    one.begin()
    one.expect_job()
    one.on_signal(job("canceled", "/another"))
    one.on_signal(job("done"))
    assert not one.over.is_set()
    one.take_job(JOB)
    assert ("done", True) == (one.job_result, one.over.is_set())


def test_job_of_a_unit_that_goes_down_along_is_any() -> None:
    """Nobody asked for it by itself, so nobody knows its path."""
    one, _ = told()
    one.begin()
    one.on_signal(job(None))
    one.on_signal(job("done"))
    assert (True, "done") == (one.has_job, one.job_result)


def test_signals_have_the_time_at_which_they_came_in() -> None:
    """Whoever hands them on may have been busy."""
    one, log = told()
    one.begin()
    one.take_job(JOB)
    heard_us = one.requested_us + 1
    one.on_signal(replace(job(None), heard_us=heard_us))
    one.on_signal(replace(job("done"), heard_us=heard_us + 1))
    assert [heard_us, heard_us + 1] == [event.at_us for event in log.events]
    assert heard_us + 1 == one.ended_us


def test_stop_after_a_question_begins_with_the_word_of_its_job() -> None:
    """Also where the answer is taken before the signal, which came in ahead of it."""
    one, _ = told()
    one.begin_after_question()
    one.expect_job()
    heard_us = now_us()
    one.take_job(JOB)
    one.on_signal(replace(job(None), heard_us=heard_us))
    one.on_signal(replace(job("done"), heard_us=heard_us + 1))
    assert (heard_us, heard_us + 1) == (one.requested_us, one.ended_us)


def test_nothing_of_a_refused_stop_is_taken() -> None:
    """A job that comes then is somebody else's."""
    one, log = told()
    one.begin()
    one.expect_job()
    one.refuse()
    one.on_signal(job("done"))
    assert ((), False) == (log.events, one.over.is_set())


def test_new_run_begins_with_the_first_state_out_of_the_end() -> None:
    """What comes before it can be the last word of the old one, also after its job."""
    one, log = stopping()
    began_us = one.requested_us
    one.on_signal(job("done"))
    one.on_signal(state("failed", "failed", began_us + 5, result="signal"))
    assert ("signal", None) == (one.result, one.started_us)
    one.on_signal(UnitChange(unit_path=unit_path(UNIT), result="success"))
    one.on_signal(job(None, f"{JOB}1"))
    one.on_signal(state("activating", "start", began_us + 9))
    one.on_signal(state("active", "running", began_us + 10))
    assert ("signal", began_us + 9, began_us + 5) == (one.result, one.started_us, one.ended_us)
    told_states = [event.sub_state for event in log.of_kind(EventKind.STATE)]
    assert (["failed", "start"], "running") == (told_states, one.sub_state)
    assert [] == log.of_kind(EventKind.JOB_NEW)


def test_new_run_whose_beginning_was_not_told_is_seen_in_the_last_look() -> None:
    """The old run's state and result stand; that it runs anew is known."""
    one, _ = stopping()
    began_us = one.requested_us
    one.on_signal(state("inactive", "dead", began_us + 5))
    one.on_signal(job("done"))
    now = details(unit=unit(active_state="active", result="signal", invocation_id="2"))
    one.take_last_state((now, state("active", "running", began_us + 9, result="signal")))
    assert ("success", began_us + 9, "active") == (one.result, one.started_us, one.active_state)


def test_run_that_began_before_the_job_is_the_one_that_is_stopped() -> None:
    """It was restarted while a person was asked, and its stop is told to the end."""
    one, log = told()
    one.begin_after_question()
    now = details(unit=unit(active_state="active", invocation_id="2"), policy=policy())
    one.resync((now, state("active", "running", now_us())), gap(now_us()), told=True)
    one.expect_job()
    one.take_job(JOB)
    began_us = one.requested_us
    one.on_signal(state("deactivating", "stop-sigterm", began_us + 5))
    one.on_signal(state("failed", "failed", began_us + 9, result="timeout"))
    one.on_signal(job("done"))
    assert (None, "timeout", began_us + 9) == (one.started_us, one.result, one.ended_us)
    told_states = [event.sub_state for event in log.of_kind(EventKind.STATE)]
    assert ["stop-sigterm", "failed"] == told_states


def test_gap_within_which_the_end_was_told_ends_with_it() -> None:
    """It stands before the end of the job, and once."""
    one, log = stopping()
    lost_us = one.requested_us
    away = gap(lost_us)
    one.on_signal(replace(job("done"), heard_us=lost_us + 7), away)
    one.note_gap_before_end(away, None)
    (event,) = log.of_kind(EventKind.GAP)
    assert (lost_us, lost_us + 7) == (event.at_min_us, event.at_us)
    assert [EventKind.GAP, EventKind.JOB_DONE] == kinds(log.events)


def test_end_that_was_missed_is_read_from_the_unit() -> None:
    """Its job is gone: it ended between the last state and now, how is not known."""
    one, log = told()
    one.begin()
    one.take_job(JOB)
    ended_us = now_us()
    after = details(unit=unit(active_state="inactive", sub_state="dead", invocation_id="1"))
    one.resync((after, state("inactive", "dead", ended_us)), gap(ended_us - 5), told=True)
    assert [EventKind.GAP, EventKind.STATE, EventKind.JOB_DONE] == kinds(log.events)
    assert (None, UNTOLD_END) == (one.job_result, one.job_result_reason)
    assert Evidence.INFERRED is log.events[-1].evidence


def test_signal_that_has_overtaken_an_answer_stands() -> None:
    """The answer is older than what the signal said."""
    one, _ = told()
    one.begin()
    one.take_job(JOB)
    at_us = now_us()
    one.on_signal(state("deactivating", "final-sigterm", at_us))
    before = running(job_path=JOB)
    one.resync((before, state("active", "running", at_us - 9)), gap(at_us), told=False)
    assert ("final-sigterm", False) == (one.sub_state, one.over.is_set())


def test_unit_that_was_forgotten_became_inactive() -> None:
    """With CollectMode=inactive it did not fail; else nobody knows."""
    found = []
    for mode in ("inactive", "inactive-or-failed"):
        one, _ = told(running(collect_mode=mode))
        one.begin()
        one.take_job(JOB)
        one.resync(None, gap(now_us()), told=True)
        found.append((one.active_state, one.result, one.result_reason is None))
    assert [("inactive", "success", True), ("inactive", None, False)] == found


def test_what_was_concluded_is_concluded_anew_from_all_there_is() -> None:
    """An end that was not known yet, or moved, takes a signal away; who has taken it keeps it."""
    one, log = told(processes=(MAIN, CHILD))
    one.begin()
    at_us = one.requested_us
    one.on_signal(state("deactivating", "stop", at_us + 5))
    one.on_signal(state("deactivating", "stop-sigterm", at_us + 9))
    one.infer_phases(at_us + 10)
    assert {(10, "SIGTERM"), (11, "SIGTERM")} == signals(log.events)
    assert 2 == len(signals(log.take(at_us + 10)))

    log.add(gone(at_us + 2, CHILD))
    one.conclude()
    one.conclude()
    assert {(10, "SIGTERM")} == signals(log.events)
    assert set() == signals(log.take(at_us + 10))


def signals(events: Iterable[Event]) -> set[tuple[int | None, str | None]]:
    """Who was sent what."""
    return {(e.pid, e.signal) for e in events if e.kind is EventKind.SIGNAL_SENT}
