"""Stops told as literal events, and the verdicts that they must get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.events import sort_events
from sdtool.analysis.timeline import build, infer_phase
from sdtool.model.process import ProcessRef, Role
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    Evidence,
    ExitCode,
    ExitStatus,
    StopReport,
    Verdict,
)
from tests.unit.make import (
    CHILD,
    DONE,
    KILLED,
    LIMIT_US,
    MAIN,
    T0,
    TERMINATED,
    dead,
    event,
    failed,
    gone,
    ms,
    phase,
    policy,
    reaped,
    record,
    sent,
    stopped,
    watched,
)

CONTROL = watched(12, Role.CONTROL, seen_us=ms(1))


def killed_by_manager(report: StopReport) -> dict[int, bool | None]:
    """What the report says of each process."""
    return {fate.pid: fate.killed_by_manager for fate in report.processes}


def timeouts(report: StopReport) -> list[str | None]:
    """The phases that the report says ran out of time."""
    return [e.sub_state for e in report.events if e.kind is EventKind.TIMEOUT]


# Verdicts ------------------------------------------------------------------------------------


def test_stop_that_honours_the_signal_is_clean() -> None:
    """A process that ends by itself after SIGTERM makes a clean stop."""
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), dead(ms(6))])
    assert Verdict.CLEAN == report.verdict
    assert [(10, "SIGTERM")] == sent(report)
    assert {10: False} == killed_by_manager(report)
    assert "exited with 0" == report.processes[0].fate_reason


def test_death_by_the_stop_signal_is_clean() -> None:
    """A default action of SIGTERM is what the unit asked for."""
    report = stopped(
        [MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN, TERMINATED), dead(ms(6))]
    )
    assert (Verdict.CLEAN, ()) == (report.verdict, report.killed)
    assert "ended by SIGTERM" == report.processes[0].fate_reason


def test_process_killed_after_its_limit_is_killed() -> None:
    """SIGTERM, the limit, SIGKILL: the verdict names who had to be killed, and when."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, KILLED),
            failed(ms(2012)),
        ],
        result="timeout",
        active_state="failed",
    )
    assert (Verdict.KILLED, (10,)) == (report.verdict, report.killed)
    assert "10 (p10) had to be SIGKILLed after 2.0 s." == report.verdict_reason
    assert [(10, "SIGTERM"), (10, "SIGKILL")] == sent(report)
    assert ["stop-sigterm"] == timeouts(report)


def test_result_of_a_job_is_not_the_verdict() -> None:
    """The job of a stop that ended in SIGKILL is "done" all the same."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, KILLED),
        ],
        job_result="done",
        result="timeout",
    )
    assert ("done", Verdict.KILLED) == (report.job_result, report.verdict)


def test_survivors_are_leftovers_and_the_worst() -> None:
    """A process that still runs outweighs one that was killed."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, KILLED),
        ],
        result="timeout",
        survivors=(watched(11),),
    )
    left = (ProcessRef(pid=11, comm="p11"),)
    assert (Verdict.LEFTOVER, (10,), left) == (report.verdict, report.killed, report.leftovers)
    assert "11 (p11) still runs after the stop." == report.verdict_reason


def test_bad_result_is_failed() -> None:
    """A main process that exits 1 leaves Result=exit-code."""
    report = stopped(
        [MAIN],
        [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN, ExitCode(code=1)), failed(ms(6))],
        result="exit-code",
        active_state="failed",
    )
    assert Verdict.FAILED == report.verdict
    assert "The unit ended with Result=exit-code." == report.verdict_reason


def test_exit_nobody_saw_is_in_doubt_where_a_kill_was_sent() -> None:
    """A process that is gone without an exit could have been killed, if anything was."""
    killing = [phase(ms(4), "stop-sigterm"), phase(ms(2010), "stop-sigkill"), dead(ms(2012))]
    report = stopped([MAIN], killing)
    assert (Verdict.UNKNOWN, {10: None}) == (report.verdict, killed_by_manager(report))


def test_exit_nobody_saw_is_no_kill_where_none_was_sent() -> None:
    """The short helpers of a shell ExecStop= come and go between two looks."""
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), dead(ms(6))])
    assert (Verdict.CLEAN, {10: False}) == (report.verdict, killed_by_manager(report))


