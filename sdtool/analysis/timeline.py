"""How did a stop go? The events in order, each process's fate, and one verdict.

systemd's own words do not answer that: the job of a stop that ended in SIGKILL is "done", and
Result=success can stand beside children that were SIGKILLed (KillMode=mixed) or that still run
(KillMode=process). Where no signal could be observed, its time is inferred within bounds.

Source: systemd.kill(5); service.c of systemd for the order of its phases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sdtool.analysis.phases import is_kill_phase, roles_signalled, signal_of
from sdtool.model.process import Role
from sdtool.model.stop import (
    INFINITY,
    Event,
    EventKind,
    EventSource,
    Evidence,
    ExitCode,
    ExitSignal,
    ExitStatus,
    ProcessFate,
    StopPolicy,
    StopRecord,
    StopReport,
    Verdict,
    WatchedProcess,
)

SIGKILL = "SIGKILL"

KILL_SLACK_US = 500_000
"""An exit this soon after the final signal was sent is taken as its effect."""

TIMER_LEAD_US = 50_000
"""The clock of a phase runs before its stamp: while the manager forks ExecStop= or signals."""

SIGNAL_LEAD_US = 10_000
"""The manager stamps a phase after it has sent its signals: measured up to 4.4 ms later."""

EXIT_LAG_US = 100_000
"""An exit that ended a phase can be noticed so much later than the phase that followed it."""

FAILED_JOBS = frozenset(
    {"canceled", "timeout", "failed", "dependency", "skipped", "invalid", "assert"}
    | {"unsupported", "collected", "once", "frozen", "concurrency"}
)


def build(record: StopRecord) -> StopReport:
    """The report of a stop, from all that was gathered while it ran."""
    events = sort_events(record.events)
    own = _group_by_pid(events)
    fates = tuple(_fate(p, record, own.get(p.pid, ())) for p in record.processes)
    killed = tuple(fate.pid for fate in fates if fate.killed_by_manager)
    verdict, reason = _judge_all(record, fates)
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
        killed=killed,
        also_stopped=record.also_stopped,
        reactivated_by=record.reactivated_by,
        triggers_active=record.triggers_active,
        along=record.along,
        leftovers=record.survivors,
        ports_released=record.released,
        ports_held=record.held,
    )


def _group_by_pid(events: Iterable[Event]) -> dict[int, list[Event]]:
    groups: dict[int, list[Event]] = {}
    for event in events:
        if event.pid is not None:
            groups.setdefault(event.pid, []).append(event)
    return groups


def sort_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events by time; at the same moment a cause stands before its effect."""
    return tuple(sorted(events, key=_order))


def _order(event: Event) -> tuple[int, int]:
    causes = (EventKind.OBSERVER, EventKind.JOB_NEW, EventKind.TIMEOUT, EventKind.SIGNAL_SENT)
    return event.at_us, causes.index(event.kind) if event.kind in causes else len(causes)


# Signals that nobody could see ---------------------------------------------------------------


def infer_phase(
    policy: StopPolicy,
    state: Event,
    processes: Sequence[WatchedProcess],
    events: Sequence[Event],
    requested_us: int,
) -> tuple[Event, ...]:
    """What the manager did on entering a phase: why it left the last one, and whom it signalled.

    Args:
        state: The state event that says the phase was entered.
        processes: All known so far.
        events: All so far; best asked a moment after the phase began, when the exits that it
            caused are among them.
    """
    before = [e for e in states_of(events) if e.at_us < state.at_us]
    last = max(before, key=lambda event: event.at_us, default=None)
    timeout = _infer_timeout(last, state) if last is not None else None
    hidden = _infer_hidden(policy, last, state, timeout, processes, events)
    if hidden is not None:
        sent = infer_phase(policy, hidden, processes, events, requested_us)
        rest = infer_phase(policy, state, processes, (*events, hidden), requested_us)
        return (*sent, hidden, *rest)
    if timeout is not None and timeout.at_min_us is not None:
        since = timeout.at_min_us
    else:
        since = last.at_us if last is not None else requested_us
    exits, own = exits_by_pid(events), _group_by_pid(events)
    there = [p for p in processes if _was_there(p, state, exits, own.get(p.pid, ()))]
    if timeout is None and last is not None:
        # The phase before ended because what it waited for had ended.
        awaited = _awaited_roles(last)
        there = [p for p in there if p.role not in awaited or not _ended_by_then(p, state, exits)]
    if timeout is None and is_kill_phase(state.sub_state or "") and _kills_rest(policy):
        # KillMode=mixed: this phase is for those that outlived the main process.
        ended = _main_end(processes, exits) or 0
        there = [p for p in there if p.pid not in exits or exits[p.pid].at_us > ended]
    sent = _infer_signals(policy, state, there, exits, since)
    if timeout is None:
        return sent
    return (replace(timeout, at_us=min(e.at_us for e in (timeout, *sent))), *sent)


