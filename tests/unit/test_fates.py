"""Who has killed a process, where all signals were seen with their senders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdtool.analysis.fates import build_fates
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    Evidence,
    ExitCode,
    ExitStatus,
    ObserverState,
    ProcessFate,
    SignalResult,
    Tier,
)
from tests.unit.make import (
    CHILD,
    DONE,
    KILLED,
    MAIN,
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
)

MANAGER, STRANGER, KERNEL = 1, 999, None

KILLING = phase(ms(5), "stop-sigkill")
"""The manager is in the phase in which it sends SIGKILL by itself."""

THEIRS = "ended by SIGKILL, which the manager had sent"
STRANGERS = "ended by SIGKILL from 999 (p999)"
KERNELS = "ended by the kernel's own SIGKILL"


def trace(lost: int = 0) -> ObserverState:
    """The trace, which has told of all signals if it has lost none."""
    name, reason = EventSource.TRACEFS.value, "signals with sender and target"
    return ObserverState(name=name, available=True, reason=reason, lost=lost)


def sent(
    at_us: int, sender: int | None = MANAGER, signal: str = "SIGKILL", **fields: Any
) -> Event:
    """A signal to the main process, as the trace has it; without a sender it is the kernel's."""
    values = {"source": EventSource.TRACEFS, "sender_pid": sender, "sender_comm": f"p{sender}"}
    values["result"] = SignalResult.DELIVERED
    whom = {"pid": MAIN.pid, "comm": MAIN.comm, "role": MAIN.role}
    return event(at_us, EventKind.SIGNAL_SENT, signal=signal, **{**values, **whom, **fields})


def fate(*events: Event, **fields: Any) -> ProcessFate:
    """What became of the main process, by a record of all signals."""
    values = {"tier": Tier.A, "observers": (trace(),), "manager_pid": MANAGER, **fields}
    (found,) = build_fates(record(processes=(MAIN,), events=events, **values))
    return found


def killed(*events: Event, **fields: Any) -> tuple[bool | None, str]:
    """Whether the manager has killed it, and why."""
    found = fate(*events, **fields)
    return found.killed_by_manager, found.fate_reason


def test_kill_by_the_manager_is_seen() -> None:
    """The signal itself was there, in a phase of its own."""
    assert (True, THEIRS) == killed(KILLING, sent(ms(5)), gone(ms(6), MAIN, KILLED))


def test_kill_that_the_manager_was_asked_for_is_not_its_own() -> None:
    """In no phase that sends it, and with no limit passed: systemctl kill."""
    asked = "ended by SIGKILL, which somebody had the manager send (systemctl kill)"
    stop = phase(ms(1), "stop")
    assert (False, asked) == killed(stop, sent(ms(5)), gone(ms(6), MAIN, KILLED))
    assert True is fate(stop, sent(ms(2005)), gone(ms(2006), MAIN, KILLED)).killed_by_manager


def test_kill_and_end_of_one_moment_are_cause_and_effect() -> None:
    """Both have the microsecond of the kernel."""
    assert (True, THEIRS) == killed(KILLING, gone(ms(5), MAIN, KILLED), sent(ms(5)))
    assert (False, STRANGERS) == killed(gone(ms(5), MAIN, KILLED), sent(ms(5), STRANGER))


def test_kill_by_somebody_else_is_seen() -> None:
    """Though the manager is in the phase in which it sends its own."""
    events = [
        phase(ms(1), "stop-sigterm"),
        sent(ms(2010), STRANGER),
        phase(ms(2011), "stop-sigkill"),
    ]
    assert (False, STRANGERS) == killed(*events, gone(ms(2012), MAIN, KILLED))


def test_killer_without_a_name_has_its_pid() -> None:
    """It was gone when it was looked for."""
    events = [sent(ms(5), STRANGER, sender_comm=None), gone(ms(6), MAIN, KILLED)]
    assert (False, "ended by SIGKILL from 999 (?)") == killed(*events)


def test_kill_by_the_kernel_is_its_own() -> None:
    """Memory that ran out, say."""
    events = [sent(ms(5), KERNEL), gone(ms(6), MAIN, KILLED)]
    assert (False, KERNELS) == killed(*events)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (MANAGER, STRANGER, (True, THEIRS)),
        (STRANGER, MANAGER, (False, STRANGERS)),
    ],
)
def test_first_of_two_kills_ends_it(first: int, second: int, expected: tuple[bool, str]) -> None:
    """The second one finds it on its way, whatever order they were heard in."""
    late = sent(ms(7), second, result=SignalResult.IGNORED)
    assert expected == killed(KILLING, late, sent(ms(5), first), gone(ms(8), MAIN, KILLED))