def test_unit_without_processes_is_clean() -> None:
    """A unit that had no process (oneshot, target) is stopped cleanly."""
    report = stopped([], [dead(ms(6))])
    assert (Verdict.CLEAN, "It had no processes.") == (report.verdict, report.verdict_reason)


def test_inactive_unit_is_clean_and_takes_no_time() -> None:
    """There was nothing to stop, and the report says so."""
    report = build(record(already_inactive=True, active_state="failed", job_result=None))
    assert (Verdict.CLEAN, 0) == (report.verdict, report.duration_us)
    assert "It was failed already: there was nothing to stop." == report.verdict_reason


def test_duration_is_from_the_request_to_the_end() -> None:
    """The duration of a stop is that of the job, in microseconds."""
    assert 2_345_678 == build(record(ended_us=T0 + 2_345_678)).duration_us


def test_gap_hides_nothing_where_every_fate_is_known() -> None:
    """What was lost between cannot have been a kill: the only process exited by itself."""
    gap = event(ms(5), EventKind.GAP, text="3 events lost")
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), gap, gone(ms(5), MAIN)])
    assert Verdict.CLEAN == report.verdict
    assert gap in report.events


@pytest.mark.parametrize("result", ["canceled", "timeout", "failed", "dependency"])
def test_stop_job_that_did_not_finish_is_failed(result: str) -> None:
    """A stop job that somebody canceled has stopped nothing."""
    report = stopped([], [], job_result=result, active_state="active")
    assert Verdict.FAILED == report.verdict
    assert f"The stop job ended as {result}; the unit is active." == report.verdict_reason


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_verdict_is_the_worst_that_is_true(
    leftover: bool, killed: bool, bad: bool, hidden: bool
) -> None:
    """Whatever combination is true, the order is that of Verdict."""
    processes, events = [MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN)]
    if killed:
        processes.append(CHILD)
        events += [phase(ms(2010), "stop-sigkill"), gone(ms(2011), CHILD, KILLED)]
    if hidden:
        processes.append(replace(CHILD, pid=12))
        events.append(phase(ms(2009), "stop-sigkill"))
    report = stopped(
        processes,
        events,
        survivors=(watched(13),) if leftover else (),
        result="signal" if bad else "success",
    )
    truths = [leftover, killed, bad, hidden, True]
    assert list(Verdict)[truths.index(True)] == report.verdict


# Rounds of signals ---------------------------------------------------------------------------


def test_survivor_of_main_gets_a_second_round() -> None:
    """stop-sigterm ends with main: a child that ignores SIGTERM gets it again, then SIGKILL."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), MAIN),
            phase(ms(6), "final-sigterm"),
            phase(ms(2010), "final-sigkill"),
            gone(ms(2011), CHILD, KILLED),
            failed(ms(2012)),
        ],
        result="timeout",
    )
    to_main = [signal for pid, signal in sent(report) if pid == 10]
    to_child = [signal for pid, signal in sent(report) if pid == 11]
    assert ["SIGTERM"] == to_main
    assert ["SIGTERM", "SIGTERM", "SIGKILL"] == to_child
    assert ["final-sigterm"] == timeouts(report)
    assert (Verdict.KILLED, (11,)) == (report.verdict, report.killed)


def test_mixed_kills_children_without_a_word_in_a_successful_stop() -> None:
    """KillMode=mixed: the child got SIGKILL when main had ended, with Result=success."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), MAIN),
            phase(ms(7), "final-sigkill"),
            gone(ms(8), CHILD, KILLED),
            dead(ms(9)),
        ],
        policy(kill_mode="mixed"),
    )
    assert (Verdict.KILLED, (11,), "success") == (report.verdict, report.killed, report.result)
    assert [(10, "SIGTERM"), (11, "SIGKILL")] == sent(report)
    assert "KillMode=mixed" in report.verdict_reason


def test_mixed_kill_in_a_phase_nobody_told_is_unknown() -> None:
    """The phase can be too short for the bus; main may have killed its child itself, too."""
    report = stopped(
        [MAIN, CHILD],
        [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), gone(ms(7), CHILD, KILLED)],
        policy(kill_mode="mixed"),
    )
    assert (Verdict.UNKNOWN, None) == (report.verdict, report.processes[1].killed_by_manager)