def states_of(events: Iterable[Event]) -> list[Event]:
    """The state events by time, each with the limit that held at its end: a reload can move it."""
    states: list[Event] = []
    for event in sort_events(events):
        if event.kind is EventKind.STATE:
            states.append(event)
        elif event.kind is EventKind.GAP and event.limit_us is not None and states:
            states[-1] = replace(states[-1], limit_us=event.limit_us, then=event.then)
    return states


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
    exits, own = exits_by_pid(events), _group_by_pid(events)
    ended = [
        exits[process.pid].at_us
        for process in processes
        if process.role in roles
        and process.pid in exits
        and timeout.at_min_us <= exits[process.pid].at_us <= state.at_us + EXIT_LAG_US
        and not isinstance(_status(own[process.pid]), ExitCode)
    ]
    unseen = any(since <= state.at_us <= until for since, until in _unseen(events))
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


def _unseen(events: Iterable[Event]) -> list[tuple[int, int]]:
    """Times in which the unit went through phases that nobody told.

    Where its state at the end of a gap is still that of before, nothing was missed.
    """
    kinds = (EventKind.STATE, EventKind.GAP)
    events = [event for event in events if event.kind in kinds]
    spans = []
    for gap in (event for event in events if event.kind is EventKind.GAP):
        since = gap.at_us if gap.at_min_us is None else gap.at_min_us
        missed = [
            event.at_us
            for event in events
            if event.kind is EventKind.STATE and since <= event.at_us <= gap.at_us
        ]
        if missed:
            spans.append((since - SIGNAL_LEAD_US, max(missed) + EXIT_LAG_US))
    return spans


def _infer_timeout(last: Event, state: Event) -> Event | None:
    """A phase that lasted as long as its limit was ended by it."""
    limit = last.limit_us
    if not isinstance(limit, int):
        return None
    earliest_us = last.at_us + limit - min(TIMER_LEAD_US, limit // 2)
    if state.at_us < earliest_us:
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
    exits: Mapping[int, Event],
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
    if policy.send_sighup and (state.sub_state or "").endswith("-sigterm"):
        signals.append("SIGHUP")
    ends = [exits[p.pid].at_us for p in targets if p.pid in exits]
    at_us = max(since, min([*ends, state.at_us]))
    return tuple(
        _sent(state.unit, target, name, at_us, since, state.at_us)
        for name in signals
        for target in targets
    )


def _was_there(
    process: WatchedProcess, state: Event, exits: Mapping[int, Event], own: Sequence[Event]
) -> bool:
    """Whether the process ran when the phase began, and so got its signal."""
    born_late = process.seen_us is not None and process.seen_us > state.at_us
    gone = exits.get(process.pid)
    if born_late or gone is None:
        return not born_late
    status = _status(own)
    if is_kill_phase(state.sub_state or "") and isinstance(status, ExitCode):
        # Nobody exits by itself after SIGKILL.
        return False
    if process.seen_us is not None and status == ExitCode(code=0):
        # A command of ExecStop= and its helpers: the phase began because they were done.
        return gone.at_us > state.at_us + EXIT_LAG_US
    return gone.at_us >= state.at_us - SIGNAL_LEAD_US


def _awaited_roles(state: Event) -> frozenset[Role]:
    """Whose end the manager waits for in a phase: of its command, or of the main process too."""
    if (state.sub_state or "").endswith(("-sigterm", "-sigkill", "-watchdog")):
        return frozenset({Role.MAIN, Role.CONTROL})
    return frozenset({Role.CONTROL})


def _main_end(processes: Iterable[WatchedProcess], exits: Mapping[int, Event]) -> int | None:
    """When the main process ended, None when it has not."""
    mains = (process.pid for process in processes if process.role is Role.MAIN)
    return min((exits[pid].at_us for pid in mains if pid in exits), default=None)


def _ended_by_then(process: WatchedProcess, state: Event, exits: Mapping[int, Event]) -> bool:
    gone = exits.get(process.pid)
    return gone is not None and gone.at_us <= state.at_us + EXIT_LAG_US


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
        comm=process.comm,
        role=process.role,
        signal=signal,
    )


