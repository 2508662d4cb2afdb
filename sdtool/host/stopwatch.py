"""One unit while it stops: its observers, the events they bring, and what is known of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from sdtool.analysis import membership, phases, timeline
from sdtool.analysis.signals import predict
from sdtool.errors import SdtoolError, Unavailable
from sdtool.model.manager import ConnectionLost, JobChange, MainExit, ManagerSignal, UnitChange
from sdtool.model.names import unit_path
from sdtool.model.process import Disposition, ProcessFacts, ProcessId, ProcessRef, Role
from sdtool.model.sockets import SocketFacts
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ObserverState,
    PortChange,
    StopPolicy,
    StopRecord,
    Tier,
    WatchedProcess,
)
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups, processes, sockets
from sdtool.sources.cgroups import CgroupMount, CgroupObserver
from sdtool.sources.pidfds import (
    PidfdObserver,
    make_room_for_descriptors,
    probe_exit_info,
)
from sdtool.sources.sockets import SocketObserver
from sdtool.sources.systemd import Manager

HOLD_BACK_US = 50_000
"""Events are handed on this late, so that those of slower sources can be sorted in."""

SETTLE_S = 0.25
"""How long to wait, after the job, for the last exits, reaps and destroyed sockets."""

POLL_S = 0.005

OnEvents = Callable[[tuple[Event, ...]], None]

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
    """Everything about the stop of one unit; armed before the job, closed after it."""

    def __init__(
        self,
        mount: CgroupMount,
        manager: Manager,
        details: UnitDetails,
        along: tuple[UnitDetails, ...],
        wanted: frozenset[str] | None,
    ) -> None:
        self.name = details.unit.name
        self.policy = details.policy
        self.failure: SdtoolError | None = None
        self._mount = mount
        self._manager = manager
        self._details = details
        self._along = along
        self._wanted = wanted
        self._group = details.unit.control_group
        self._path = unit_path(self.name)
        self._pidfds: PidfdObserver | None = None
        self._observers: list[Observer] = []
        self._switched_off: list[ObserverState] = []
        self._tier = Tier.D
        self._processes: dict[ProcessId, WatchedProcess] = {}
        self._known_pids: set[int] = set()
        self._listeners: tuple[SocketFacts, ...] = ()
        self._events: list[Event] = []
        self._held: list[Event] = []
        self._phases: list[Event] = []
        self._on_eventss: OnEvents = lambda _: None
        self._active_state = details.unit.active_state
        self._sub_state = details.unit.sub_state
        self._result = details.unit.result
        self._control_pid = self._next_control = details.control_pid
        self._requested_us = self._ended_us = _now()
        self._job: str | None = None
        self._ended_jobs: dict[str, str] = {}
        self._job_result: str | None = None
        self._job_over = asyncio.Event()
        self._survivors: tuple[ProcessRef, ...] = ()
        self._released: tuple[PortChange, ...] = ()
        self._still_held: tuple[PortChange, ...] = ()
        self._also_stopped: tuple[str, ...] = ()
        self._reactivated_by: tuple[str, ...] = ()
        self._triggers_active: tuple[str, ...] = ()
        self._has_main_exit = False
        self.requested = False
        self.already_inactive = self._active_state in ("inactive", "failed") and not self._group
        self.finished = self.already_inactive

    @property
    def along_policies(self) -> tuple[StopPolicy | None, ...]:
        """How the units that go down along are stopped."""
        return tuple(details.policy for details in self._along)

    # Before the job --------------------------------------------------------------------------

    async def arm(self, on_events: OnEvents) -> None:
        """Start every observer and look at every process, before anything is asked of systemd."""
        self._on_events = on_events
        await self._manager.ref_unit(self.name)
        self._arm_pidfds()
        if self._group is not None:
            self._arm(
                "cgroup", CgroupObserver.name, lambda g: CgroupObserver(self.name, self._mount, g)
            )
            self._arm("sockets", SocketObserver.name, self._observe_sockets)
        # Until two walks agree: a process may be born while we look.
        while self._rescan(born_now=False):
            pass
        for state in self._observer_states():
            self._add(self._observer_event(state))

    def _observer_event(self, state: ObserverState) -> Event:
        return Event(
            unit=self.name,
            at_us=_now(),
            kind=EventKind.OBSERVER,
            source=EventSource.SDTOOL,
            text=f"{state.name}: {state.reason}",
        )

    def _arm_pidfds(self) -> None:
        if not self._is_wanted("pidfd", PidfdObserver.name):
            return
        self._pidfds = PidfdObserver(self.name)
        self._pidfds.has_status, self._pidfds.reason = probe_exit_info()
        self._tier = Tier.C if self._pidfds.has_status else Tier.D
        self._observers.append(self._pidfds)

    def _arm(self, switch: str, name: str, make: Callable[[str], Observer]) -> None:
        if self._group is not None and self._is_wanted(switch, name):
            self._observers.append(make(self._group))

    def _is_wanted(self, switch: str, name: str) -> bool:
        if self._wanted is None or switch in self._wanted:
            return True
        self._switched_off.append(
            ObserverState(name=name, available=False, reason="switched off by --observers")
        )
        return False

    def _observe_sockets(self, group: str) -> SocketObserver:
        # Armed before the dump: a socket that goes between the two would never be missed.
        observer = SocketObserver(self.name)
        own = cgroups.read_tree(self._mount, group).paths
        self._listeners = tuple(r for r in sockets.read_listeners() if r.cgroup_id in own)
        observer.watch(self._listeners)
        return observer

    async def request(self, *, interactive: bool) -> None:
        """Queue the stop job.

        Raises:
            AccessDenied: The manager or polkit refused.
        """
        self._requested_us = _now()
        self.requested = True
        try:
            self._job = await self._manager.queue_job("stop", self.name, interactive=interactive)
        except SdtoolError:
            self.requested = False
            raise
        # The job can be over before its path is in our hands.
        if self._job in self._ended_jobs:
            self._end_job(self._ended_jobs[self._job])

    # While it runs ---------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """The descriptors of the observers."""
        return [observer.fileno() for observer in self._observers if observer.available]

    def read_observers(self) -> None:
        """Take the events of every observer."""
        for observer in self._observers:
            if observer.available:
                for event in observer.read_events():
                    self._add(event)

    def on_signal(self, signal: ManagerSignal) -> None:
        """Take a signal of the manager, if it is about this unit."""
        if isinstance(signal, ConnectionLost):
            self.fail(
                Unavailable(
                    f"The connection to the manager ended while {self.name} was stopping; "
                    "the stop job goes on.",
                    subject=self.name,
                    hint=signal.reason,
                )
            )
        elif isinstance(signal, UnitChange) and signal.unit_path == self._path:
            self._on_change(signal)
        elif isinstance(signal, JobChange) and signal.unit == self.name:
            self._on_job(signal)

    def _on_change(self, change: UnitChange) -> None:
        """The Service part of a change comes first and the Unit part, with the state, second."""
        self._result = change.result or self._result
        if change.main_exit is not None and not self._has_main_exit:
            self._on_main_exit(change.main_exit)
        if change.control_pid is not None:
            self._next_control = change.control_pid or None
        if change.sub_state is None or change.active_state is None:
            return
        state = (change.active_state, change.sub_state)
        if state != (self._active_state, self._sub_state):
            self._active_state, self._sub_state = state
            self._on_state(change.changed_us or _now())
        if self._next_control != self._control_pid:
            self._on_control(self._control_pid, self._next_control)

    def _on_main_exit(self, main: MainExit) -> None:
        """The manager's word on its main process, where no pidfd has it."""
        if not self.requested or main.pid != self._details.unit.main_pid:
            return
        self._has_main_exit = True
        if self._pidfds is not None and self._pidfds.has_status:
            return
        seen = self._pidfds is not None
        known = (p.comm for p in self._processes.values() if p.pid == main.pid)
        self._add(
            Event(
                unit=self.name,
                at_us=main.at_us,
                kind=EventKind.PROCESS_REAPED if seen else EventKind.PROCESS_EXIT,
                source=EventSource.DBUS,
                pid=main.pid,
                comm=next(known, None),
                role=Role.MAIN,
                exit=main.exit,
            )
        )

    def _on_state(self, at_us: int) -> None:
        policy = self.policy
        state = Event(
            unit=self.name,
            at_us=at_us,
            kind=EventKind.STATE,
            source=EventSource.DBUS,
            active_state=self._active_state,
            sub_state=self._sub_state,
            result=self._result,
            limit_us=phases.limit_of(policy, self._sub_state) if policy else None,
            then=phases.after_limit(policy, self._sub_state)
            if policy and phases.is_stopping(self._sub_state)
            else None,
        )
        self._add(state)
        if self.requested:
            self._phases.append(state)
            if self._active_state in ("inactive", "failed"):
                self._ended_us = at_us
        self._rescan()

    def _infer_phases(self, until_us: int) -> None:
        """Conclude what the manager did in each new phase, once its first exits are known."""
        while self._phases and self._phases[0].at_us <= until_us and self.policy is not None:
            state = self._phases.pop(0)
            known = tuple(self._processes.values())
            for event in timeline.infer_phase(
                self.policy, state, known, tuple(self._events), self._requested_us
            ):
                self._add(event)

    def _on_control(self, before: int | None, now: int | None) -> None:
        """A command of ExecStop= or ExecStopPost= ended, or runs now."""
        self._control_pid = now
        if before is not None:
            self._add(self._control_event(EventKind.CONTROL_EXIT, before))
        if now is None:
            return
        self._rescan()
        for identity, process in self._processes.items():
            if identity.pid == now and process.role is not Role.CONTROL:
                self._processes[identity] = replace(process, role=Role.CONTROL)
                if self._pidfds is not None:
                    self._pidfds.note_role(identity, Role.CONTROL)
        self._add(self._control_event(EventKind.CONTROL_START, now))

    def _control_event(self, kind: EventKind, pid: int) -> Event:
        known = (p.comm for p in self._processes.values() if p.pid == pid)
        return Event(
            unit=self.name,
            at_us=_now(),
            kind=kind,
            source=EventSource.DBUS,
            pid=pid,
            comm=next(known, None),
            role=Role.CONTROL,
        )

    def _on_job(self, change: JobChange) -> None:
        if not self.requested:
            return
        if change.result is None:
            self._add(self._job_event(EventKind.JOB_NEW, None))
        elif self._job is None:
            self._ended_jobs[change.job] = change.result
        elif change.job == self._job:
            self._end_job(change.result)

    def _end_job(self, result: str | None) -> None:
        if not self._job_over.is_set():
            self._job_result = result
            self._add(self._job_event(EventKind.JOB_DONE, result))
            if self._active_state not in ("inactive", "failed"):
                self._ended_us = _now()
            self._job_over.set()

    def _job_event(self, kind: EventKind, result: str | None) -> Event:
        return Event(
            unit=self.name, at_us=_now(), kind=kind, source=EventSource.DBUS, result=result
        )

    def on_tick(self, now: int) -> None:
        """Look for new processes and hand on what was held back long enough."""
        self.read_observers()
        if self.requested and not self._job_over.is_set():
            self._rescan()
        self._infer_phases(now - HOLD_BACK_US)
        self._hand_on(now - HOLD_BACK_US)

    def _rescan(self, *, born_now: bool = True) -> bool:
        """Walk the cgroup for processes not seen yet; whether there were any."""
        if self._group is None:
            return False
        new = cgroups.read_pids(self._mount, self._group) - self._known_pids
        if self._pidfds is not None and new:
            make_room_for_descriptors(len(new))
        for pid in sorted(new):
            facts = processes.read_masked(pid)
            if facts is not None:
                self._watch_process(facts, born_now=born_now)
            self._known_pids.add(pid)
        return bool(new)

    def _watch_process(self, facts: ProcessFacts, *, born_now: bool) -> None:
        role = membership.role_of(facts.id.pid, self._details)
        if facts.id.pid in (self._control_pid, self._next_control):
            role = Role.CONTROL
        disposition = Disposition.UNKNOWN
        if self.policy is not None and not born_now:
            disposition, _ = predict(facts, self.policy.kill_signal)
        process = WatchedProcess(
            pid=facts.id.pid,
            start_ticks=facts.id.start_ticks,
            comm=facts.comm,
            role=role,
            disposition=disposition,
            seen_us=_now() if born_now else None,
        )
        self._processes[facts.id] = process
        if self._pidfds is not None:
            self._pidfds.watch(facts.id, facts.comm, role)
        if born_now:
            self._add_new(process)

    def _add_new(self, process: WatchedProcess) -> None:
        self._add(
            Event(
                unit=self.name,
                at_us=process.seen_us or _now(),
                kind=EventKind.PROCESS_NEW,
                source=EventSource.CGROUP,
                pid=process.pid,
                comm=process.comm,
                role=process.role,
            )
        )

    def _add(self, event: Event) -> None:
        self._events.append(event)
        self._held.append(event)

    def _hand_on(self, until_us: int) -> None:
        ready = [event for event in self._held if event.at_us <= until_us]
        self._held = [event for event in self._held if event.at_us > until_us]
        if ready:
            self._on_events(timeline.sort_events(ready))

    async def check(self) -> None:
        """Make sure that the manager lives, and that the end of the job was not missed.

        Raises:
            Unavailable: The manager does not answer.
        """
        if not self.requested or self._job_over.is_set():
            return
        details = await self._manager.read_unit(self.name)
        idle = details.unit.active_state in ("inactive", "failed") and not details.unit.job
        if idle and not self._job_over.is_set():
            self._active_state, self._sub_state = details.unit.active_state, details.unit.sub_state
            self._result = details.unit.result or self._result
            self._end_job(None)

    def fail(self, error: SdtoolError) -> None:
        """Give up watching: the report would not be true."""
        if self.requested and not self._job_over.is_set():
            self.failure = error
            self._job_over.set()

    # After the job ---------------------------------------------------------------------------

    async def wait_for_end(self) -> None:
        """Wait for the job, then for the last exits, and look at what stayed."""
        await self._job_over.wait()
        if self.failure is not None:
            return
        try:
            await self._settle()
            self._survivors = tuple(self._read_survivors())
            self._look_at_ports()
            await self._look_around()
        except SdtoolError as error:
            self.failure = error
            return
        self._infer_phases(_now())
        self._hand_on(_now())
        self.finished = True

    async def _settle(self) -> None:
        """Until all that was watched has ended and been freed, at most a quarter of a second.

        A round trip first: it brings every signal that the manager sent before its answer.
        """
        await self._read_state()
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self.read_observers()
            if self._is_settled():
                return
            await asyncio.sleep(POLL_S)

    def _is_settled(self) -> bool:
        exited = timeline.exits_by_pid(self._events)
        waiting = self._pidfds.watching() if self._pidfds else ()
        released = sum(event.kind is EventKind.PORT_RELEASED for event in self._events)
        all_released = released >= len(self._listeners)
        keeps = self.policy is not None and self.policy.kill_mode in ("process", "none")
        still = [process for process in waiting if not keeps or process.pid in exited]
        return all_released and not still

    async def _read_state(self) -> None:
        """The state after the job, where no signal brought it."""
        details = await self._manager.read_unit(self.name)
        await asyncio.sleep(0)
        if details.unit.active_state != "inactive":
            self._active_state = details.unit.active_state
            self._sub_state = details.unit.sub_state

    def _read_survivors(self) -> Iterable[ProcessRef]:
        restarted = self._active_state not in ("inactive", "failed")
        if not restarted:
            self._rescan()
        for identity, process in sorted(self._processes.items()):
            now = processes.read_process(identity.pid)
            if now is not None and now.id == identity and now.state not in "ZX":
                yield ProcessRef(pid=process.pid, comm=process.comm)

    def _look_at_ports(self) -> None:
        """Which of the unit's ports are free now, by the kernel's word or by looking."""
        freed = {
            (event.protocol, event.address, event.port): event.at_us
            for event in self._events
            if event.kind is EventKind.PORT_RELEASED
        }
        now = _now()
        present = {row.cookie for row in sockets.read_listeners()} if self._listeners else set()
        held, released = [], []
        for row in self._listeners:
            if row.cookie in present:
                held.append(_port_change(row, None))
            else:
                key = (row.protocol, row.address, row.port)
                released.append(_port_change(row, freed.get(key, now)))
        self._still_held, self._released = tuple(held), tuple(released)

    async def _look_around(self) -> None:
        """What else went down with it, and what has started it again, or can."""
        along = [details.unit.name for details in self._along]
        up = await self._still_up((*along, *self._details.triggered_by))
        self._also_stopped = tuple(name for name in along if name not in up)
        self._triggers_active = tuple(n for n in self._details.triggered_by if n in up)
        if self._active_state not in ("inactive", "failed", "deactivating"):
            self._reactivated_by = self._triggers_active

    async def _still_up(self, names: Sequence[str]) -> frozenset[str]:
        units = await self._manager.list_units(names) if names else ()
        return frozenset(u.name for u in units if u.active_state not in ("inactive", "failed"))

    def record(self) -> StopRecord:
        """All that was gathered."""
        return StopRecord(
            unit=self.name,
            policy=self.policy,
            observers=self._observer_states(),
            tier=self._tier,
            requested_us=self._requested_us,
            ended_us=self._ended_us,
            events=tuple(self._events),
            processes=tuple(self._processes.values()),
            survivors=self._survivors,
            job_result=self._job_result,
            result=self._result,
            active_state=self._active_state,
            sub_state=self._sub_state,
            released=self._released,
            held=self._still_held,
            also_stopped=self._also_stopped,
            reactivated_by=self._reactivated_by,
            triggers_active=self._triggers_active,
            already_inactive=self.already_inactive,
        )

    def _observer_states(self) -> tuple[ObserverState, ...]:
        bus = ObserverState(name="dbus", available=True, reason=self._manager.info.transport)
        watching = (
            ObserverState(name=o.name, available=o.available, reason=o.reason, lost=o.lost)
            for o in self._observers
        )
        return (bus, *watching, *self._switched_off)

    def close(self) -> None:
        """End every observer; safe to call at any moment."""
        for observer in self._observers:
            observer.close()
        self._observers.clear()


def _port_change(row: SocketFacts, at_us: int | None) -> PortChange:
    return PortChange(protocol=row.protocol, address=row.address, port=row.port, at_us=at_us)


def _now() -> int:
    return time.monotonic_ns() // 1000