def test_mixed_kill_before_the_end_of_exec_stop_post_is_not_the_managers() -> None:
    """KillMode=mixed kills after ExecStopPost=: what ends by SIGKILL before was main's doing."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), MAIN),
            phase(ms(6), "stop-post"),
            gone(ms(60), CHILD, KILLED),
            dead(ms(320)),
        ],
        policy(kill_mode="mixed"),
    )
    assert (Verdict.CLEAN, ()) == (report.verdict, report.killed)


def test_mixed_spares_a_child_that_ended_before_main() -> None:
    """Only what ends by SIGKILL after main was killed by the manager."""
    report = stopped(
        [MAIN, CHILD],
        [phase(ms(4), "stop-sigterm"), gone(ms(4.5), CHILD), gone(ms(5), MAIN), dead(ms(8))],
        policy(kill_mode="mixed"),
    )
    assert (Verdict.CLEAN, [(10, "SIGTERM")]) == (report.verdict, sent(report))


def test_main_of_a_mixed_unit_killed_from_outside_is_not_the_managers() -> None:
    """KillMode=mixed sends SIGKILL to the rest only: main's came from somebody else."""
    report = stopped(
        [MAIN],
        [phase(ms(4), "stop-sigterm"), gone(ms(500), MAIN, KILLED), failed(ms(501))],
        policy(kill_mode="mixed"),
        result="signal",
    )
    assert {10: False} == killed_by_manager(report)
    assert Verdict.FAILED == report.verdict


def test_process_mode_leaves_children_unasked() -> None:
    """KillMode=process signals main alone; the child stays and Result is success."""
    report = stopped(
        [MAIN, CHILD],
        [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), dead(ms(6))],
        policy(kill_mode="process"),
        survivors=(watched(11),),
    )
    assert (Verdict.LEFTOVER, "success") == (report.verdict, report.result)
    assert [(10, "SIGTERM")] == sent(report)
    assert {10: False, 11: False} == killed_by_manager(report)


def test_none_mode_signals_nobody() -> None:
    """KillMode=none leaves everything, without a signal."""
    report = stopped([MAIN], [dead(ms(6))], policy(kill_mode="none"), survivors=(watched(10),))
    assert (Verdict.LEFTOVER, []) == (report.verdict, sent(report))


def test_without_sigkill_the_manager_gives_up() -> None:
    """SendSIGKILL=no: SIGTERM twice, no SIGKILL, and the process runs on."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm", then="giving up"),
            phase(ms(2010), "final-sigterm", then="giving up"),
            failed(ms(4020)),
        ],
        policy(send_sigkill=False),
        result="timeout",
        survivors=(watched(10),),
    )
    assert (Verdict.LEFTOVER, ()) == (report.verdict, report.killed)
    assert [(10, "SIGTERM"), (10, "SIGTERM")] == sent(report)
    assert ["stop-sigterm", "final-sigterm"] == timeouts(report)


def test_kill_from_outside_is_not_the_managers_where_it_sends_none() -> None:
    """SendSIGKILL=no: a SIGKILL beside Result=timeout came from somebody else."""
    report = stopped(
        [MAIN],
        [phase(ms(4), "stop-sigterm"), gone(ms(3000), MAIN, KILLED), failed(ms(3001))],
        policy(send_sigkill=False),
        result="timeout",
    )
    assert {10: False} == killed_by_manager(report)


def test_kill_of_a_child_from_outside_is_not_the_managers_in_process_mode() -> None:
    """KillMode=process: the manager's SIGKILL goes to main, a child's came from elsewhere."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(100), CHILD, KILLED),
            gone(ms(2011), MAIN, KILLED),
            failed(ms(2012)),
        ],
        policy(kill_mode="process"),
        result="timeout",
    )
    assert {10: True, 11: False} == killed_by_manager(report)


def test_phase_that_came_in_a_burst_is_made_up_by_the_result() -> None:
    """stop-sigkill can be skipped on the bus: the time that ran out and the status tell."""
    report = stopped(
        [MAIN],
        [phase(ms(4), "stop-sigterm"), gone(ms(2011), MAIN, KILLED), failed(ms(2012))],
        result="timeout",
    )
    assert (Verdict.KILLED, (10,)) == (report.verdict, report.killed)
    assert "had run out" in report.processes[0].fate_reason


