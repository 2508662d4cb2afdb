"""Stopping a unit: the policy, the events, and the report that they add up to.

Source of the words: systemd.kill(5), systemd.service(5), org.freedesktop.systemd1(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from sdtool.model.process import Disposition, ProcessId, ProcessRef, Role

INFINITY: Final = "infinity"

Limit = int | Literal["infinity"]
"""A time limit in microseconds, or systemd's word for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopPolicy:
    """How the manager stops a unit; signals by name, times in microseconds.

    Attributes:
        exec_stop: Number of ExecStop= commands.
        exec_stop_post: Number of ExecStopPost= commands.
    """

    kill_mode: str
    kill_signal: str
    restart_kill_signal: str
    final_kill_signal: str
    watchdog_signal: str
    send_sigkill: bool
    send_sighup: bool
    timeout_stop_us: Limit
    timeout_stop_failure_mode: str
    timeout_abort_us: Limit
    exec_stop: int
    exec_stop_post: int


OBSERVERS: Final = (
    *("tracefs", "procevents", "pidfd", "pidfd-info", "cgroup", "sockets", "journal"),
)
"""What a stop is watched with, beside the manager itself, by the names that switch them off.

Without pidfd-info a pidfd tells when a process ended, but not how: as before Linux 6.15.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOptions:
    """How to stop.

    Attributes:
        deadline_s: Seconds after which the watch is given up; None waits as long as systemd may
            take by its own limits, which can be for ever.
        force: Stop critical units too.
        interactive: Let polkit ask a person, where its rules want that.
        observers: Names of ``OBSERVERS``, those to watch with; None for all.
    """

    deadline_s: float | None = None
    force: bool = False
    interactive: bool = False
    observers: frozenset[str] | None = None


class Evidence(StrEnum):
    """Whether an event was seen, or concluded from what was seen."""

    OBSERVED = "observed"
    INFERRED = "inferred"


class EventSource(StrEnum):
    """Who told us."""

    DBUS = "dbus"
    TRACEFS = "tracefs"
    PROCEVENTS = "procevents"
    PIDFD = "pidfd"
    CGROUP = "cgroup"
    SOCKETS = "sockets"
    JOURNAL = "journal"
    SDTOOL = "sdtool"


class EventKind(StrEnum):
    """What happened."""

    OBSERVER = "observer"
    JOB_NEW = "job-new"
    JOB_DONE = "job-done"
    STATE = "state"
    CONTROL_START = "control-start"
    CONTROL_EXIT = "control-exit"
    SIGNAL_SENT = "signal-sent"
    SIGNAL_DELIVERED = "signal-delivered"
    SIGNAL_IGNORED = "signal-ignored"
    PROCESS_NEW = "process-new"
    PROCESS_EXEC = "process-exec"
    PROCESS_EXIT = "process-exit"
    PROCESS_REAPED = "process-reaped"
    TIMEOUT = "timeout"
    LEFTOVER = "leftover"
    PORT_RELEASED = "port-released"
    CGROUP_EMPTY = "cgroup-empty"
    CGROUP_POPULATED = "cgroup-populated"
    CGROUP_REMOVED = "cgroup-removed"
    GAP = "gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCode:
    """The process called exit(3)."""

    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitSignal:
    """A signal ended the process; ``core`` says whether it dumped core."""

    signal: str
    core: bool


ExitStatus = ExitCode | ExitSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class StopCommand:
    """A command that the manager runs when a unit stops, and how its last run went.

    Attributes:
        setting: Where it stands: ExecStop, ExecStopPost, ExecStopPre.
        argv: As the manager has it, before its specifiers and variables are put in.
        pid: Of its last run; None when it never ran.
        started_us: When that began.
        ended_us: When it was over; None while it runs.
        exit: How it ended; None while it runs.
    """

    setting: str
    argv: tuple[str, ...]
    pid: int | None
    started_us: int | None
    ended_us: int | None
    exit: ExitStatus | None


class SignalResult(StrEnum):
    """What the kernel did with a signal when it was sent, in its own words (TRACE_SIGNAL_*).

    It ignores a signal that the process ignores, and one to a process that is on its way to its
    end; only of the former there is an event ``signal-ignored``. lose_info is delivered, without
    a word from whom.
    """

    DELIVERED = "delivered"
    IGNORED = "ignored"
    ALREADY_PENDING = "already_pending"
    OVERFLOW_FAIL = "overflow_fail"
    LOSE_INFO = "lose_info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened while a unit was stopping.

    Only the fields that its kind needs are set; None in one of those means not known.

    Attributes:
        at_us: When; for an inferred event the moment within its bounds that fits the others.
        at_min_us: The earliest moment of an inferred event, or of one that was seen late; the
            beginning of a gap; else None.
        at_max_us: The latest moment of those; the end of a gap; else None.
        start_ticks: With the pid the identity of the process, as in ``WatchedProcess``.
        sender_pid: Who sent a signal; None where that was not seen, or the kernel did by itself,
            which ``source`` tells apart.
        exit: The wait status; None while it is not known, and ``text`` says why.
        result: Of the unit or its job, in systemd's word; of a signal a ``SignalResult``, None
            where that was not seen.
        limit_us: How long the manager waits in the phase of a state event; of a gap, how long
            from now on in the phase that it came upon.
        then: What the manager does when that limit passes: a signal, or "giving up".
        text: What no other field says.
    """

    unit: str
    at_us: int
    kind: EventKind
    source: EventSource
    evidence: Evidence = Evidence.OBSERVED
    at_min_us: int | None = None
    at_max_us: int | None = None
    pid: int | None = None
    start_ticks: int | None = None
    comm: str | None = None
    role: Role | None = None
    signal: str | None = None
    sender_pid: int | None = None
    sender_comm: str | None = None
    exit: ExitStatus | None = None
    active_state: str | None = None
    sub_state: str | None = None
    result: str | None = None
    protocol: str | None = None
    address: str | None = None
    port: int | None = None
    limit_us: Limit | None = None
    then: str | None = None
    text: str | None = None

    @property
    def process(self) -> ProcessId | None:
        """The process that it happened to, None where it is of none."""
        if self.pid is None:
            return None
        return ProcessId(pid=self.pid, start_ticks=self.start_ticks or 0)


