"""What the journal adds to a stop: whom the manager killed where nobody saw it."""

from __future__ import annotations

from sdtool.analysis.journal import UNSEEN, build_events, find_unseen
from sdtool.analysis.timeline import build, is_open
from sdtool.model.journal import JournalRecord, RecordKind
from sdtool.model.process import Role
from sdtool.model.stop import Event, EventKind, EventSource, StopRecord, Tier, Verdict
from tests.unit.make import CHILD, DONE, MAIN, event, gone, ms, phase, policy, record

MANAGER = 1


def killing(pid: int, at_us: int = ms(3)) -> JournalRecord:
    """The manager is about to kill a process."""
    return JournalRecord(
        at_us=at_us,
        message="",
        kind=RecordKind.KILLING,
        pid=pid,
        comm=f"p{pid}",
        signal="SIGKILL",
    )


def mixed(*events: Event, tier: Tier = Tier.C) -> StopRecord:
    """A stop with KillMode=mixed, of which these events were seen."""
    return record(
        policy=policy(kill_mode="mixed"),
        processes=(MAIN, CHILD),
        events=(phase(ms(1), "stop-sigterm"), gone(ms(2), MAIN), *events),
        tier=tier,
        manager_pid=MANAGER,
    )


def test_killing_is_a_signal_of_the_managers() -> None:
    """By its own word, of a process whose end was not seen: killed is what it was."""
    stop = mixed()
    (sent,) = build_events([killing(CHILD.pid)], stop)
    assert (EventKind.SIGNAL_SENT, EventSource.JOURNAL) == (sent.kind, sent.source)
    assert (CHILD.pid, "SIGKILL", MANAGER, Role.OTHER) == (
        sent.pid,
        sent.signal,
        sent.sender_pid,
        sent.role,
    )
    report = build(mixed(sent))
    assert (Verdict.KILLED, (CHILD.pid,)) == (report.verdict, report.killed)


def test_signal_that_is_known_is_not_told_again() -> None:
    """Seen or concluded: one is one."""
    known = event(ms(3), EventKind.SIGNAL_SENT, pid=CHILD.pid, signal="SIGKILL")
    assert () == build_events([killing(CHILD.pid)], mixed(known))


def test_limit_that_passed_is_told_once() -> None:
    """With what the manager did then, in its own word."""
    told = JournalRecord(
        at_us=ms(3),
        message="",
        kind=RecordKind.TIMEOUT,
        sub_state="stop-sigterm",
        action="Killing",
    )
    began = phase(ms(1), "stop-sigterm", limit_us=2000)
    (timeout,) = build_events([told], mixed(began))
    assert ("stop-sigterm", 2000, "SIGKILL", ms(3)) == (
        timeout.sub_state,
        timeout.limit_us,
        timeout.then,
        timeout.at_us,
    )
    assert () == build_events([told], mixed(began, timeout))


def test_timeout_of_a_phase_that_the_journal_does_not_name_is_that_of_the_last() -> None:
    """Where no state was told there is no phase to name."""
    told = JournalRecord(at_us=ms(3), message="", kind=RecordKind.TIMEOUT, action="Killing")
    first, last = phase(ms(1), "stop"), phase(ms(2), "stop-sigterm")
    (timeout,) = build_events([told], mixed(first, last, phase(ms(4), "stop-sigkill")))
    assert "stop-sigterm" == timeout.sub_state
    assert () == build_events([told], record())


def test_process_that_only_the_journal_has_is_one_of_the_unit() -> None:
    """It was born and gone between two looks."""
    stop = mixed()
    events = build_events([killing(CHILD.pid), killing(77)], stop)
    (unseen,) = find_unseen(events, stop.processes)
    assert (77, "p77", UNSEEN, ms(3)) == (
        unseen.pid,
        unseen.comm,
        unseen.disposition_reason,
        unseen.seen_us,
    )


def test_journal_is_asked_where_something_is_open() -> None:
    """An end that nobody saw, or with KillMode=mixed a birth that nobody could see."""
    ended = gone(ms(2.5), CHILD, DONE)
    assert is_open(mixed())
    assert is_open(mixed(ended))
    assert not is_open(mixed(ended, tier=Tier.A))
    assert not is_open(record(processes=(MAIN,), events=(gone(ms(2), MAIN),)))
