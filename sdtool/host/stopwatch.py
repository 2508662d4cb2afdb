"""One unit while it stops: its observers, what the manager says of it, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from sdtool.analysis import phases, timeline
from sdtool.analysis.events import SIGNAL_LEAD_US, exits_by_pid
from sdtool.errors import NoSuchUnit, SdtoolError, Unavailable
from sdtool.host.eventlog import HOLD_BACK_US, EventLog, now_us
from sdtool.host.members import Members
from sdtool.host.observers import OBSERVERS as OBSERVERS
from sdtool.host.observers import Observers
from sdtool.host.session import Session
from sdtool.model.manager import JobChange, MainExit, ManagerGap, UnitChange
from sdtool.model.process import ProcessRef, Role
from sdtool.model.sockets import SocketFacts
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    Evidence,
    ObserverState,
    PortChange,
    StopPolicy,
    StopRecord,
    Tier,
    WatchedProcess,
)
from sdtool.model.unit import UnitDetails
from sdtool.sources.systemd import Manager

SETTLE_S = 0.25
"""How long to wait, after the job, for the last exits, reaps and destroyed sockets."""

POLL_S = 0.005

ASK_AGAIN = 3
"""How often a stop is asked for anew when the manager was lost before it had answered."""

ENDED = frozenset({"inactive", "failed"})

LOST_JOB = "lost"
"""Stands for the path of a job that was over before its path was known."""

UNTOLD_END = "the manager was out of reach when the job ended"

State = tuple[UnitDetails, UnitChange]
"""A unit as the manager tells it now."""


class StopWatch:
    """Everything about the stop of one unit; armed before the job, closed after it.

    Args:
        along: Watches of the active units that will go down with it.
        wanted: Names of ``OBSERVERS`` to use; None for all.
    """

    def __init__(
        self,
        session: Session,
        manager: Manager,
        details: UnitDetails,
        along: Sequence[StopWatch],
        wanted: frozenset[str] | None,
    ) -> None:
        unit = details.unit
        self.name = unit.name
        self.policy = details.policy
        self.failure: SdtoolError | None = None
        self._manager = manager
        self._details = details
        self.along = tuple(along)
        self._along_names = tuple(watch.name for watch in along)
        self._log = EventLog(unit.name)
        self._observers = Observers(unit.name, session, wanted)
        self._members = Members(session.mount, details, self._log, self._observers.pidfds)
        self._active_state, self._sub_state = unit.active_state, unit.sub_state
        self._state_us = 0
        self._result = unit.result
        self._result_reason: str | None = None
        self._control_pid = self._next_control = details.control_pid
        self._main_exit: MainExit | None = None
        self._new_phases: list[Event] = []
        self._requested_us = self._ended_us = now_us()
        self._job: str | None = None
        self._ended_jobs: dict[str, str] = {}
        self._job_result: str | None = None
        self._job_result_reason: str | None = None
        self._started_again = False
        self._job_over = asyncio.Event()
        self._crash: BaseException | None = None
        self._survivors: tuple[ProcessRef, ...] = ()
        self._still_held: tuple[SocketFacts, ...] = ()
        self._still_up: frozenset[str] = frozenset()
        self._begun = False
        self._awaits_job = False
        self._answered_us: int | None = None
        self.requested = False
        self.has_job = False
        self.already_inactive = unit.active_state in ENDED and unit.control_group is None
        self.finished = self.already_inactive

    def leave_out(self, names: Collection[str]) -> None:
        """Leave units that go down along to the watches that they have elsewhere."""
        for watch in self.along:
            if watch.name in names:
                watch.close()
        self.along = tuple(watch for watch in self.along if watch.name not in names)

    # Before the job --------------------------------------------------------------------------

    async def arm(self) -> None:
        """Start every observer and look at every process, before anything is asked of systemd."""
        await self.hold()
        self._observers.arm(self._details.unit.control_group)
        self._members.take_stock()
        for state in self._observer_states():
            text = f"{state.name}: {state.reason}"
            self._log.note(EventKind.OBSERVER, EventSource.SDTOOL, text=text)

    async def hold(self) -> None:
        """Keep the manager from forgetting the unit, where it permits that."""
        await self._manager.ref_unit(self.name)

    def begin(self, *, after_question: bool = False) -> None:
        """From now on what is seen belongs to the stop: it may come with that of another unit.

        Args:
            after_question: A person is asked first: the stop begins with its job.
        """
        self._requested_us = now_us()
        self._begun = True
        self._awaits_job = after_question

    async def request(self, *, interactive: bool) -> None:
        """Queue the stop job; a refusal becomes the ``failure``."""
        self.requested = True
        try:
            self._job = await self._queue_job(interactive=interactive)
        except SdtoolError as error:
            self._begun = False
            self.failure = error
            return
        self.failure = None
        self._begin_with_job()
        # The job can be over before its path is in our hands.
        if self._job in self._ended_jobs:
            self._end_job(self._ended_jobs[self._job])

    def _begin_with_job(self) -> None:
        """Let the stop begin with the word of its job, not when the person was asked.

        The word takes a moment to reach us: what was seen in that moment can be the job's own.
        """
        if not self._awaits_job:
            return
        self._awaits_job, self._answered_us = False, now_us()
        earliest = self._answered_us - HOLD_BACK_US
        recent = [e.at_us for e in self._log.events if e.at_us >= earliest]
        self._requested_us = max(self._requested_us, min([*recent, self._answered_us]))

    def _begin_with_state(self, at_us: int) -> None:
        """The manager's own clock in a change of state can be ahead of the word of the job.

        What the first phase did came before the first word of it, and the job before that.
        """
        if self._answered_us is not None and at_us >= self._answered_us - HOLD_BACK_US:
            self._requested_us = min(self._requested_us, at_us - SIGNAL_LEAD_US)

    @property
    def queued(self) -> bool:
        """Whether the manager has said that it has a stop job for the unit."""
        return self.has_job or self._job is not None

    async def _queue_job(self, *, interactive: bool) -> str:
        """Queue the job; where the answer was lost look first, and ask again only if need be."""
        job = await self._manager.queue_job("stop", self.name, interactive=interactive)
        for _ in range(ASK_AGAIN):
            if job is not None:
                return job
            try:
                state = await self.read_state()
            except Unavailable as error:
                sentence = f"The manager was lost when {self.name} was to be stopped"
                hint = f"whether the job was queued is not known: {error}"
                raise Unavailable(f"{sentence}.", subject=self.name, hint=hint) from error
            unit, path = (state[0].unit, state[0].job_path) if state is not None else (None, None)
            if unit is not None and unit.job == "stop" and path is not None:
                return path
            if unit is None or unit.job is not None or unit.active_state in ENDED:
                self._job = LOST_JOB
                gap = ManagerGap(
                    since_us=self._requested_us, until_us=now_us(), reason="the answer was lost"
                )
                self.resync(state, gap, told=False)
                return LOST_JOB
            # No job of ours: the unit may be going down all the same, and a job then joins in.
            job = await self._manager.queue_job("stop", self.name, interactive=interactive)
        if job is None:
            raise Unavailable(
                f"The manager was lost each time that {self.name} was to be stopped.",
                subject=self.name,
            )
        return job

    # While it runs ---------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """The descriptors of the observers."""
        return self._observers.filenos()

    def read_observers(self) -> None:
        """Take the events of every observer."""
        for events in self._observers.read_events():
            self._log.add(*events)
            if any(event.role is Role.MAIN for event in events):
                # KillMode=mixed ends the rest within a millisecond: see who that is.
                self._members.rescan()

    def on_tick(self) -> None:
        """Look for new processes and for exits that nobody reaps."""
        self.read_observers()
        if self._begun and not self._job_over.is_set():
            self._members.rescan()

    def take_events(self, until_us: int) -> list[Event]:
        """What happened until then, with what can be concluded from it."""
        self._infer_phases(until_us)
        return self._log.take(until_us)

    def on_signal(self, signal: UnitChange | JobChange) -> None:
        """Take a signal of the manager about this unit."""
        if isinstance(signal, UnitChange):
            self._on_change(signal)
        else:
            self._on_job(signal)

    def _on_change(self, change: UnitChange) -> None:
        """The Service part of a change comes first and the Unit part, with the state, second."""
        self._result = change.result or self._result
        if change.main_exit is not None and self._main_exit is None:
            self._on_main_exit(change.main_exit)
        if change.control_pid is not None:
            self._next_control = change.control_pid or None
        if change.sub_state is None or change.active_state is None:
            return
        if (change.active_state, change.sub_state) != (self._active_state, self._sub_state):
            self._active_state, self._sub_state = change.active_state, change.sub_state
            self._on_state(change.changed_us or now_us())
        if self._next_control != self._control_pid:
            self._control_pid = self._next_control
            self._members.follow_control(self._control_pid)

    def _on_main_exit(self, main: MainExit) -> None:
        """The manager's word on its main process, where no pidfd tells its wait status."""
        if not self._begun or main.pid != self._details.unit.main_pid:
            return
        self._main_exit = main
        if self._observers.tier is Tier.C:
            return
        pidfds = self._observers.pidfds
        self._log.note(
            EventKind.PROCESS_EXIT if pidfds is None else EventKind.PROCESS_REAPED,
            EventSource.DBUS,
            at_us=main.at_us,
            pid=main.pid,
            comm=self._members.name_of(main.pid),
            role=Role.MAIN,
            exit=main.exit,
        )

    def _on_state(self, at_us: int, **bounds: Any) -> None:
        policy, stopping = self.policy, phases.is_stopping(self._sub_state)
        self._state_us = at_us
        state = self._log.note(
            EventKind.STATE,
            EventSource.DBUS,
            at_us=at_us,
            active_state=self._active_state,
            sub_state=self._sub_state,
            result=self._result,
            limit_us=phases.limit_of(policy, self._sub_state) if policy and stopping else None,
            then=phases.after_limit(policy, self._sub_state) if policy and stopping else None,
            **bounds,
        )
        if self._begun:
            self._begin_with_state(at_us)
            self._new_phases.append(state)
            if self._active_state in ENDED:
                self._ended_us = at_us
            elif self._active_state != "deactivating":
                self._members.stop_adopting()
        self._members.rescan()

    def _infer_phases(self, until_us: int) -> None:
        """Conclude what the manager did in each new phase, once its first exits are known."""
        ready = [state for state in self._new_phases if state.at_us <= until_us]
        self._new_phases = [state for state in self._new_phases if state.at_us > until_us]
        if self.policy is None:
            return
        for state in ready:
            known, events = self._members.known, self._log.events
            self._log.add(
                *timeline.infer_phase(self.policy, state, known, events, self._requested_us)
            )

    def _on_job(self, change: JobChange) -> None:
        if not self._begun:
            return
        if change.result is None:
            self.has_job = True
            self._begin_with_job()
            self._log.note(EventKind.JOB_NEW, EventSource.DBUS)
        elif self._job is None and self.requested:
            self._ended_jobs[change.job] = change.result
        elif self._job is None:
            # Nobody asked for this one by itself: another unit pulls it along.
            self._end_job(change.result)
        elif change.job == self._job:
            self._end_job(change.result)

    def _end_job(self, result: str | None, *, since_us: int | None = None) -> None:
        """Take the end of the job, which was told just now or fell into the time since then."""
        if self._job_over.is_set():
            return
        self._job_result = result
        if since_us is None:
            self._log.note(EventKind.JOB_DONE, EventSource.DBUS, result=result)
        else:
            self._log.note(
                EventKind.JOB_DONE,
                EventSource.DBUS,
                at_us=since_us,
                evidence=Evidence.INFERRED,
                at_min_us=since_us,
                at_max_us=now_us(),
            )
        if self._started_again:
            # It had ended by then; when it did was not told.
            self._ended_us = self._state_us
        elif self._active_state not in ENDED or self._ended_us < self._requested_us:
            self._ended_us = now_us()
        self._job_over.set()

    # When the manager was out of reach -------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the job is over, or the watch was given up."""
        return self._job_over.is_set() or self.failure is not None

    @property
    def is_waiting(self) -> bool:
        """Whether the end of a job is awaited."""
        return self._begun and not self.is_over and self.queued

    async def read_state(self) -> State | None:
        """The unit as the manager tells it now; None when it has forgotten it.

        Raises:
            Unavailable: The manager does not answer.
        """
        try:
            details, change = await self._manager.read_state(self.name)
        except NoSuchUnit:
            return None
        # Where there is a file the question itself has loaded it anew, without a past.
        fresh = details.unit.active_state == "inactive" and not change.changed_us
        return None if fresh else (details, change)

    def resync(self, state: State | None, gap: ManagerGap, *, told: bool) -> None:
        """Take what the manager says now for what it would have told meanwhile.

        Args:
            told: The gap is an event of its own; else only where the end of the job fell into it.
        """
        if self.is_over:
            return
        if told:
            self._note_gap(gap, state[0].policy if state is not None else None)
        if state is None:
            self._forget(gap)
        else:
            details, change = state
            if (change.changed_us or 0) < self._state_us:
                # A signal that was sent after this answer has overtaken it.
                change = replace(change, active_state=None)
            self._on_change(change)
            same = details.unit.invocation_id == self._details.unit.invocation_id
            self._started_again = not same and details.unit.active_state not in ENDED
        if self._is_job_gone(state[0] if state is not None else None):
            self._job_result_reason = UNTOLD_END
            if not told:
                self._note_gap(gap, None)
            self._end_job(None, since_us=max(gap.since_us, self._state_us))

    def _note_gap(self, gap: ManagerGap, policy: StopPolicy | None) -> None:
        """Tell the gap, and what a reload has changed for the phase that it came upon."""
        changed = policy is not None and policy != self.policy
        stopping = changed and phases.is_stopping(self._sub_state)
        self.policy = policy if changed else self.policy
        self._log.note(
            EventKind.GAP,
            EventSource.SDTOOL,
            at_us=gap.until_us,
            at_min_us=gap.since_us,
            at_max_us=gap.until_us,
            text=f"{gap.reason}; the stop policy changed" if changed else gap.reason,
            sub_state=self._sub_state if stopping else None,
            limit_us=phases.limit_of(policy, self._sub_state) if policy and stopping else None,
            then=phases.after_limit(policy, self._sub_state) if policy and stopping else None,
        )

    def _forget(self, gap: ManagerGap) -> None:
        """The manager knows the unit no more: it became inactive, at an unknown moment."""
        if self._active_state in ENDED:
            return
        self._active_state, self._sub_state = "inactive", "dead"
        if self._details.collect_mode == "inactive":
            # A unit that had failed would have been kept.
            self._result = "success"
        else:
            self._result = None
            self._result_reason = "the manager forgot the unit while it was out of reach"
        ends = (EventKind.PROCESS_EXIT, EventKind.CGROUP_EMPTY, EventKind.CGROUP_REMOVED)
        last = max((e.at_us for e in self._log.events if e.kind in ends), default=gap.since_us)
        self._on_state(
            min(max(last, gap.since_us), gap.until_us),
            evidence=Evidence.INFERRED,
            at_min_us=gap.since_us,
            at_max_us=gap.until_us,
        )

    def _is_job_gone(self, details: UnitDetails | None) -> bool:
        """Whether the job that is awaited is over, though nobody told its end."""
        if not self._begun or (self.requested and self._job is None):
            return False
        job = details.unit.job if details is not None else None
        if not self.requested and not self.has_job:
            # One that goes down along: its job may have come, and gone, unseen.
            self.has_job = job == "stop" or self._active_state in ENDED
            return self.has_job and job != "stop"
        if self._job is None:
            return job != "stop"
        return details is None or details.job_path != self._job

    def lose_manager(self, reason: str) -> None:
        """Give up watching: without the manager's word the report would not be true."""
        if not self._begun or self._job_over.is_set():
            return
        sentence = f"The manager was lost while {self.name} was stopping; the stop job goes on."
        if not self.requested and not self.has_job:
            sentence = f"The manager was lost before {self.name} was asked to stop."
        self.failure = Unavailable(sentence, subject=self.name, hint=reason)
        self._job_over.set()

    def crash(self, error: BaseException) -> None:
        """End the wait with a bug of ours; it comes out of ``wait_for_end``."""
        self._crash = error
        self._job_over.set()

    # After the job ---------------------------------------------------------------------------

    async def wait_for_end(self) -> None:
        """Wait for the job, then for the last exits, and look at what stayed.

        Returns at once for a unit whose stop was refused.
        """
        if not self._begun:
            return
        await self._job_over.wait()
        if self._crash is not None:
            raise self._crash
        if self.failure is not None:
            return
        try:
            await self._settle()
            await self._wait_for_along()
            await self._look_around()
        except SdtoolError as error:
            self.failure = error
            return
        self._infer_phases(now_us())
        self.finished = True

    async def _wait_for_along(self) -> None:
        """Wait for those that are on their way down; no job by now means that they stay."""
        for watch in self.along:
            if watch.has_job:
                await watch.wait_for_end()

    async def _settle(self) -> None:
        """Until all that was watched has ended and been freed, at most a quarter of a second.

        A round trip first: it brings every signal that the manager sent before its answer.
        """
        state = await self.read_state()
        await asyncio.sleep(0)
        forgotten = replace(self._details.unit, active_state="inactive", sub_state="dead")
        unit = state[0].unit if state is not None else forgotten
        if unit.active_state != "inactive" or self._active_state not in ENDED:
            # A unit that failed and was forgotten reads as inactive: the signal's word stays.
            self._active_state, self._sub_state = unit.active_state, unit.sub_state
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self.read_observers()
            if self._is_settled():
                return
            await asyncio.sleep(POLL_S)

    def _is_settled(self) -> bool:
        ports = len(self._observers.listeners)
        released = len(self._log.of_kind(EventKind.PORT_RELEASED)) >= ports
        waiting = self._members.still_watched()
        if self.policy is not None and self.policy.kill_mode in ("process", "none"):
            # The others may stay: wait only for the reaping of those that ended.
            ended = exits_by_pid(self._log.events)
            waiting = frozenset(process for process in waiting if process.pid in ended)
        return released and not waiting

    async def _look_around(self) -> None:
        """What still runs, what went down along, what can start it again."""
        if self._active_state in ENDED:
            # Where the stop was canceled or undone, what runs is no left-over.
            self._survivors = tuple(self._members.survivors())
        self._still_held = self._observers.read_held()
        units = await self._manager.list_named((*self._along_names, *self._details.triggered_by))
        self._still_up = frozenset(u.name for u in units if u.active_state not in ENDED)

    def record(self) -> StopRecord:
        """All that was gathered."""
        triggers = tuple(u for u in self._details.triggered_by if u in self._still_up)
        done = self._job_result == "done" or self._started_again
        undone = done and self._active_state not in ENDED
        listeners = self._observers.listeners
        along = tuple(timeline.build(w.record()) for w in self.along if w.finished and w.has_job)
        return StopRecord(
            unit=self.name,
            policy=self.policy,
            observers=self._observer_states(),
            tier=self._observers.tier,
            requested_us=self._requested_us,
            ended_us=self._ended_us,
            events=self._log.events,
            processes=self._own_processes(),
            survivors=self._survivors,
            job_result=self._job_result,
            job_result_reason=self._job_result_reason,
            result=self._result,
            result_reason=self._result_reason,
            started_again=self._started_again,
            active_state=self._active_state,
            released=tuple(self._port(r) for r in listeners if r not in self._still_held),
            held=tuple(self._port(r) for r in self._still_held),
            also_stopped=tuple(name for name in self._along_names if name not in self._still_up),
            along=along,
            # Systemd does not say which of several it was: named only where it is certain.
            reactivated_by=triggers if undone and len(triggers) == 1 else (),
            triggers_active=triggers,
            result_before=self._details.unit.result,
            already_inactive=self.already_inactive,
        )

    def _own_processes(self) -> tuple[WatchedProcess, ...]:
        """Those of this stop; a unit that was started again unseen has new ones already."""
        known = self._members.known
        if not self._started_again:
            return known
        return tuple(p for p in known if p.seen_us is None or p.seen_us < self._state_us)

    def _port(self, row: SocketFacts) -> PortChange:
        """A port with the time it was free at, by the kernel's notification."""
        address = (row.protocol, row.address, row.port)
        freed = self._log.of_kind(EventKind.PORT_RELEASED)
        at_us = next((e.at_us for e in freed if (e.protocol, e.address, e.port) == address), None)
        return PortChange(protocol=row.protocol, address=row.address, port=row.port, at_us=at_us)

    def _observer_states(self) -> tuple[ObserverState, ...]:
        bus = ObserverState(name="dbus", available=True, reason=self._manager.info.transport)
        return (bus, *self._observers.states())

    def close(self) -> None:
        """End every observer; safe to call at any moment."""
        self._observers.close()