def test_kill_from_outside_is_not_the_managers() -> None:
    """Somebody's kill -9 during the stop is a failure, and not the manager's doing."""
    report = stopped(
        [MAIN],
        [phase(ms(4), "stop-sigterm"), gone(ms(500), MAIN, KILLED), failed(ms(501))],
        result="signal",
    )
    assert (Verdict.FAILED, {10: False}) == (report.verdict, killed_by_manager(report))
    assert "in no phase that sends it" in report.processes[0].fate_reason


def test_command_that_runs_out_of_time_is_failed() -> None:
    """ExecStop= hangs for its limit, then SIGTERM ends all in time: failed, not killed."""
    report = stopped(
        [MAIN, CONTROL],
        [
            phase(ms(1), "stop", then="SIGTERM"),
            phase(ms(2001), "stop-sigterm"),
            gone(ms(2002), CONTROL, TERMINATED),
            gone(ms(2003), MAIN),
            failed(ms(2004)),
        ],
        policy(exec_stop=1),
        result="timeout",
    )
    assert Verdict.FAILED == report.verdict
    assert "The phase stop ran out of its time (Result=timeout)." == report.verdict_reason
    assert ["stop"] == timeouts(report)
    assert [(10, "SIGTERM"), (12, "SIGTERM")] == sorted(sent(report))


def test_phase_that_ends_in_time_is_no_timeout() -> None:
    """ExecStop= that ends by itself is followed by the signal without a timeout."""
    report = stopped(
        [MAIN, CONTROL],
        [
            phase(ms(1), "stop", then="SIGTERM"),
            gone(ms(300), CONTROL),
            phase(ms(301), "stop-sigterm"),
            gone(ms(302), MAIN),
            dead(ms(303)),
        ],
        policy(exec_stop=1),
    )
    assert (Verdict.CLEAN, []) == (report.verdict, timeouts(report))
    assert [(10, "SIGTERM")] == sent(report)


def test_phase_with_a_tiny_limit_is_no_timeout_when_it_ends_at_once() -> None:
    """TimeoutStopSec=20ms and an end after 2 ms: nothing ran out of time."""
    tiny = policy(timeout_stop_us=20_000)
    states = [phase(ms(4), "stop-sigterm", limit_us=20_000), dead(ms(6))]
    assert [] == timeouts(stopped([MAIN], [*states, gone(ms(5), MAIN)], tiny))


def test_infinite_limit_never_runs_out() -> None:
    """TimeoutStopSec=infinity has no timeout however long it takes."""
    states = [phase(ms(4), "stop-sigterm", limit_us="infinity"), dead(ms(900_000))]
    assert [] == timeouts(stopped([MAIN], [*states, gone(ms(899_000), MAIN)]))


def test_abort_mode_sends_the_watchdog_signal() -> None:
    """TimeoutStopFailureMode=abort goes through stop-watchdog with SIGABRT."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-watchdog"),
            gone(ms(2020), MAIN, replace(KILLED, signal="SIGABRT", core=True)),
            failed(ms(2030)),
        ],
        policy(timeout_stop_failure_mode="abort"),
        result="timeout",
    )
    assert [(10, "SIGTERM"), (10, "SIGABRT")] == sent(report)
    assert (Verdict.FAILED, ()) == (report.verdict, report.killed)


# Exits without a status ----------------------------------------------------------------------


def test_exit_without_status_is_clean_where_no_kill_was_sent() -> None:
    """Tier D: a stop that never came to SIGKILL can be called clean without wait statuses."""
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN, None), dead(ms(6))])
    assert (Verdict.CLEAN, {10: False}) == (report.verdict, killed_by_manager(report))
    assert "the manager sent it no SIGKILL" in report.processes[0].fate_reason


def test_exit_without_status_right_after_the_kill_is_killed() -> None:
    """Tier D: who is gone right after SIGKILL was killed by it."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, None),
            failed(ms(2012)),
        ],
        result="timeout",
    )
    assert (Verdict.KILLED, (10,)) == (report.verdict, report.killed)
    assert "gone right after SIGKILL" in report.processes[0].fate_reason


