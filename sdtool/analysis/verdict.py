"""How did a stop go, in one word: the worst that is true of the unit and of what it pulled along?

systemd's own words do not say it: the job of a stop that ended in SIGKILL is "done".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sdtool.analysis.events import is_kill
from sdtool.analysis.phases import ENDED, kills_rest
from sdtool.model.stop import EventKind, ProcessFate, StopRecord, Verdict

FAILED_JOBS = frozenset(
    {"canceled", "timeout", "failed", "dependency", "skipped", "invalid", "assert"}
    | {"unsupported", "collected", "once", "frozen", "concurrency"}
)


def judge(record: StopRecord, fates: Sequence[ProcessFate]) -> tuple[Verdict, str]:
    """The verdict of the unit, or the worse one of a unit that it pulled along."""
    verdict, reason = _judge_one(record, fates)
    order = list(Verdict)
    for other in record.along:
        if order.index(other.verdict) < order.index(verdict):
            verdict = other.verdict
            reason = f"{other.unit}, which went down along: {other.verdict_reason}"
    return verdict, reason


def _judge_one(record: StopRecord, fates: Sequence[ProcessFate]) -> tuple[Verdict, str]:
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
    return Verdict.CLEAN, _clean_reason(record, fates)


def _killed_reason(record: StopRecord, killed: Sequence[ProcessFate]) -> str:
    names = _names((fate.pid, fate.comm) for fate in killed)
    if record.policy and kills_rest(record.policy) and record.result == "success":
        return f"{names} got SIGKILL and no stop signal: KillMode=mixed ends the rest so."
    ids = {fate.id for fate in killed}
    kills = [e.at_us for e in record.events if e.process in ids and is_kill(e)]
    last = max(kills, default=record.ended_us)
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
    failed = record.active_state == "failed" and not record.started_again
    if not failed and record.result == record.result_before:
        # What it failed of before the stop (in auto-restart, say) is not the stop's.
        return None
    if record.result not in (None, "success"):
        return f"The unit ended with Result={record.result}."
    if failed:
        return "The unit ended in the state failed."
    return None


def _is_up(record: StopRecord) -> bool:
    return record.active_state not in ENDED


def _unknown(record: StopRecord, fates: Sequence[ProcessFate]) -> str | None:
    if not record.last_state_read and _is_up(record):
        return f"It was {record.active_state} when it was last heard of: {record.unread_reason}."
    if record.lost_along:
        return f"Not all that went down along was seen to its end: {record.unread_reason}."
    if record.result_reason is not None:
        return f"Whether it failed is not known: {record.result_reason}."
    hidden = [fate for fate in fates if fate.killed_by_manager is None]
    if hidden:
        names = _names((fate.pid, fate.comm) for fate in hidden)
        return f"How {names} ended was not observable: {hidden[0].fate_reason}."
    return None


def _clean_reason(record: StopRecord, fates: Sequence[ProcessFate]) -> str:
    left = [(process.pid, process.comm) for process in record.processes if process.has_left]
    moved = f" {_names(left)} {_were(len(left))} moved out of the unit before." if left else ""
    ended = len(fates) - len(left)
    if not fates:
        return "It had no processes."
    if ended == 0:
        return f"Nothing was left in it to be ended.{moved}"
    if ended == 1:
        one = "The process ended without a SIGKILL of systemd's, and nothing stayed behind."
        return one + moved
    count = f"All {ended} processes"
    return f"{count} ended, none by a SIGKILL of systemd's, and nothing stayed behind.{moved}"


def _names(processes: Iterable[tuple[int, str]]) -> str:
    named = [f"{pid} ({comm})" for pid, comm in processes]
    shown = ", ".join(named[:3])
    return shown if len(named) <= 3 else f"{shown} and {len(named) - 3} more"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _verb(count: int) -> str:
    return "runs" if count == 1 else "run"