def test_kill_after_the_end_was_not_its_cause() -> None:
    """Nobody saw the one that was."""
    expected = (False, "ended by SIGKILL, but the manager was in no phase that sends it")
    assert expected == killed(gone(ms(5), MAIN, KILLED), sent(ms(6), STRANGER))


@pytest.mark.parametrize("result", [SignalResult.IGNORED, SignalResult.ALREADY_PENDING])
def test_kill_that_did_nothing_is_not_the_cause(result: SignalResult) -> None:
    """The first process of a namespace is not killed from inside; then came the manager's."""
    kills = [sent(ms(5), STRANGER, result=result), sent(ms(7))]
    events = [KILLING, *kills, gone(ms(8), MAIN, KILLED)]
    assert (True, THEIRS) == killed(*events)


@pytest.mark.parametrize("result", [SignalResult.IGNORED, SignalResult.ALREADY_PENDING])
def test_kill_that_found_another_is_not_the_kernels(result: SignalResult) -> None:
    """Somebody had sent one before anybody looked."""
    for sender in (MANAGER, STRANGER):
        found = fate(sent(ms(5), sender, result=result), gone(ms(8), MAIN, KILLED))
        assert KERNELS != found.fate_reason


def test_end_that_was_not_a_kill_is_what_it_was() -> None:
    """A SIGKILL on its way does not change how it had ended."""
    assert (False, "exited with 3") == killed(sent(ms(5)), gone(ms(6), MAIN, ExitCode(code=3)))
    assert (False, "ended by SIGTERM") == killed(sent(ms(5)), gone(ms(6), MAIN, TERMINATED))


def test_pid_that_comes_again_has_fates_of_its_own() -> None:
    """The first one had a code, the second one runs: its pid is that of a left-over."""
    second = replace(CHILD, start_ticks=5000, seen_us=ms(20))
    told = record(
        processes=(MAIN, CHILD, second),
        events=(gone(ms(10), CHILD, DONE), gone(ms(30), MAIN, DONE)),
        survivors=(second,),
    )
    _, first, last = build_fates(told)
    assert (ms(10), DONE, "exited with 0") == (first.exit_us, first.exit, first.fate_reason)
    assert (None, None, "it still runs") == (last.exit_us, last.exit, last.fate_reason)


def test_kill_of_a_child_is_that_of_no_other() -> None:
    """Each process has its own signals."""
    ends = gone(ms(6), MAIN, KILLED), gone(ms(6), CHILD, TERMINATED)
    events = (KILLING, sent(ms(5)), *ends)
    fates = build_fates(
        record(
            processes=(MAIN, CHILD),
            events=events,
            tier=Tier.A,
            observers=(trace(),),
            manager_pid=MANAGER,
        )
    )
    assert [(10, True), (11, False)] == [(one.pid, one.killed_by_manager) for one in fates]


# What is not known ---------------------------------------------------------------------------


def test_status_is_not_needed_where_the_kill_was_seen() -> None:
    """Whoever has sent it."""
    unread = gone(ms(6), MAIN, None)
    assert (True, THEIRS) == killed(KILLING, sent(ms(5)), unread)
    assert (False, STRANGERS) == killed(sent(ms(5), STRANGER), unread)
    assert (False, KERNELS) == killed(sent(ms(5), KERNEL), unread)


def test_end_without_a_status_and_without_a_kill_was_none() -> None:
    """Though the manager went through the phase of it."""
    events = [phase(ms(4), "stop-sigterm"), phase(ms(2010), "stop-sigkill"), failed(ms(2012))]
    expected = (False, "its wait status could not be read, but nobody sent it SIGKILL")
    assert expected == killed(*events, gone(ms(2011), MAIN, None), result="timeout")


def test_status_that_came_late_is_the_status() -> None:
    """It was reaped long after it had ended."""
    events = [sent(ms(5)), gone(ms(6), MAIN, None), reaped(ms(90), MAIN, TERMINATED)]
    assert (False, "ended by SIGTERM") == killed(*events)


@pytest.mark.parametrize(
    ("sender", "expected"),
    [(MANAGER, True), (STRANGER, False), (KERNEL, False)],
)
def test_end_that_nobody_told_has_a_kill_with_a_sender(sender: int | None, expected: bool) -> None:
    """It is gone, and what was sent to it was seen."""
    assert expected is fate(sent(ms(5), sender)).killed_by_manager