def test_exit_without_status_in_a_mixed_unit_is_unknown() -> None:
    """Tier D: KillMode=mixed kills silently, so a child's end can mean both."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), MAIN, None),
            gone(ms(7), CHILD, None),
            dead(ms(8)),
        ],
        policy(kill_mode="mixed"),
    )
    assert Verdict.UNKNOWN == report.verdict
    assert killed_by_manager(report)[11] is None


def test_status_that_came_with_the_reap_counts() -> None:
    """An exit whose status was pending is judged by the status that came later."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, None),
            reaped(ms(2600), MAIN, KILLED),
            failed(ms(2601)),
        ],
        result="timeout",
    )
    assert (KILLED, ms(2011)) == (report.processes[0].exit, report.processes[0].exit_us)
    assert (10,) == report.killed


def test_pending_status_that_says_otherwise_clears_the_manager() -> None:
    """It ended by itself in the kill phase: the status decides, not the moment."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2009), MAIN, None),
            reaped(ms(2030), MAIN, DONE),
            failed(ms(2031)),
        ],
        result="timeout",
    )
    assert (DONE, {10: False}) == (report.processes[0].exit, killed_by_manager(report))


# Moments -------------------------------------------------------------------------------------


def test_signal_comes_before_the_first_end_it_caused() -> None:
    """Children can be dead before the word of the phase arrives: the signal was earlier."""
    report = stopped([MAIN], [gone(ms(2), MAIN), phase(ms(4), "stop-sigterm"), dead(ms(6))])
    (signal,) = [e for e in report.events if e.kind is EventKind.SIGNAL_SENT]
    assert (ms(2), T0, ms(4)) == (signal.at_us, signal.at_min_us, signal.at_max_us)
    assert ms(2) == report.processes[0].signalled_us
    kinds = [e.kind for e in report.events]
    assert kinds.index(EventKind.SIGNAL_SENT) < kinds.index(EventKind.PROCESS_EXIT)


def test_who_ended_before_the_last_phase_gets_nothing_of_the_next() -> None:
    """However short before: the signals of a phase come after the word of the one before it."""
    events = [phase(ms(4), "stop"), gone(ms(3.5), CHILD), phase(ms(5), "stop-sigterm")]
    report = stopped([MAIN, CHILD], [*events, gone(ms(6), MAIN), dead(ms(7))])
    assert [(10, "SIGTERM")] == sent(report)


def test_nobody_appears_after_his_end() -> None:
    """A walk finds some, and the manager tells of some, when they have ended already."""
    late = watched(20, seen_us=ms(9))
    whom = {"pid": 20, "start_ticks": late.start_ticks}
    found = event(ms(9), EventKind.PROCESS_NEW, source=EventSource.CGROUP, **whom)
    told = event(ms(8), EventKind.CONTROL_START, source=EventSource.DBUS, **whom)
    report = stopped([late], [found, gone(ms(7), late), told, dead(ms(10))])
    lives = [(e.kind, e.at_us) for e in report.events if e.pid == 20]
    kinds = (EventKind.PROCESS_NEW, EventKind.CONTROL_START, EventKind.PROCESS_EXIT)
    assert [(kind, ms(7)) for kind in kinds] == lives


def test_process_born_after_a_phase_gets_no_signal_of_it() -> None:
    """Who was first seen after the phase began cannot have been meant."""
    late = watched(20, seen_us=ms(100))
    report = stopped(
        [MAIN, late],
        [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), gone(ms(150), late), dead(ms(160))],
    )
    assert [(10, "SIGTERM")] == sent(report)


@pytest.mark.parametrize(("status", "told"), [(ExitCode(code=7), False), (TERMINATED, True)])
def test_process_born_right_before_the_word_of_a_phase_may_be_born_of_its_signal(
    status: ExitStatus, told: bool
) -> None:
    """The manager signals first, and says so then: only who died of it has got it for sure."""
    young = watched(20, seen_us=ms(2))
    events = [phase(ms(4), "stop-sigterm"), gone(ms(50), young, status), gone(ms(60), MAIN)]
    report = stopped([MAIN, young], [*events, dead(ms(70))])
    assert told is ((20, "SIGTERM") in sent(report))
    assert (10, "SIGTERM") in sent(report)


def test_process_gone_before_a_phase_gets_no_signal_of_it() -> None:
    """The second round is for those who are still there."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), CHILD),
            phase(ms(2010), "stop-sigkill"),
            gone(ms(2011), MAIN, KILLED),
        ],
        result="timeout",
    )
    assert [(11, "SIGTERM")] == [entry for entry in sent(report) if entry[0] == 11]


