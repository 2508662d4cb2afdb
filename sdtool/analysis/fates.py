"""Who was killed, and by whom: what became of each process of a unit that stopped?

A SIGKILL can be the manager's or anybody's; what tells them apart is the phase that it came in.

Source: systemd.kill(5); service.c of systemd for the phases that send the final signal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdtool.analysis.events import (
    DELIVERED,
    SIGNAL_LEAD_US,
    TIMER_LEAD_US,
    exits_by_process,
    group_by_process,
    is_kill,
    main_end,
    sees_signals,
    sort_events,
    states_of,
    status_of,
    unseen_spans,
)
from sdtool.analysis.phases import (
    ENDED,
    SIGKILL,
    is_kill_phase,
    kills_rest,
    roles_signalled,
    signal_of,
)
from sdtool.model.process import Disposition, ProcessId, Role
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
    WatchedProcess,
)

UNSEEN = "its wait status could not be read"

KILL_SLACK_US = 500_000
"""An exit this soon after the final signal was sent is taken as its effect."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """A stop, with what all of its processes are judged by.

    Attributes:
        states: As ``states_of`` gives them.
        unseen: As ``unseen_spans`` gives them.
        main_end_us: When the main process ended, None when it has not.
        survivors: Those that run after it.
        sees_signals: All that were sent are among the events.
    """

    record: StopRecord
    states: tuple[Event, ...]
    unseen: tuple[tuple[int, int], ...]
    main_end_us: int | None
    survivors: frozenset[ProcessId]
    sees_signals: bool


def build_fates(record: StopRecord) -> tuple[ProcessFate, ...]:
    """What became of each process, in the order they were seen."""
    stop = _Stop(
        record=record,
        states=tuple(states_of(record.events)),
        unseen=tuple(unseen_spans(record.events)),
        main_end_us=main_end(record.processes, exits_by_process(record.events)),
        survivors=frozenset(process.id for process in record.survivors),
        sees_signals=sees_signals(record),
    )
    own = group_by_process(sort_events(record.events))
    return tuple(_build_fate(p, stop, own.get(p.id, ())) for p in record.processes)


def _build_fate(process: WatchedProcess, stop: _Stop, own: Sequence[Event]) -> ProcessFate:
    """What became of a process, from its own events in their order."""
    exited = exits_by_process(own).get(process.id)
    status = status_of(own)
    killed, reason = _killed_by_manager(process, exited, status, stop, own)
    stop_signal = next((event for event in own if _is_stop_signal(event, stop)), None)
    return ProcessFate(
        pid=process.pid,
        start_ticks=process.start_ticks,
        comm=process.comm,
        role=process.role,
        disposition=process.disposition,
        disposition_reason=process.disposition_reason,
        as_predicted=_is_as_predicted(process, status, stop_signal, stop, killed is True),
        signalled_us=stop_signal.at_us if stop_signal is not None else None,
        exit_us=exited.at_us if exited else None,
        exit=status,
        killed_by_manager=killed,
        fate_reason=reason,
    )


def _is_as_predicted(
    process: WatchedProcess,
    status: ExitStatus | None,
    sent: Event | None,
    stop: _Stop,
    was_killed: bool,
) -> bool | None:
    """Whether the stop signal did what was predicted; one with a handler may end in any way."""
    if sent is None or sent.signal is None:
        return None
    if process.disposition is Disposition.DIES and sent.result not in (None, *DELIVERED):
        return None  # it was on its way to its end already
    stays = process.id in stop.survivors
    if not stays and status is None:
        return None
    died = _ended_by(status, sent.signal)
    if process.disposition is Disposition.IGNORES:
        return not died
    if process.disposition is not Disposition.DIES:
        return None
    # Whether one that has exited got the signal before that can only be seen.
    seen = sent.result in DELIVERED
    outlived = stays or was_killed or (seen and isinstance(status, ExitCode))
    return True if died else False if outlived else None


def _killed_by_manager(
    process: WatchedProcess,
    exited: Event | None,
    status: ExitStatus | None,
    stop: _Stop,
    own: Sequence[Event],
) -> tuple[bool | None, str]:
    """Whether the manager's final signal ended the process, and how we know."""
    if exited is None:
        if process.id in stop.survivors:
            return False, "it still runs"
        if process.has_left:
            return False, "it was moved out of the unit, and is none of its stop any more"
        if any(_is_managers_kill(e, stop) and e.evidence is Evidence.OBSERVED for e in own):
            return True, "gone after SIGKILL, which the manager had sent"
        return _unread_status(process, stop, None)
    if status is not None and not _ended_by(status, SIGKILL):
        return False, _plain_end(status)
    if stop.sees_signals:
        seen = _seen_kill(exited.at_us, own, stop)
        if seen is not None or status is None:
            return seen or (False, f"{UNSEEN}, but nobody sent it SIGKILL")
    killing = _kill_before(exited.at_us, own, stop)
    if killing is not None and (status is not None or exited.at_us - killing < KILL_SLACK_US):
        how = "ended by" if status is not None else "gone right after"
        return True, f"{how} SIGKILL, which the manager had sent"
    if status is None:
        return _unread_status(process, stop, exited.at_us)
    return _unexplained_kill(process, exited.at_us, stop)