def _is_kill(event: Event) -> bool:
    return event.kind is EventKind.SIGNAL_SENT and event.signal == SIGKILL


def _kills_rest(policy: StopPolicy) -> bool:
    final = policy.final_kill_signal
    return policy.kill_mode == "mixed" and policy.send_sigkill and final == SIGKILL


def _main_exit(record: StopRecord) -> int | None:
    return _main_end(record.processes, exits_by_pid(record.events))


# Fates ---------------------------------------------------------------------------------------


def exits_by_pid(events: Iterable[Event]) -> dict[int, Event]:
    """The exit event of each process that has one."""
    exits: dict[int, Event] = {}
    for event in events:
        if event.kind is EventKind.PROCESS_EXIT and event.pid is not None:
            exits.setdefault(event.pid, event)
    return exits


def _status(own: Iterable[Event]) -> ExitStatus | None:
    """The wait status: in the exit event, or in the reap event when it was pending."""
    kinds = (EventKind.PROCESS_EXIT, EventKind.PROCESS_REAPED)
    return next((e.exit for e in own if e.kind in kinds and e.exit is not None), None)


def _ended_by(status: ExitStatus | None, signal: str) -> bool:
    return isinstance(status, ExitSignal) and status.signal == signal


def _fate(process: WatchedProcess, record: StopRecord, own: Sequence[Event]) -> ProcessFate:
    """What became of a process, from its own events."""
    exited = exits_by_pid(own).get(process.pid)
    status = _status(own)
    killed, reason = _killed_by_manager(process, exited, status, record, own)
    return ProcessFate(
        pid=process.pid,
        comm=process.comm,
        role=process.role,
        disposition=process.disposition,
        signalled_us=next((e.at_us for e in own if e.kind is EventKind.SIGNAL_SENT), None),
        exit_us=exited.at_us if exited else None,
        exit=status,
        killed_by_manager=killed,
        fate_reason=reason,
    )


def _killed_by_manager(
    process: WatchedProcess,
    exited: Event | None,
    status: ExitStatus | None,
    record: StopRecord,
    own: Sequence[Event],
) -> tuple[bool | None, str]:
    """Whether the manager's final signal ended the process, and how we know."""
    if exited is None:
        if any(survivor.pid == process.pid for survivor in record.survivors):
            return False, "it still runs"
        return _unread_status(process, record, None)
    if status is not None and not _ended_by(status, SIGKILL):
        return False, _plain_end(status)
    killing = _kill_before(exited.at_us, own)
    if killing is not None and (status is not None or exited.at_us - killing < KILL_SLACK_US):
        how = "ended by" if status is not None else "gone right after"
        return True, f"{how} SIGKILL, which the manager had sent"
    if status is None:
        return _unread_status(process, record, exited.at_us)
    return _unexplained_kill(process, exited.at_us, record)


def _unexplained_kill(
    process: WatchedProcess, exit_us: int, record: StopRecord
) -> tuple[bool | None, str]:
    """A SIGKILL in no phase that was seen: states come in bursts, and some are never told."""
    policy = record.policy
    if policy is None:
        return None, "ended by SIGKILL; whether the manager sent it is not known for this type"
    if _may_kill(policy, process) and _ran_out_before(exit_us, record.events):
        return True, "ended by SIGKILL when the time for the stop signal had run out"
    if _kills_rest(policy) and process.role is not Role.MAIN:
        return _unexplained_mixed_kill(exit_us, record)
    if _may_kill(policy, process) and _may_be_unseen(exit_us, policy, record):
        return None, "ended by SIGKILL while the manager was out of reach: its own or another's"
    return False, "ended by SIGKILL, but the manager was in no phase that sends it"


