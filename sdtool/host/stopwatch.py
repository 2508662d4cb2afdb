"""One unit while it stops: its observers, what the manager says of it, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from sdtool.analysis import phases, timeline
from sdtool.errors import NoSuchUnit, SdtoolError, Unavailable
from sdtool.host.eventlog import HOLD_BACK_US, EventLog, now_us
from sdtool.host.members import Members
from sdtool.host.session import Session
from sdtool.model.manager import ConnectionLost, JobChange, MainExit, ManagerSignal, UnitChange
from sdtool.model.names import unit_path
from sdtool.model.process import ProcessRef, Role
from sdtool.model.sockets import SocketFacts
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ObserverState,
    PortChange,
    StopRecord,
    Tier,
)
from sdtool.model.unit import Unit, UnitDetails
from sdtool.sources import cgroups, sockets
from sdtool.sources.cgroups import CgroupObserver
from sdtool.sources.pidfds import PidfdObserver
from sdtool.sources.sockets import SocketObserver
from sdtool.sources.systemd import Manager

SETTLE_S = 0.25
"""How long to wait, after the job, for the last exits, reaps and destroyed sockets."""

POLL_S = 0.005

ENDED = frozenset({"inactive", "failed"})

OBSERVERS = ("pidfd", "cgroup", "sockets")


class Observer(Protocol):
    """What watches a unit: a descriptor that becomes readable, and the events behind it."""

    name: str
    available: bool
    reason: str
    lost: int

    def fileno(self) -> int:
        """Readable when there are events."""

    def read_events(self) -> tuple[Event, ...]:
        """The events since the last call."""

    def close(self) -> None:
        """Stop watching."""


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
        self._mount = session.mount
        self._manager = manager
        self._details = details
        self.along = tuple(along)
        self._along_names = tuple(watch.name for watch in along)
        self._wanted = wanted
        self._log = EventLog(unit.name)
        self._pidfds = self._make_pidfds(session)
        self._members = Members(session.mount, details, self._log, self._pidfds)
        self._observers: list[Observer] = [self._pidfds] if self._pidfds else []
        self._listeners: tuple[SocketFacts, ...] = ()
        self._active_state, self._sub_state = unit.active_state, unit.sub_state
        self._result = unit.result
        self._control_pid = self._next_control = details.control_pid
        self._main_exit: MainExit | None = None
        self._new_phases: list[Event] = []
        self._requested_us = self._ended_us = now_us()
        self._job: str | None = None
        self._ended_jobs: dict[str, str] = {}
        self._job_result: str | None = None
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

    def _make_pidfds(self, session: Session) -> PidfdObserver | None:
        return PidfdObserver(self.name, session.exit_info) if self._is_wanted("pidfd") else None

    def _is_wanted(self, switch: str) -> bool:
        return self._wanted is None or switch in self._wanted

    async def arm(self) -> None:
        """Start every observer and look at every process, before anything is asked of systemd."""
        await self._manager.ref_unit(self.name)
        group = self._details.unit.control_group
        if group is not None and self._is_wanted("cgroup"):
            self._observers.append(CgroupObserver(self.name, self._mount, group))
        if group is not None and self._is_wanted("sockets"):
            self._observers.append(self._observe_sockets(group))
        self._members.take_stock()
        for state in self._observer_states():
            text = f"{state.name}: {state.reason}"
            self._log.note(EventKind.OBSERVER, EventSource.SDTOOL, text=text)

    def _observe_sockets(self, group: str) -> SocketObserver:
        # Armed before the dump: a socket that goes between the two would never be missed.
        observer = SocketObserver(self.name)
        own = cgroups.read_tree(self._mount, group).ids or {}
        try:
            rows = sockets.read_listeners()
        except Unavailable as error:
            observer.reason = str(error)
            return observer
        self._listeners = tuple(row for row in rows if row.cgroup_id in own)
        observer.watch(self._listeners)
        return observer

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
            self._job = await self._manager.queue_job("stop", self.name, interactive=interactive)
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
        """The manager's own clock in a change of state can be ahead of the word of the job."""
        if self._answered_us is not None and at_us >= self._answered_us - HOLD_BACK_US:
            self._requested_us = min(self._requested_us, at_us)

    @property
    def queued(self) -> bool:
        """Whether the manager has said that it has a stop job for the unit."""
        return self.has_job or self._job is not None

    # While it runs ---------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """The descriptors of the observers."""
        return [observer.fileno() for observer in self._observers if observer.available]

    def read_observers(self) -> None:
        """Take the events of every observer."""
        for observer in self._observers:
            if observer.available:
                events = observer.read_events()
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

    def on_signal(self, signal: ManagerSignal) -> None:
        """Take a signal of the manager, if it is about this unit."""
        if isinstance(signal, ConnectionLost):
            self.lose_manager(signal.reason)
        elif isinstance(signal, UnitChange) and signal.unit_path == unit_path(self.name):
            self._on_change(signal)
        elif isinstance(signal, JobChange) and signal.unit == self.name:
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
        if self._pidfds is not None and self._pidfds.has_status:
            return
        self._log.note(
            EventKind.PROCESS_EXIT if self._pidfds is None else EventKind.PROCESS_REAPED,
            EventSource.DBUS,
            at_us=main.at_us,
            pid=main.pid,
            comm=self._members.name_of(main.pid),
            role=Role.MAIN,
            exit=main.exit,
        )

    def _on_state(self, at_us: int) -> None:
        policy, stopping = self.policy, phases.is_stopping(self._sub_state)
        state = self._log.note(
            EventKind.STATE,
            EventSource.DBUS,
            at_us=at_us,
            active_state=self._active_state,
            sub_state=self._sub_state,
            result=self._result,
            limit_us=phases.limit_of(policy, self._sub_state) if policy and stopping else None,
            then=phases.after_limit(policy, self._sub_state) if policy and stopping else None,
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
            since_us = self._requested_us
            if self._answered_us is not None:
                # What the first phase did came before the first word of it.
                since_us -= timeline.SIGNAL_LEAD_US
            self._log.add(*timeline.infer_phase(self.policy, state, known, events, since_us))

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

    def _end_job(self, result: str | None) -> None:
        if self._job_over.is_set():
            return
        self._job_result = result
        self._log.note(EventKind.JOB_DONE, EventSource.DBUS, result=result)
        if self._active_state not in ENDED or self._ended_us < self._requested_us:
            self._ended_us = now_us()
        self._job_over.set()

    async def check(self) -> None:
        """Make sure that the manager lives, and that the end of the job was not missed.

        Raises:
            Unavailable: The manager does not answer.
        """
        if not self.queued or self._job_over.is_set():
            return
        if self.requested and self._job is None:
            return  # our own call is still out, and has a deadline of its own
        unit = await self._read_unit()
        if self._job_over.is_set() or unit.active_state not in ENDED or unit.job is not None:
            return
        self._active_state, self._sub_state = unit.active_state, unit.sub_state
        self._result = unit.result or self._result
        lost = "the end of the job was not told, and seen only by asking"
        self._log.note(EventKind.GAP, EventSource.DBUS, text=lost)
        self._end_job(None)

    async def _read_unit(self) -> Unit:
        """The unit as it is now; one that the manager has forgotten is inactive."""
        try:
            return (await self._manager.read_unit(self.name)).unit
        except NoSuchUnit:
            return replace(self._details.unit, active_state="inactive", sub_state="dead", job=None)

    def lose_manager(self, reason: str) -> None:
        """Give up watching: without the manager's word the report would not be true."""
        if self._begun and not self._job_over.is_set():
            self.failure = Unavailable(
                f"The manager was lost while {self.name} was stopping; the stop job goes on.",
                subject=self.name,
                hint=reason,
            )
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
        unit = await self._read_unit()
        await asyncio.sleep(0)
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
        released = len(self._log.of_kind(EventKind.PORT_RELEASED)) >= len(self._listeners)
        waiting = self._members.still_watched()
        if self.policy is not None and self.policy.kill_mode in ("process", "none"):
            # The others may stay: wait only for the reaping of those that ended.
            ended = timeline.exits_by_pid(self._log.events)
            waiting = frozenset(process for process in waiting if process.pid in ended)
        return released and not waiting

    async def _look_around(self) -> None:
        """What still runs, what went down along, what can start it again."""
        if self._active_state in ENDED:
            # Where the stop was canceled or undone, what runs is no left-over.
            self._survivors = tuple(self._members.survivors())
        if self._listeners:
            present = {row.cookie for row in sockets.read_listeners()}
            self._still_held = tuple(row for row in self._listeners if row.cookie in present)
        units = await self._manager.list_named((*self._along_names, *self._details.triggered_by))
        self._still_up = frozenset(u.name for u in units if u.active_state not in ENDED)

    def record(self) -> StopRecord:
        """All that was gathered."""
        triggers = tuple(u for u in self._details.triggered_by if u in self._still_up)
        undone = self._job_result == "done" and self._active_state not in ENDED
        along = tuple(timeline.build(w.record()) for w in self.along if w.finished and w.has_job)
        return StopRecord(
            unit=self.name,
            policy=self.policy,
            observers=self._observer_states(),
            tier=Tier.C if self._pidfds is not None and self._pidfds.has_status else Tier.D,
            requested_us=self._requested_us,
            ended_us=self._ended_us,
            events=self._log.events,
            processes=self._members.known,
            survivors=self._survivors,
            job_result=self._job_result,
            result=self._result,
            active_state=self._active_state,
            released=tuple(self._port(r) for r in self._listeners if r not in self._still_held),
            held=tuple(self._port(r) for r in self._still_held),
            also_stopped=tuple(name for name in self._along_names if name not in self._still_up),
            along=along,
            # Systemd does not say which of several it was: named only where it is certain.
            reactivated_by=triggers if undone and len(triggers) == 1 else (),
            triggers_active=triggers,
            result_before=self._details.unit.result,
            already_inactive=self.already_inactive,
        )

    def _port(self, row: SocketFacts) -> PortChange:
        """A port with the time it was free at, by the kernel's notification."""
        address = (row.protocol, row.address, row.port)
        freed = self._log.of_kind(EventKind.PORT_RELEASED)
        at_us = next((e.at_us for e in freed if (e.protocol, e.address, e.port) == address), None)
        return PortChange(protocol=row.protocol, address=row.address, port=row.port, at_us=at_us)

    def _observer_states(self) -> tuple[ObserverState, ...]:
        bus = ObserverState(name="dbus", available=True, reason=self._manager.info.transport)
        watching = (
            ObserverState(name=o.name, available=o.available, reason=o.reason, lost=o.lost)
            for o in self._observers
        )
        off = (
            ObserverState(name=name, available=False, reason="switched off by --observers")
            for name in OBSERVERS
            if not self._is_wanted(name)
        )
        return (bus, *watching, *off)

    def close(self) -> None:
        """End every observer; safe to call at any moment."""
        for observer in self._observers:
            observer.close()
        self._observers.clear()