def _is_stop_signal(event: Event, stop: _Stop) -> bool:
    """Whether an event is a stop signal of the manager's, of either round."""
    policy = stop.record.policy
    if policy is None or not _is_managers(event, stop):
        return False
    return event.signal in (policy.kill_signal, policy.restart_kill_signal)


def _is_managers(event: Event, stop: _Stop) -> bool:
    """Whether an event is a signal of the manager's: what is concluded is about it alone."""
    if event.kind is not EventKind.SIGNAL_SENT or _is_kernels(event):
        return False
    return event.sender_pid in (None, stop.record.manager_pid)


def _seen_kill(exit_us: int, own: Iterable[Event], stop: _Stop) -> tuple[bool | None, str] | None:
    """Who sent the SIGKILL that ended a process: the first one did; None where there was none."""
    kill = next((e for e in own if is_kill(e) and e.at_us <= exit_us), None)
    if kill is None:
        return None
    if _is_kernels(kill):
        return False, "ended by the kernel's own SIGKILL"
    sender = f"{kill.sender_pid} ({kill.sender_comm or '?'})"
    if stop.record.manager_pid is None:
        return None, f"ended by SIGKILL from {sender}; which process the manager is is not known"
    if not _is_managers(kill, stop):
        return False, f"ended by SIGKILL from {sender}"
    if _was_asked_for(kill, stop):
        return False, "ended by SIGKILL, which somebody had the manager send (systemctl kill)"
    return True, "ended by SIGKILL, which the manager had sent"


def _was_asked_for(kill: Event, stop: _Stop) -> bool:
    """Whether the manager sent SIGKILL outside of every phase in which it does by itself."""
    policy = stop.record.policy
    if policy is None:
        return False
    phases = (s.at_us for s in stop.states if signal_of(policy, s.sub_state or "") == SIGKILL)
    # The manager stamps a phase when it has sent its signals.
    earliest, latest = kill.at_us - TIMER_LEAD_US, kill.at_us + KILL_SLACK_US
    in_phase = any(earliest <= at_us <= latest for at_us in phases)
    ended_us = stop.main_end_us
    of_rest = kills_rest(policy) and ended_us is not None and ended_us <= kill.at_us
    unseen = any(since <= kill.at_us <= until for since, until in stop.unseen)
    return not (in_phase or of_rest or unseen or _ran_out_before(kill.at_us, stop))


def _unexplained_kill(
    process: WatchedProcess, exit_us: int, stop: _Stop
) -> tuple[bool | None, str]:
    """A SIGKILL in no phase that was seen: states come in bursts, and some are never told."""
    policy = stop.record.policy
    if policy is None:
        return None, "ended by SIGKILL; whether the manager sent it is not known for this type"
    if _may_kill(policy, process) and _ran_out_before(exit_us, stop):
        return True, "ended by SIGKILL when the time for the stop signal had run out"
    if kills_rest(policy) and process.role is not Role.MAIN:
        return _unexplained_mixed_kill(exit_us, stop)
    if _may_kill(policy, process) and _may_be_unseen(exit_us, policy, stop):
        return None, "ended by SIGKILL while the manager was out of reach: its own or another's"
    return False, "ended by SIGKILL, but the manager was in no phase that sends it"