def test_survivor_of_a_kill_still_runs() -> None:
    """It sleeps where no signal reaches it."""
    assert (False, "it still runs") == killed(sent(ms(5)), survivors=(MAIN,))


def test_manager_that_is_not_known_may_have_been_the_killer() -> None:
    """Its pid could not be read, so nobody can be told from it."""
    for status in (KILLED, None):
        events = [sent(ms(5)), gone(ms(6), MAIN, status)]
        assert fate(*events, manager_pid=None).killed_by_manager is not False


# Signals that were lost ----------------------------------------------------------------------


def lossy(*events: Event, **fields: Any) -> tuple[bool | None, str]:
    """The same, where the trace has lost some."""
    return killed(*events, observers=(trace(lost=3),), **fields)


@pytest.mark.parametrize("status", [KILLED, None])
def test_kill_by_the_manager_that_was_seen_counts_in_spite_of_a_loss(
    status: ExitStatus | None,
) -> None:
    """That it was first is likely."""
    assert lossy(sent(ms(5)), gone(ms(6), MAIN, status))[0]


def test_kill_by_the_manager_that_was_lost_is_concluded() -> None:
    """From the time that had run out, as without a trace."""
    events = [phase(ms(4), "stop-sigterm"), gone(ms(2011), MAIN, KILLED), failed(ms(2012))]
    expected = (True, "ended by SIGKILL when the time for the stop signal had run out")
    assert expected == lossy(*events, result="timeout")


def test_kill_that_was_lost_may_have_ended_what_has_no_status() -> None:
    """That none was seen says nothing then."""
    events = [phase(ms(4), "stop-sigterm"), phase(ms(2010), "stop-sigkill"), failed(ms(2012))]
    expected = (
        None,
        "its wait status could not be read, and the manager may have sent it SIGKILL",
    )
    assert expected == lossy(*events, gone(ms(2011), MAIN, None), result="timeout")


@pytest.mark.parametrize("status", [KILLED, None])
@pytest.mark.parametrize("sender", [STRANGER, KERNEL])
def test_kill_by_somebody_else_is_not_the_managers_in_spite_of_a_loss(
    sender: int | None, status: ExitStatus | None
) -> None:
    """What was seen was not the manager's; the manager is in no phase that sends one."""
    events = [phase(ms(1), "stop-sigterm"), sent(ms(5), sender)]
    assert lossy(*events, gone(ms(6), MAIN, status), dead(ms(7)))[0] is not True


def test_loss_of_another_observer_hides_no_signal() -> None:
    """The trace itself has all of them."""
    other = ObserverState(name="procevents", available=True, reason="births", lost=9)
    unread = [phase(ms(2), "stop-sigkill"), gone(ms(6), MAIN, None)]
    assert False is fate(*unread, observers=(trace(), other)).killed_by_manager


def test_signals_are_not_all_seen_without_a_trace() -> None:
    """What the manager did is concluded then."""
    unread = [phase(ms(2), "stop-sigkill"), gone(ms(6), MAIN, None)]
    assert None is fate(*unread, tier=Tier.B, observers=()).killed_by_manager


# When it was asked to stop -------------------------------------------------------------------


def test_stop_signal_is_the_managers() -> None:
    """The first of them; others' signals, and those that end the wait, are none."""
    events = [
        sent(ms(1), STRANGER, "SIGTERM"),
        sent(ms(2), signal="SIGHUP"),
        sent(ms(9), signal="SIGTERM"),
        sent(ms(4), signal="SIGTERM"),
        sent(ms(20)),
    ]
    assert ms(4) == fate(*events, gone(ms(21), MAIN, KILLED)).signalled_us
    assert None is fate(events[0], gone(ms(5), MAIN, TERMINATED)).signalled_us


def test_stop_signal_is_the_policys() -> None:
    """Not SIGTERM where KillSignal= is another."""
    events = [sent(ms(2), signal="SIGTERM"), sent(ms(4), signal="SIGINT")]
    interrupt = policy(kill_signal="SIGINT", restart_kill_signal="SIGINT")
    assert ms(4) == fate(*events, policy=interrupt).signalled_us


def test_stop_signal_that_was_concluded_has_no_sender() -> None:
    """Without a trace it is the manager's."""
    concluded = replace(
        sent(ms(4), signal="SIGTERM"),
        source=EventSource.DBUS,
        evidence=Evidence.INFERRED,
        sender_pid=None,
        sender_comm=None,
        result=None,
        at_min_us=ms(1),
        at_max_us=ms(5),
    )
    assert ms(4) == fate(concluded, tier=Tier.C, observers=()).signalled_us