def _unexplained_mixed_kill(exit_us: int, record: StopRecord) -> tuple[bool | None, str]:
    """KillMode=mixed kills in a phase so short that it may not be told, after ExecStopPost=."""
    main_exit = _main_exit(record) or 0
    states = states_of(record.events)
    after_post = [
        following.at_us
        for state, following in itertools.pairwise(states)
        if state.sub_state == "stop-post"
    ]
    too_early = exit_us < main_exit or any(
        exit_us < at_us - SIGNAL_LEAD_US for at_us in after_post
    )
    told = any(is_kill_phase(state.sub_state or "") for state in states)
    if too_early or (told and exit_us != main_exit):
        return False, "ended by SIGKILL before the manager sent it (KillMode=mixed)"
    return None, "ended by SIGKILL when the main process ended: systemd's or its own (mixed)"


def _ran_out_before(exit_us: int, events: Iterable[Event]) -> bool:
    """Whether a phase of the stop signal had used up its time before the exit."""
    return any(
        isinstance(event.limit_us, int)
        and (event.sub_state or "").endswith(("-sigterm", "-watchdog"))
        and exit_us >= event.at_us + event.limit_us - min(TIMER_LEAD_US, event.limit_us // 2)
        for event in states_of(events)
    )


def _may_be_unseen(at_us: int | None, policy: StopPolicy, record: StopRecord) -> bool:
    """Whether SIGKILL may have been sent in a phase that nobody told; None is a moment unknown.

    No phase sends it before a limit has passed since the last phase that was told.
    """
    if policy.timeout_stop_us == INFINITY:
        return False
    states = states_of(record.events)
    for since, until in _unseen(record.events):
        end = until if at_us is None else at_us
        told = max((s.at_us for s in states if s.at_us < since), default=record.requested_us)
        due = max(told, record.requested_us) + policy.timeout_stop_us - TIMER_LEAD_US
        if since <= end <= until and end >= due:
            return True
    return False


def _may_kill(policy: StopPolicy, process: WatchedProcess) -> bool:
    """Whether SIGKILL can go to this process at all, by the policy."""
    final = policy.send_sigkill and policy.final_kill_signal == SIGKILL
    return final and process.role in roles_signalled(policy, "stop-sigkill")


def _kill_before(exit_us: int, own: Iterable[Event]) -> int | None:
    """When the manager's SIGKILL went to the process, if that was before its exit."""
    for event in own:
        if _is_kill(event):
            # The word of the phase may trail the exit it caused: the lower bound counts.
            lower = event.at_us if event.at_min_us is None else event.at_min_us
            if lower <= exit_us:
                return event.at_us
    return None


def _unread_status(
    process: WatchedProcess, record: StopRecord, exit_us: int | None
) -> tuple[bool | None, str]:
    """An end that nobody saw is only in doubt where the manager may have sent its SIGKILL."""
    policy = record.policy
    if policy is None:
        return False, "how it ended was not seen"
    phases = (e.sub_state or "" for e in record.events if e.kind is EventKind.STATE)
    rest_killed = _kills_rest(policy) and process.role is not Role.MAIN
    kill_sent = record.result == "timeout" or any(map(is_kill_phase, phases))
    unseen = "its wait status could not be read"
    if rest_killed or (kill_sent and _may_kill(policy, process)):
        return None, f"{unseen}, and the manager may have sent it SIGKILL"
    if _may_kill(policy, process) and _may_be_unseen(exit_us, policy, record):
        return None, f"{unseen}, and the manager was out of reach"
    return False, f"{unseen}, but the manager sent it no SIGKILL"


def _plain_end(status: ExitStatus | None) -> str:
    if status is None:
        return "it ended; its wait status could not be read"
    if isinstance(status, ExitSignal):
        return f"ended by {status.signal}"
    return f"exited with {status.code}"


# Verdict -------------------------------------------------------------------------------------


def _judge_all(record: StopRecord, fates: Sequence[ProcessFate]) -> tuple[Verdict, str]:
    """The verdict of the unit, or the worse one of a unit that it pulled along."""
    verdict, reason = _judge(record, fates)
    order = list(Verdict)
    for other in record.along:
        if order.index(other.verdict) < order.index(verdict):
            verdict = other.verdict
            reason = f"{other.unit}, which went down along: {other.verdict_reason}"
    return verdict, reason


def _judge(record: StopRecord, fates: Sequence[ProcessFate]) -> tuple[Verdict, str]:
    """The worst that is true, with its reason in one sentence."""
    if record.already_inactive:
        return Verdict.CLEAN, f"It was {record.active_state} already: there was nothing to stop."
    if record.survivors:
        names = _names((ref.pid, ref.comm) for ref in record.survivors)
        return Verdict.LEFTOVER, f"{names} still {_verb(len(record.survivors))} after the stop."
    killed = [fate for fate in fates if fate.killed_by_manager]
    if killed:
        return Verdict.KILLED, _killed_reason(record, killed)
    if failure := _failure(record):
        return Verdict.FAILED, failure
    if unknown := _unknown(record, fates):
        return Verdict.UNKNOWN, unknown
    return Verdict.CLEAN, _clean_reason(fates)


def _killed_reason(record: StopRecord, killed: Sequence[ProcessFate]) -> str:
    names = _names((fate.pid, fate.comm) for fate in killed)
    main_exit = _main_exit(record)
    if record.policy and _kills_rest(record.policy) and main_exit and record.result == "success":
        return f"{names} got SIGKILL and no stop signal: KillMode=mixed ends the rest so."
    last = max(fate.exit_us or record.ended_us for fate in killed)
    seconds = (last - record.requested_us) / 1_000_000
    return f"{names} had to be SIGKILLed after {seconds:.1f} s."


def _failure(record: StopRecord) -> str | None:
    if record.job_result in FAILED_JOBS:
        return f"The stop job ended as {record.job_result}; the unit is {record.active_state}."
    if record.job_result is None and not record.started_again and _is_up(record):
        why = record.job_result_reason or "its end was not told"
        return f"The stop job is gone and the unit is {record.active_state}: {why}."
    timeouts = [event for event in record.events if event.kind is EventKind.TIMEOUT]
    if record.result == "timeout" and timeouts:
        return f"The phase {timeouts[0].sub_state} ran out of its time (Result=timeout)."
    if record.active_state != "failed" and record.result == record.result_before:
        # What it failed of before the stop (in auto-restart, say) is not the stop's.
        return None
    if record.result not in (None, "success"):
        return f"The unit ended with Result={record.result}."
    if record.active_state == "failed":
        return "The unit ended in the state failed."
    return None


def _is_up(record: StopRecord) -> bool:
    return record.active_state not in ("inactive", "failed")


def _unknown(record: StopRecord, fates: Sequence[ProcessFate]) -> str | None:
    if record.result_reason is not None:
        return f"Whether it failed is not known: {record.result_reason}."
    hidden = [fate for fate in fates if fate.killed_by_manager is None]
    if hidden:
        names = _names((fate.pid, fate.comm) for fate in hidden)
        return f"How {names} ended was not observable: {hidden[0].fate_reason}."
    return None


def _clean_reason(fates: Sequence[ProcessFate]) -> str:
    if not fates:
        return "It had no processes."
    if len(fates) == 1:
        return "The process ended without a SIGKILL of systemd's, and nothing stayed behind."
    count = f"All {len(fates)} processes"
    return f"{count} ended, none by a SIGKILL of systemd's, and nothing stayed behind."


def _names(processes: Iterable[tuple[int, str]]) -> str:
    named = [f"{pid} ({comm})" for pid, comm in processes]
    shown = ", ".join(named[:3])
    return shown if len(named) <= 3 else f"{shown} and {len(named) - 3} more"


def _verb(count: int) -> str:
    return "runs" if count == 1 else "run"