def test_unit_without_a_policy_signals_nobody() -> None:
    """A slice kills nothing itself: whose SIGKILL it was is for its units' own reports."""
    report = build(record(policy=None, processes=(MAIN,), events=(gone(ms(5), MAIN, KILLED),)))
    assert ({10: None}, []) == (killed_by_manager(report), sent(report))


moments = st.integers(0, 8_000_000).map(lambda us: T0 + us)
statuses = st.sampled_from([None, DONE, KILLED, TERMINATED])
sub_states = st.sampled_from(
    (
        *("stop", "stop-sigterm", "stop-watchdog", "stop-sigkill", "stop-post"),
        *("final-sigterm", "final-sigkill"),
    )
)


@st.composite
def stops(draw: st.DrawFn) -> StopReport:
    """Reports of stops with phases, births and deaths at whatever moment."""
    roles = st.sampled_from(list(Role))
    people = [
        watched(pid, draw(roles), draw(st.none() | moments))
        for pid in range(10, 10 + draw(st.integers(0, 4)))
    ]
    states = [phase(draw(moments), draw(sub_states)) for _ in range(draw(st.integers(0, 5)))]
    exits = [gone(draw(moments), p, draw(statuses)) for p in people if draw(st.booleans())]
    kill = policy(
        kill_mode=draw(st.sampled_from(["control-group", "mixed", "process", "none"])),
        send_sigkill=draw(st.booleans()),
    )
    result = draw(st.sampled_from(["success", "timeout", "signal"]))
    return stopped(people, [*sort_events(states), *exits], kill, result=result)


@given(stops())
def test_inferred_moment_lies_within_its_bounds(report: StopReport) -> None:
    """at_min <= at <= at_max for every inferred event, and no bounds for an observed one."""
    for entry in report.events:
        if entry.evidence is Evidence.INFERRED:
            assert entry.at_min_us is not None
            assert entry.at_max_us is not None
            assert entry.at_min_us <= entry.at_us <= entry.at_max_us
        else:
            assert (None, None) == (entry.at_min_us, entry.at_max_us)


@given(stops())
def test_signals_go_only_to_whom_they_can_reach(report: StopReport) -> None:
    """No report names a signal to a process that was born later or the policy leaves out."""
    assert report.policy is not None
    if report.policy.kill_mode == "none":
        assert [] == sent(report)
    fates = {fate.id: fate for fate in report.processes}
    assert fates.keys() >= {e.process for e in report.events if e.kind is EventKind.SIGNAL_SENT}
    for told in report.events:
        if told.kind is EventKind.SIGNAL_SENT and told.process is not None:
            gone_us = fates[told.process].exit_us
            assert gone_us is None or (told.at_min_us or told.at_us) <= gone_us
            if report.policy.kill_mode == "process":
                assert fates[told.process].role is not Role.OTHER
    assert {fate.pid for fate in report.processes if fate.killed_by_manager} == set(report.killed)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(EventKind)))))
def test_events_are_sorted_stably(drawn: list[tuple[int, EventKind]]) -> None:
    """Sorted by time; equal ones of one kind keep their order."""
    events = [event(at, kind, text=str(n)) for n, (at, kind) in enumerate(drawn)]
    ordered = sort_events(events)
    assert sorted(e.at_us for e in events) == [e.at_us for e in ordered]
    for at in range(4):
        for kind in EventKind:
            alike = [e for e in events if (e.at_us, e.kind) == (at, kind)]
            assert alike == [e for e in ordered if (e.at_us, e.kind) == (at, kind)]


def test_cause_stands_before_its_effect() -> None:
    """At one moment: the timeout, the signal that it made the manager send, the end."""
    told = [
        gone(ms(5), MAIN),
        event(ms(5), EventKind.SIGNAL_SENT, pid=10),
        event(ms(5), EventKind.TIMEOUT),
    ]
    assert [EventKind.TIMEOUT, EventKind.SIGNAL_SENT, EventKind.PROCESS_EXIT] == [
        e.kind for e in sort_events(told)
    ]