def _unexplained_mixed_kill(exit_us: int, stop: _Stop) -> tuple[bool | None, str]:
    """KillMode=mixed kills in a phase so short that it may not be told, after ExecStopPost=."""
    main_exit = stop.main_end_us or 0
    states = stop.states
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


def _ran_out_before(exit_us: int, stop: _Stop) -> bool:
    """Whether a phase that SIGKILL comes after had used up its time before the exit."""
    return any(
        isinstance(event.limit_us, int)
        and event.then == SIGKILL
        and exit_us >= event.at_us + event.limit_us - min(TIMER_LEAD_US, event.limit_us // 2)
        for event in stop.states
    )


def _may_be_unseen(at_us: int | None, policy: StopPolicy, stop: _Stop) -> bool:
    """Whether SIGKILL may have been sent in a phase that nobody told; None is a moment unknown.

    No phase sends it before a limit has passed since the last phase that was told.
    """
    if policy.timeout_stop_us == INFINITY:
        return False
    states = stop.states
    for since, until in stop.unseen:
        end = until if at_us is None else at_us
        told = max((s.at_us for s in states if s.at_us < since), default=stop.record.requested_us)
        due = max(told, stop.record.requested_us) + policy.timeout_stop_us - TIMER_LEAD_US
        if since <= end <= until and end >= due:
            return True
    return False


def _may_kill(policy: StopPolicy, process: WatchedProcess) -> bool:
    """Whether SIGKILL can go to this process at all, by the policy."""
    final = policy.send_sigkill and policy.final_kill_signal == SIGKILL
    return final and process.role in roles_signalled(policy, "stop-sigkill")


def _kill_before(exit_us: int, own: Iterable[Event], stop: _Stop) -> int | None:
    """When the manager's SIGKILL went to the process, if that was before its exit."""
    for event in own:
        if _is_managers_kill(event, stop):
            # The word of the phase may trail the exit it caused: the lower bound counts.
            lower = event.at_us if event.at_min_us is None else event.at_min_us
            if lower <= exit_us:
                return event.at_us
    return None


def _is_kernels(event: Event) -> bool:
    """Whether the kernel sent a signal by itself."""
    return event.source is EventSource.TRACEFS and event.sender_pid is None


def _is_managers_kill(event: Event, stop: _Stop) -> bool:
    return is_kill(event) and _is_managers(event, stop)


def _unread_status(
    process: WatchedProcess, stop: _Stop, exit_us: int | None
) -> tuple[bool | None, str]:
    """An end that nobody saw is only in doubt where the manager may have sent its SIGKILL."""
    policy = stop.record.policy
    if policy is None:
        return False, "how it ended was not seen"
    is_up = stop.record.active_state not in ENDED and not stop.record.started_again
    if exit_us is None and is_up:
        return False, "it was not seen to end; the unit is still up"
    kills = [state.at_us for state in stop.states if is_kill_phase(state.sub_state or "")]
    rest_killed = kills_rest(policy) and process.role is not Role.MAIN
    # A state that was not told can be missed, but none that was told came before its time.
    before = [at_us for at_us in kills if exit_us is None or at_us - TIMER_LEAD_US <= exit_us]
    kill_sent = bool(before) or (stop.record.result == "timeout" and not kills)
    if rest_killed or (kill_sent and _may_kill(policy, process)):
        return None, f"{UNSEEN}, and the manager may have sent it SIGKILL"
    if _may_kill(policy, process) and _may_be_unseen(exit_us, policy, stop):
        return None, f"{UNSEEN}, and the manager was out of reach"
    return False, f"{UNSEEN}, but the manager sent it no SIGKILL"


def _plain_end(status: ExitStatus | None) -> str:
    if status is None:
        return "it ended; its wait status could not be read"
    if isinstance(status, ExitSignal):
        return f"ended by {status.signal}"
    return f"exited with {status.code}"


def _ended_by(status: ExitStatus | None, signal: str) -> bool:
    return isinstance(status, ExitSignal) and status.signal == signal
