"""How did a stop go? The events in order, and what the manager did that nobody could see.

systemd's own words do not answer that: the job of a stop that ended in SIGKILL is "done", and
Result=success can stand beside children that were SIGKILLed (KillMode=mixed) or that still run
(KillMode=process). Where no signal could be observed, its time is inferred within bounds. What
became of each process is the question of ``fates``, and how good all that was of ``verdict``.

Source: systemd.kill(5); service.c of systemd for the order of its phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from sdtool.analysis.events import (
    EXIT_LAG_US,
    SIGNAL_LEAD_US,
    TIMER_LEAD_US,
    exits_by_process,
    group_by_process,
    order_lives,
    sort_events,
    states_of,
    status_of,
    unseen_spans,
)
from sdtool.analysis.fates import build_fates
from sdtool.analysis.phases import (
    SIGKILL,
    is_kill_phase,
    kills_rest,
    roles_signalled,
    signal_of,
)
from sdtool.analysis.verdict import judge
from sdtool.model.process import ProcessId, ProcessRef, Role
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    Evidence,
    ExitCode,
    ExitSignal,
    StopPolicy,
    StopRecord,
    StopReport,
    Tier,
    WatchedProcess,
)

SIGHUP = "SIGHUP"

SUCCESS = "success"
"""The result of a unit of which nothing has failed."""


def build(record: StopRecord) -> StopReport:
    """The report of a stop, from all that was gathered while it ran."""
    events = sort_events(order_lives(record.events))
    fates = build_fates(record)
    killed = tuple(fate.pid for fate in fates if fate.killed_by_manager)
    verdict, reason = judge(record, fates)
    return StopReport(
        unit=record.unit,
        policy=record.policy,
        tier=record.tier,
        observers=record.observers,
        requested_us=record.requested_us,
        duration_us=0 if record.already_inactive else record.ended_us - record.requested_us,
        events=events,
        job_result=record.job_result,
        job_result_reason=record.job_result_reason,
        result=record.result,
        result_reason=record.result_reason,
        active_state=record.active_state,
        verdict=verdict,
        verdict_reason=reason,
        processes=fates,
        commands=record.commands,
        killed=killed,
        also_stopped=record.also_stopped,
        reactivated_by=record.reactivated_by,
        triggers_active=record.triggers_active,
        along=record.along,
        leftovers=tuple(ProcessRef(pid=p.pid, comm=p.comm) for p in record.survivors),
        ports_released=record.released,
        ports_held=record.held,
        unread_reason=record.unread_reason,
    )


def is_open(record: StopRecord) -> bool:
    """Whether something that the journal may tell is not known of a stop."""
    if any(fate.killed_by_manager is None for fate in build_fates(record)):
        return True
    # Who is born when the main process ends, and killed at once, is seen by no walk.
    unseen = record.tier in (Tier.C, Tier.D)
    return unseen and record.policy is not None and kills_rest(record.policy)


# Signals that nobody could see ---------------------------------------------------------------


def infer_phase(
    policy: StopPolicy,
    state: Event,
    processes: Sequence[WatchedProcess],
    events: Sequence[Event],
    requested_us: int,
    *,
    sees_signals: bool = False,
) -> tuple[Event, ...]:
    """What the manager did on entering a phase: why it left the last one, and whom it signalled.

    Args:
        state: The state event that says the phase was entered.
        processes: All known so far.
        events: All so far; best asked a moment after the phase began, when the exits that it
            caused are among them.
        sees_signals: Those that were sent are among the events: none is concluded.
    """
    before = [e for e in states_of(events) if e.at_us < state.at_us]
    last = max(before, key=lambda event: event.at_us, default=None)
    timeout = _infer_timeout(last, state) if last is not None else None
    hidden = _infer_hidden(policy, last, state, timeout, processes, events)
    infer = partial(infer_phase, policy, processes=processes, requested_us=requested_us)
    if hidden is not None:
        sent = infer(hidden, events=events, sees_signals=sees_signals)
        rest = infer(state, events=(*events, hidden), sees_signals=sees_signals)
        return (*sent, hidden, *rest)
    if sees_signals:
        signal = signal_of(policy, state.sub_state or "")
        sent_now = (e for e in events if e.kind is EventKind.SIGNAL_SENT and e.signal == signal)
        signals = [e for e in sent_now if e.at_us <= state.at_us]
        return () if timeout is None else (_date_timeout(timeout, signals),)
    return _infer_sent(policy, last, state, timeout, processes, events, requested_us)


def _date_timeout(event: Event, signals: Sequence[Event]) -> Event:
    """A limit had passed when the first signal was sent because of it."""
    sent = [e.at_us for e in signals if e.at_us >= (event.at_min_us or event.at_us)]
    at_us = min([*sent, event.at_us])
    return replace(event, at_us=at_us, at_max_us=at_us)


def _infer_sent(
    policy: StopPolicy,
    last: Event | None,
    state: Event,
    timeout: Event | None,
    processes: Sequence[WatchedProcess],
    events: Sequence[Event],
    requested_us: int,
) -> tuple[Event, ...]:
    """The limit that passed, if one did, and the signals to those who were there then."""
    if timeout is not None and timeout.at_min_us is not None:
        since = timeout.at_min_us
    else:
        since = last.at_us if last is not None else requested_us
    exits, own = exits_by_process(events), group_by_process(events)
    signal = signal_of(policy, state.sub_state or "")
    repeated = last is not None and signal_of(policy, last.sub_state or "") == signal
    first_us = None if repeated else since
    phase = _Phase(state.at_us, signal, first_us, is_cut=timeout is not None)
    outlived = [p for p in processes if p.id not in exits or exits[p.id].at_us >= since]
    there = [p for p in outlived if _was_there(p, phase, exits, own.get(p.id, ()))]
    if timeout is None and last is not None:
        # The phase before ended because what it waited for had ended.
        awaited = _awaited_roles(last)
        gone = [p for p in processes if p.role in awaited and _ended_by_then(p, state, exits)]
        ended_us = max((exits[p.id].at_us for p in gone), default=0)
        there = [p for p in there if p not in gone and _outlived(p, ended_us, exits)]
    seen = {
        (e.process, e.signal)
        for e in events
        if e.kind is EventKind.SIGNAL_SENT and e.evidence is Evidence.OBSERVED and e.at_us >= since
    }
    inferred = _infer_signals(policy, state, there, exits, since)
    sent = tuple(event for event in inferred if (event.process, event.signal) not in seen)
    if timeout is None:
        return sent
    return (replace(timeout, at_us=min(e.at_us for e in (timeout, *sent))), *sent)


def _infer_hidden(
    policy: StopPolicy,
    last: Event | None,
    state: Event,
    timeout: Event | None,
    processes: Sequence[WatchedProcess],
    events: Sequence[Event],
) -> Event | None:
    """The phase of the final signal that was passed through while the manager was out of reach."""
    if last is None or timeout is None or timeout.at_min_us is None:
        return None
    phase = f"{(last.sub_state or '').rpartition('-')[0]}-sigkill"
    roles = roles_signalled(policy, phase)
    exits, own = exits_by_process(events), group_by_process(events)
    ended = [
        exits[process.id].at_us
        for process in processes
        if process.role in roles
        and process.id in exits
        and timeout.at_min_us <= exits[process.id].at_us <= state.at_us + EXIT_LAG_US
        and not isinstance(status_of(own[process.id]), ExitCode)
    ]
    unseen = any(since <= state.at_us <= until for since, until in unseen_spans(events))
    was_due = last.then == policy.final_kill_signal and not is_kill_phase(state.sub_state or "")
    if not (ended and unseen and was_due):
        return None
    return replace(
        state,
        at_us=min(*ended, state.at_us - 1),
        at_min_us=timeout.at_min_us,
        at_max_us=state.at_us,
        evidence=Evidence.INFERRED,
        active_state=last.active_state,
        sub_state=phase,
        result="timeout",
        limit_us=None,
        then=None,
    )


def _infer_timeout(last: Event, state: Event) -> Event | None:
    """A phase that lasted as long as its limit was ended by it, and the result says so.

    A service can have asked for more time (EXTEND_TIMEOUT_USEC); its result stays success.
    """
    limit = last.limit_us
    if not isinstance(limit, int) or state.result == SUCCESS:
        return None
    earliest_us = last.at_us + limit - min(TIMER_LEAD_US, limit // 2)
    # A state whose time is inferred can have come as early as its bounds allow.
    if (state.at_us if state.at_min_us is None else state.at_min_us) < earliest_us:
        return None
    return Event(
        unit=state.unit,
        at_us=state.at_us,
        at_min_us=earliest_us,
        at_max_us=state.at_us,
        kind=EventKind.TIMEOUT,
        source=EventSource.DBUS,
        evidence=Evidence.INFERRED,
        sub_state=last.sub_state,
        limit_us=limit,
        then=last.then,
    )


def _infer_signals(
    policy: StopPolicy,
    state: Event,
    processes: Sequence[WatchedProcess],
    exits: Mapping[ProcessId, Event],
    since: int,
) -> tuple[Event, ...]:
    """A signal to each process that was there when the phase began, all at one moment.

    A process can be dead before the word of the phase is: the signal came before both.
    """
    signal = signal_of(policy, state.sub_state or "")
    if signal is None:
        return ()
    roles = roles_signalled(policy, state.sub_state or "")
    targets = [process for process in processes if process.role in roles]
    signals = [signal]
    is_asking = (state.sub_state or "").endswith("-sigterm")
    if policy.send_sighup and is_asking and signal not in (SIGHUP, SIGKILL):
        signals.append(SIGHUP)
    ends = [exits[p.id].at_us for p in targets if p.id in exits]
    at_us = max(since, min([*ends, state.at_us]))
    # Nobody got it before he was there.
    there = [(target, max(since, target.seen_us or since)) for target in targets]
    return tuple(
        _sent(state.unit, target, name, max(at_us, min_us), min_us, max(state.at_us, min_us))
        for target, min_us in there
        for name in signals
    )


class _Phase(NamedTuple):
    """A phase that sends a signal.

    Attributes:
        at_us: When the word of it came.
        signal: The one that it sends.
        first_us: Since when it can have been sent; None where the phase before sent it too.
        is_cut: The phase before it had used up its time: what it waited for had not ended.
    """

    at_us: int
    signal: str | None
    first_us: int | None
    is_cut: bool


def _was_there(
    process: WatchedProcess, phase: _Phase, exits: Mapping[ProcessId, Event], own: Sequence[Event]
) -> bool:
    """Whether the process ran when the phase began, and so got its signal."""
    gone, status = exits.get(process.id), status_of(own)
    died = isinstance(status, ExitSignal) and status.signal == phase.signal
    if process.seen_us is not None:
        # A moment before the word of the phase it can have been born because of the signal.
        latest_us = phase.at_us if died else phase.at_us - SIGNAL_LEAD_US
        if process.seen_us > latest_us:
            return False
    if gone is None:
        return True
    unread = status is None and process.seen_us is None
    if (died or unread) and phase.first_us is not None and phase.first_us <= gone.at_us:
        # However long before the word of the phase: to many the signal takes its time.
        return True
    if phase.signal == SIGKILL and isinstance(status, ExitCode):
        # Nobody exits by itself after SIGKILL.
        return False
    if process.seen_us is not None and not (died or phase.is_cut):
        # A command of ExecStop= and its helpers: the phase began because they were done.
        return gone.at_us > phase.at_us + EXIT_LAG_US
    return gone.at_us >= phase.at_us - SIGNAL_LEAD_US


def _awaited_roles(state: Event) -> frozenset[Role]:
    """Whose end the manager waits for in a phase: of its command, or of the main process too."""
    if (state.sub_state or "").endswith(("-sigterm", "-sigkill", "-watchdog")):
        return frozenset({Role.MAIN, Role.CONTROL})
    return frozenset({Role.CONTROL})


def _outlived(process: WatchedProcess, end_us: int, exits: Mapping[ProcessId, Event]) -> bool:
    """Whether it ran when those had ended that the phase before was waiting for."""
    gone = exits.get(process.id)
    return gone is None or gone.at_us > end_us


def _ended_by_then(
    process: WatchedProcess, state: Event, exits: Mapping[ProcessId, Event]
) -> bool:
    gone = exits.get(process.id)
    born_late = process.seen_us is not None and process.seen_us > state.at_us
    return gone is not None and not born_late and gone.at_us <= state.at_us + EXIT_LAG_US


def _sent(
    unit: str, process: WatchedProcess, signal: str, at_us: int, min_us: int, max_us: int
) -> Event:
    return Event(
        unit=unit,
        at_us=at_us,
        at_min_us=min_us,
        at_max_us=max_us,
        kind=EventKind.SIGNAL_SENT,
        source=EventSource.DBUS,
        evidence=Evidence.INFERRED,
        pid=process.pid,
        start_ticks=process.start_ticks,
        comm=process.comm,
        role=process.role,
        signal=signal,
    )