def test_phase_without_a_signal_infers_none() -> None:
    """stop-post runs a command; it sends nothing to anybody."""
    state = phase(ms(5), "stop-post")
    assert () == infer_phase(policy(), state, [CHILD], (state,), T0)


def test_timeout_says_which_limit_and_what_followed() -> None:
    """The event of a timeout carries the phase, its limit and what the manager did then."""
    before, now = phase(ms(4), "stop-sigterm"), phase(ms(2010), "stop-sigkill")
    first: Event = infer_phase(policy(), now, [], (before, now), T0)[0]
    assert (EventKind.TIMEOUT, "stop-sigterm", LIMIT_US, "SIGKILL") == (
        first.kind,
        first.sub_state,
        first.limit_us,
        first.then,
    )


# Times in which the manager was out of reach -------------------------------------------------


def gap(since_us: int, until_us: int, **fields: Any) -> Event:
    """A time in which nothing was heard."""
    bounds = {"at_min_us": since_us, "at_max_us": until_us}
    return event(until_us, EventKind.GAP, source=EventSource.SDTOOL, **bounds, **fields)


def test_kill_within_a_gap_is_inferred_with_its_phase() -> None:
    """The end state was read afterwards; what led to it is inferred within its bounds."""
    report = stopped(
        [MAIN],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(2010), MAIN, KILLED),
            failed(ms(2012)),
            gap(ms(1500), ms(4000)),
        ],
        result="timeout",
        active_state="failed",
        job_result=None,
    )
    (hidden,) = (e for e in report.events if e.sub_state == "stop-sigkill")
    assert (Evidence.INFERRED, ms(2010)) == (hidden.evidence, hidden.at_us)
    assert ([(10, "SIGTERM"), (10, "SIGKILL")], ["stop-sigterm"]) == (
        sent(report),
        timeouts(report),
    )
    assert (Verdict.KILLED, {10: True}) == (report.verdict, killed_by_manager(report))


def test_exit_without_status_that_a_gap_may_have_hidden_is_unknown() -> None:
    """The limit of ExecStop= had passed: the phases up to SIGKILL may not have been told."""
    stop = replace(phase(ms(4), "stop"), then="SIGTERM")
    events = [stop, gone(ms(2050), MAIN, None), dead(ms(2052))]
    told, untold = stopped([MAIN], events), stopped([MAIN], [*events, gap(ms(1500), ms(4000))])
    assert ({10: False}, {10: None}) == (killed_by_manager(told), killed_by_manager(untold))
    assert "out of reach" in untold.verdict_reason


def test_exit_before_the_limit_is_in_no_doubt_in_a_gap() -> None:
    """No phase sends SIGKILL before a limit has passed."""
    events = [phase(ms(4), "stop-sigterm"), gone(ms(900), MAIN, None), dead(ms(902))]
    report = stopped([MAIN], [*events, gap(ms(500), ms(4000))])
    assert (Verdict.CLEAN, {10: False}) == (report.verdict, killed_by_manager(report))


def test_gap_in_which_nothing_changed_hides_nothing() -> None:
    """The state at its end was that of before, with the same time."""
    events = [phase(ms(4), "stop-sigterm"), gap(ms(500), ms(700)), gone(ms(2010), MAIN, None)]
    report = stopped([MAIN], events, policy(timeout_stop_us=1_000_000))
    assert {10: False} == killed_by_manager(report)


def test_reload_moves_the_limit_of_its_phase() -> None:
    """A longer limit that a reload brought has not run out when the old one would have."""
    moved = gap(ms(500), ms(700), sub_state="stop-sigterm", limit_us=LIMIT_US * 2, then="SIGKILL")
    events = [phase(ms(4), "stop-sigterm"), moved, gone(ms(2500), MAIN), dead(ms(2501))]
    assert [] == timeouts(stopped([MAIN], events))
    late = [phase(ms(4), "stop-sigterm"), moved, phase(ms(4005), "stop-sigkill")]
    (timeout,) = (e for e in stopped([MAIN], late).events if e.kind is EventKind.TIMEOUT)
    assert LIMIT_US * 2 == timeout.limit_us