class Verdict(StrEnum):
    """How a stop went; the worst that is true. The order is that of the severity."""

    LEFTOVER = "leftover"
    KILLED = "killed"
    FAILED = "failed"
    UNKNOWN = "unknown"
    CLEAN = "clean"


class Tier(StrEnum):
    """How much of a stop could be observed, from the kernel's own record (A) to D-Bus (D)."""

    A = "A"
    B = "B"
    C = "C"
    D = "D"

    @property
    def gives(self) -> str:
        """What is observed in it, in a few words."""
        return {
            Tier.A: "every signal that can end a process, with its sender; every birth and end",
            Tier.B: "every birth and end with its wait status; signals are inferred",
            Tier.C: "ends with their wait status; signals are inferred",
            Tier.D: "ends; of main and control processes the wait status; signals are inferred",
        }[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverState:
    """One observer of a stop.

    Attributes:
        reason: What it gave, or why it was not available.
        lost: Events that it knows it lost.
    """

    name: str
    available: bool
    reason: str
    lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PortChange:
    """A listening port of the unit.

    Attributes:
        at_us: When it was free, by the kernel's notification; None while it is taken, or when
            no notification came (it is free all the same when it stands among the released).
    """

    protocol: str
    address: str
    port: int
    at_us: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedProcess:
    """A process that was in the unit at some moment of the stop.

    Attributes:
        start_ticks: Its start time, by when it was born, maybe a tick off, where it was gone
            before anybody could read it; 0 where that is not known either.
        comm: Its name; "?" where nobody could read that.
        disposition: As predicted before the stop; unknown for one born during it.
        disposition_reason: Which bits say so, or why it is not known.
        seen_us: When it was first seen; None when it was there before the stop.
        has_left: It was moved out of the unit: what became of it is not of this stop.
    """

    pid: int
    start_ticks: int
    comm: str
    role: Role
    disposition: Disposition
    disposition_reason: str
    seen_us: int | None
    has_left: bool = False

    @property
    def id(self) -> ProcessId:
        """What tells it apart from another one that has had its pid."""
        return ProcessId(pid=self.pid, start_ticks=self.start_ticks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRecord:
    """All that was gathered while one unit stopped; ``timeline.build`` makes the report of it.

    Attributes:
        ended_us: When the job was done and the cgroup gone or its left-overs listed.
        survivors: Processes of the unit that run after the stop.
        released: Its listening ports that are free now.
        held: Its listening ports that are still taken.
        along: How the units went down that were pulled along.
        job_result: systemd's word for how the job ended.
        job_result_reason: Why that is not known; None when it is known, or there was no job.
        result: The unit's Result=.
        result_reason: Why that is not known; None when it is known, or the type has none.
        started_again: It runs anew: the stop was over, whatever became of the job.
        result_before: The result that stood before the stop.
        already_inactive: There was nothing to stop.
        unread_reason: What could not be read after the stop, and why; None when all was read.
        last_state_read: The state is what the manager says after the job, not only the last
            that it told.
        lost_along: Units on their way down along, of which nobody knows what became of them.
        manager_pid: The process of the manager; None when that is not known.
        commands: Those that ran in this stop, as the manager tells it.
    """

    unit: str
    policy: StopPolicy | None
    observers: tuple[ObserverState, ...]
    tier: Tier
    requested_us: int
    ended_us: int
    events: tuple[Event, ...]
    processes: tuple[WatchedProcess, ...]
    survivors: tuple[WatchedProcess, ...]
    job_result: str | None
    result: str | None
    active_state: str
    released: tuple[PortChange, ...]
    held: tuple[PortChange, ...]
    also_stopped: tuple[str, ...]
    reactivated_by: tuple[str, ...]
    triggers_active: tuple[str, ...] = ()
    along: tuple[StopReport, ...] = ()
    job_result_reason: str | None = None
    result_reason: str | None = None
    started_again: bool = False
    result_before: str | None = None
    already_inactive: bool = False
    unread_reason: str | None = None
    last_state_read: bool = True
    lost_along: tuple[str, ...] = ()
    manager_pid: int | None = None
    commands: tuple[StopCommand, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFate:
    """What became of one process of the unit.

    Attributes:
        disposition: What the stop signal would do to it, as predicted before the stop.
        disposition_reason: Which bits said so, or why it was not known.
        as_predicted: Whether the signal did that; None where nothing was predicted, the signal
            did not come to it, or what it did could not be seen.
        signalled_us: When the stop signal was sent to it (the latest moment, when inferred).
        exit: None when it did not end, or its wait status could not be read.
        killed_by_manager: The manager's SIGKILL ended it; None when that is not known.
        fate_reason: The evidence, in words.
    """

    pid: int
    start_ticks: int
    comm: str
    role: Role
    disposition: Disposition
    disposition_reason: str
    as_predicted: bool | None
    signalled_us: int | None
    exit_us: int | None
    exit: ExitStatus | None
    killed_by_manager: bool | None
    fate_reason: str

    @property
    def id(self) -> ProcessId:
        """What tells it apart from another one that has had its pid."""
        return ProcessId(pid=self.pid, start_ticks=self.start_ticks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReport:
    """How a stop went, with its evidence.

    Attributes:
        duration_us: From the request to the end of the job.
        events: Sorted by ``at_us``.
        job_result: systemd's word for the job; "done" even for a stop that ended in SIGKILL.
        job_result_reason: Why that is not known; None when it is known, or there was no job.
        result: The unit's Result= after the stop.
        result_reason: Why that is not known; None when it is known, or the type has none.
        commands: What ran in ExecStop= and ExecStopPost=, in that order.
        killed: Pids that the manager SIGKILLed.
        verdict: The worst that is true of the unit and of those that went down along.
        also_stopped: Units that went down along, through dependencies.
        along: Their own reports.
        reactivated_by: Units that started this one again.
        triggers_active: Units that can still start it again (its .socket, .path or .timer).
        unread_reason: What could not be read after the stop, and why, so that it is missing
            here; None when all was read.
    """

    unit: str
    policy: StopPolicy | None
    tier: Tier
    observers: tuple[ObserverState, ...]
    requested_us: int
    duration_us: int
    events: tuple[Event, ...]
    job_result: str | None
    job_result_reason: str | None
    result: str | None
    result_reason: str | None
    active_state: str
    verdict: Verdict
    verdict_reason: str
    processes: tuple[ProcessFate, ...]
    commands: tuple[StopCommand, ...]
    killed: tuple[int, ...]
    also_stopped: tuple[str, ...]
    reactivated_by: tuple[str, ...]
    triggers_active: tuple[str, ...]
    along: tuple[StopReport, ...]
    leftovers: tuple[ProcessRef, ...]
    ports_released: tuple[PortChange, ...]
    ports_held: tuple[PortChange, ...]
    unread_reason: str | None