@pytest.mark.parametrize("state", ["active", "deactivating"])
def test_job_that_is_gone_from_a_unit_that_is_not_is_failed(state: str) -> None:
    """Nobody told its end, and the unit is not down."""
    reason = "the manager was out of reach when the job ended"
    report = stopped([], [], job_result=None, job_result_reason=reason, active_state=state)
    assert Verdict.FAILED == report.verdict
    assert f"The stop job is gone and the unit is {state}: {reason}." == report.verdict_reason
    again = stopped([], [], job_result=None, started_again=True, active_state=state)
    assert Verdict.CLEAN == again.verdict


def test_failure_of_a_new_run_is_not_the_stops() -> None:
    """It was started again, and is failed by now."""
    report = stopped([], [], active_state="failed", started_again=True)
    assert Verdict.CLEAN == report.verdict


def test_result_that_nobody_knows_is_unknown() -> None:
    """A unit that is forgotten may have failed before."""
    report = stopped([], [], result=None, result_reason="the manager forgot the unit")
    assert Verdict.UNKNOWN == report.verdict
    assert "forgot" in report.verdict_reason


@pytest.mark.parametrize(
    ("missed", "active_state", "expected"),
    [
        ({"last_state_read": False}, "inactive", Verdict.CLEAN),
        ({"last_state_read": False}, "deactivating", Verdict.UNKNOWN),
        ({"lost_along": ("b.service",)}, "inactive", Verdict.UNKNOWN),
    ],
)
def test_stop_is_unknown_where_what_was_not_read_can_be_worse(
    missed: dict[str, Any], active_state: str, expected: Verdict
) -> None:
    """The manager was lost after the job: what it had told before stands."""
    report = stopped([], [], active_state=active_state, unread_reason="it was lost", **missed)
    assert (expected, "it was lost") == (report.verdict, report.unread_reason)
    assert (expected is Verdict.UNKNOWN) == ("it was lost" in report.verdict_reason)


# Signals that were seen ----------------------------------------------------------------------


def test_signals_that_are_seen_are_not_concluded() -> None:
    """Nobody was signalled of whom that was not seen."""
    state = phase(ms(4), "stop-sigterm")
    assert () == infer_phase(policy(), state, [MAIN, CHILD], [state], T0, sees_signals=True)


def test_limit_had_passed_when_its_signal_was_sent() -> None:
    """The word of the phase comes later; a signal of before is of the phase before."""
    before, kill = phase(ms(4), "stop-sigterm"), phase(ms(2010), "stop-sigkill")
    sent_at = [ms(3), ms(2005), ms(2006)]
    signals = [event(at_us, EventKind.SIGNAL_SENT, pid=10, signal="SIGKILL") for at_us in sent_at]
    told = [before, kill, *signals]
    (timeout,) = infer_phase(policy(), kill, [MAIN], told, T0, sees_signals=True)
    assert ("stop-sigterm", ms(2005), ms(2005)) == (
        timeout.sub_state,
        timeout.at_us,
        timeout.at_max_us,
    )


def test_second_round_is_for_those_that_were_there_then() -> None:
    """One that the first round ended is not signalled again, however quick the main process."""
    quick = gone(ms(1.7), CHILD, TERMINATED)
    events = [
        phase(ms(1), "stop-sigterm"),
        quick,
        gone(ms(5), MAIN),
        phase(ms(5.2), "final-sigterm"),
    ]
    stubborn = watched(13)
    report = stopped([MAIN, CHILD, stubborn], events)
    assert [(10, "SIGTERM"), (11, "SIGTERM"), (13, "SIGTERM"), (13, "SIGTERM")] == sent(report)


def test_hangup_is_sent_once_where_it_is_the_stop_signal() -> None:
    """SendSIGHUP= adds nothing to KillSignal=SIGHUP."""
    kill = policy(kill_signal="SIGHUP", send_sighup=True)
    report = stopped([MAIN], [phase(ms(1), "stop-sigterm"), gone(ms(2), MAIN)], kill)
    assert [(10, "SIGHUP")] == sent(report)


def test_no_limit_has_passed_where_the_result_is_success() -> None:
    """A service can ask for more time."""
    told = [phase(ms(1), "stop-sigterm"), gone(ms(2500), MAIN)]
    ended = event(ms(2501), EventKind.STATE, sub_state="dead", active_state="inactive")
    report = stopped([MAIN], [*told, replace(ended, result="success")])
    assert [] == timeouts(report)
