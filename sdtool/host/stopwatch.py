"""One unit while it stops: armed before the job, watched until all has ended, and recorded.

What the manager says of the unit is ``told``; what the kernel says comes from ``observers`` and
``members``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

from sdtool.analysis import timeline
from sdtool.analysis.events import exits_by_process
from sdtool.analysis.phases import ENDED
from sdtool.errors import NoSuchUnit, SdtoolError, Unavailable
from sdtool.host.ends import Ends
from sdtool.host.eventlog import EventLog, now_us
from sdtool.host.lastword import LastWord
from sdtool.host.lives import Lives
from sdtool.host.members import Members
from sdtool.host.observers import JournalObserver, Observers
from sdtool.host.record import KernelRecord, UnitRecord
from sdtool.host.session import Session
from sdtool.host.told import State, Told
from sdtool.model.kernel import KernelEvent, ListenerClosed
from sdtool.model.manager import ManagerGap
from sdtool.model.process import Role
from sdtool.model.sockets import Socket, SocketFacts
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ObserverState,
    PortChange,
    StopCommand,
    StopRecord,
    WatchedProcess,
)
from sdtool.model.unit import UnitDetails
from sdtool.sources.systemd import Manager

SETTLE_S = 0.25
"""How long to wait, after the job, for the last exits, reaps and destroyed sockets."""

POLL_S = 0.005

SELDOM_US = 500_000
"""How long between walks of the cgroup where the kernel's record tells of births and ends."""

RECENT_US = 1_000
"""The kernel's record is not read again so soon: of many units that end, each wants it read."""

LOST_JOB = "lost"
"""Stands for the path of a job that was over before its path was known."""


class StopWatch:
    """Everything about the stop of one unit; armed before the job, closed after it.

    Args:
        along: Watches of the active units that will go down with it.
        wanted: Names of ``OBSERVERS`` to use; None for all.
        record: The kernel's own, which all watches share.

    Attributes:
        told: What the manager has said of it.
        failure: Why there is no report; a refusal can be lifted by another request.
        already_inactive: There is nothing to stop.
        finished: All that there is to know is gathered.
    """

    def __init__(
        self,
        session: Session,
        manager: Manager,
        details: UnitDetails,
        along: Sequence[StopWatch],
        wanted: frozenset[str] | None,
        record: KernelRecord,
    ) -> None:
        unit = details.unit
        self.name = unit.name
        self.failure: SdtoolError | None = None
        self._manager = manager
        self._details = details
        self.along = tuple(along)
        self._along_names = tuple(watch.name for watch in along)
        self._log = EventLog(unit.name)
        self._observers = Observers(unit.name, session, wanted)
        self._journal = JournalObserver(session, wanted)
        pidfds = self._observers.pidfds
        self._record = record
        own = self._own_record = UnitRecord(record, unit.name)
        self._members = Members(session.mount, details, self._log, pidfds, own)
        self._ends = Ends(self._log, self._members, own, has_pidfds=pidfds is not None)
        self.told = Told(details, self._log, self._members, self._ends, own)
        self._lives = Lives(self._log, self._members, self._ends, own, self._close_port)
        self._crash: BaseException | None = None
        self._is_held = False
        self._survivors: tuple[WatchedProcess, ...] = ()
        self._still_held: tuple[SocketFacts, ...] | None = ()
        self._last_state_read = True
        self._still_up: frozenset[str] | None = None
        self._last_word = LastWord(unit.name)
        self._commands: tuple[StopCommand, ...] = ()
        self._listeners: tuple[Socket, ...] = ()
        self._session = session
        self.already_inactive = unit.active_state in ENDED and unit.control_group is None
        self.finished = self.already_inactive

    def leave_out(self, names: Collection[str]) -> None:
        """Leave units that go down along to the watches that they have elsewhere."""
        for watch in self.along:
            if watch.name in names:
                watch.close()
        self.along = tuple(watch for watch in self.along if watch.name not in names)

    # Before the job --------------------------------------------------------------------------

    def arm(self) -> None:
        """Start every observer and look at every process, before anything is asked of systemd.

        The kernel's record goes by then.
        """
        self._observers.arm(self._details.unit.control_group, self._listeners)
        self._members.take_stock()
        for state in self._observer_states():
            text = f"{state.name}: {state.reason}"
            self._log.note(EventKind.OBSERVER, EventSource.SDTOOL, text=text)

    async def find_listeners(self) -> None:
        """Find what the manager listens on for a .socket: whose cgroup made it does not tell."""
        if self._details.unit.unit_type != "socket" or self.already_inactive:
            return
        from sdtool.host.ports import own_sockets

        found, _ = await own_sockets(self._session, self._details.unit, ())
        self._listeners = tuple(socket for socket in found if socket.port is not None)

    async def hold(self) -> None:
        """Keep the manager from forgetting the unit, where it permits that."""
        self._is_held = await self._manager.ref_unit(self.name)

    async def let_go(self) -> None:
        """The manager may forget the unit; one that is lost has done so."""
        if self._is_held and self.failure is None:
            await self._manager.unref_unit(self.name)

    def refuse(self, error: SdtoolError) -> None:
        """Take the refusal of the request: without another one it is the ``failure``."""
        self.told.refuse()
        self.failure = error

    def take_job(self, job: str) -> None:
        """Take the path of the job that was asked for."""
        self.failure = None
        self.told.take_job(job)

    def take_lost_job(self, state: State | None) -> None:
        """The job was over before its path was known: the answer was lost, and the unit says so.

        Args:
            state: The unit now.
        """
        self.told.job = LOST_JOB
        gap = ManagerGap(
            since_us=self.told.requested_us, until_us=now_us(), reason="the answer was lost"
        )
        self.resync(state, gap, told=False)
        self.take_job(LOST_JOB)

    # While it runs ---------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """The descriptors of the observers; where the record tells of ends, not of all."""
        return self._observers.filenos(with_pidfds=not self._own_record.tells)

    @property
    def control_group(self) -> str | None:
        """Where its processes are; None for a unit that has none of its own."""
        return self._details.unit.control_group if self._details.policy else None

    @property
    def signals(self) -> frozenset[str]:
        """Those that may be sent to its processes, by name."""
        policy = self.told.policy
        if policy is None:
            return frozenset()
        kill, again = policy.kill_signal, policy.restart_kill_signal
        return frozenset({kill, again, policy.final_kill_signal, policy.watchdog_signal})

    def take_kernel_event(self, event: KernelEvent) -> None:
        """Take what happened to one of its processes, by the kernel's record."""
        self._lives.take(event)

    def take_loss(self, source: EventSource, since_us: int, until_us: int, text: str) -> None:
        """Take note that the record lacks something."""
        self._log.note(
            EventKind.GAP,
            source,
            at_us=until_us,
            at_min_us=since_us,
            at_max_us=until_us,
            text=text,
        )

    def _close_port(self, event: ListenerClosed) -> None:
        """One of its ports is free, by the record: that comes long before the notification."""
        port = self._observers.find_listener(event.address, event.port, event.at_us)
        if port is not None:
            self._log.note(
                EventKind.PORT_RELEASED,
                event.source,
                at_us=event.at_us,
                protocol=port.protocol,
                address=port.address,
                port=port.port,
            )

    def read_observers(self) -> None:
        """Take the events of every observer."""
        for source, events in self._observers.read_events():
            if source is self._observers.pidfds:
                self._ends.take_seen(events)
            else:
                self._log.add(*events)
            if any(event.role is Role.MAIN for event in events):
                # KillMode=mixed ends the rest within a millisecond: see who that is.
                self._members.rescan()
        self._members.settle()
        self._ends.take_missed(self._members.take_missed())
        self._ends.settle()

    def on_tick(self) -> None:
        """Look for new processes and for exits that nobody reaps."""
        self.read_observers()
        if self.told.begun and not self.told.over.is_set():
            # The record tells who is born: then it is enough to look now and then.
            self._members.rescan(after_us=SELDOM_US if self._own_record.tells else 0)

    def take_events(self, until_us: int) -> list[Event]:
        """What happened until then, with what can be concluded from it."""
        self.told.infer_phases(until_us)
        return self._log.take(until_us)

    # When the manager was out of reach -------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the job is over, or the watch was given up.

        One that was refused is not while a person is asked about it: it has begun anew.
        """
        return self.told.over.is_set() or (self.failure is not None and not self.told.begun)

    @property
    def is_down(self) -> bool:
        """Whether its job is over, and those of all that go down along."""
        along = (watch.told for watch in self.along if watch.told.has_job)
        return self.told.over.is_set() and all(told.over.is_set() for told in along)

    @property
    def is_waiting(self) -> bool:
        """Whether the end of a job is awaited."""
        return self.told.begun and not self.is_over and self.told.queued

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
        if not self.is_over:
            self.told.resync(state, gap, told=told)
        elif told and self.failure is None:
            # It was waiting when the manager was back, and its end was told while it was asked.
            self.told.note_gap_before_end(gap, state[0].policy if state is not None else None)

    def lose_manager(self, reason: str) -> None:
        """Give up watching: without the manager's word the report would not be true."""
        if not self.told.begun or self.told.over.is_set():
            return
        sentence = f"The manager was lost while {self.name} was stopping."
        reason = f"whether the stop job goes on is not known: {reason}"
        if not self.told.requested and not self.told.has_job:
            sentence = f"The manager was lost before {self.name} was asked to stop."
            reason = f"nothing was asked of it: {reason}"
        self.failure = Unavailable(sentence, subject=self.name, hint=reason)
        self.told.over.set()

    def crash(self, error: BaseException) -> None:
        """End the wait with a bug of ours; it comes out of ``wait_for_end``."""
        self._crash = error
        self.told.over.set()

    # After the job ---------------------------------------------------------------------------

    async def wait_for_end(self, until: float | None = None) -> None:
        """Wait for the job, then for the last exits, and look at what stayed.

        Returns at once for a unit whose stop was refused. Of a manager that is lost after the
        job the record says what it could not be asked for.

        Args:
            until: When it is not waited for any more, by the event loop's clock; None for a
                few seconds after the job.
        """
        if not self.told.begun:
            return
        await self.told.over.wait()
        if self._crash is not None:
            raise self._crash
        if self.failure is not None:
            return
        self._last_word.begin(until)
        await self._settle()
        await self._wait_for_along()
        await self._look_around()
        self._record.finish()
        self.read_observers()
        self._members.settle(is_last=True)
        self._ends.finish()
        self.told.conclude()
        await self._consult_journal()
        self.finished = True

    async def _consult_journal(self) -> None:
        """Ask the journal, only where something is still open: that takes a moment."""
        if not self._journal.is_wanted or not timeline.is_open(self.record()):
            return
        from sdtool.analysis import journal

        records = await self._journal.read(
            self._details.unit,
            since_us=self.told.requested_us,
            manager=self._record.manager,
            deadline_s=self._last_word.left_s,
        )
        record = self.record()
        events = journal.build_events(records, record)
        self._members.take_unseen(journal.find_unseen(events, record.processes))
        self._log.add(*events)

    async def _wait_for_along(self) -> None:
        """Wait for those that are on their way down; no job by now means that they stay."""
        for watch in self.along:
            if not watch.told.has_job:
                continue
            if not watch.told.over.is_set():
                await watch.told.over.wait()
                self._last_word.renew()
            await watch.wait_for_end(self._last_word.until)
            if watch.failure is not None:
                self._last_word.miss(f"what became of {watch.name}", watch.failure)

    async def _settle(self) -> None:
        """Until all that was watched has ended and been freed, at most a quarter of a second.

        A round trip first: it brings every signal that the manager sent before its answer.
        """
        try:
            state = await self._last_word.ask(self.read_state())
        except SdtoolError as error:
            self._last_word.miss("whether it is in another state by now", error)
            self._last_state_read = False
        else:
            await asyncio.sleep(0)
            self.told.take_last_state(state)
            self._last_state_read = True
            if state is not None:
                self._take_commands(state[0].stop_commands)
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self._record.pump(now_us() - RECENT_US)
            self.read_observers()
            if self._is_settled():
                return
            await asyncio.sleep(POLL_S)

    def _take_commands(self, commands: Sequence[StopCommand]) -> None:
        """Take the manager's word on what it ran, however short that was."""
        self._commands = tuple(
            command
            for command in commands
            if command.started_us is not None and command.started_us >= self.told.requested_us
        )
        # What the record has of them goes before the manager's word.
        self._record.catch_up(max((c.ended_us or now_us() for c in self._commands), default=0))
        for command in self._commands:
            self._members.meet_command(command)
            if command.pid and command.ended_us and command.exit is not None:
                self._ends.take_waited(command.pid, command.ended_us, command.exit, is_last=True)

    def _is_settled(self) -> bool:
        ports = len(self._observers.listeners)
        released = len(self._log.of_kind(EventKind.PORT_RELEASED)) >= ports
        waiting = self._members.still_watched()
        if self.told.policy is not None and self.told.policy.kill_mode in ("process", "none"):
            # The others may stay: wait only for the reaping of those that ended.
            waiting &= exits_by_process(self._log.events).keys()
        return released and not waiting and self._ends.is_settled

    async def _look_around(self) -> None:
        """What still runs, what went down along, what can start it again."""
        if self.told.active_state in ENDED or self.told.started_us is not None:
            # Where the stop was canceled or undone, what runs is no left-over.
            own = {process.id for process in self._own_processes()}
            running = self._members.survivors()
            self._survivors = tuple(process for process in running if process.id in own)
            for process in self._survivors:
                self._members.note_leftover(process)
        try:
            self._still_held = self._observers.read_held()
        except SdtoolError as error:
            self._still_held = None
            self._last_word.miss("which of its ports are free", error)
        names = (*self._along_names, *self._details.triggered_by)
        if not names:
            self._still_up = frozenset()
            return
        try:
            units = await self._last_word.ask(self._manager.list_named(names))
        except SdtoolError as error:
            self._last_word.miss(f"whether {', '.join(names)} is up", error)
            return
        self._still_up = frozenset(u.name for u in units if u.active_state not in ENDED)

    def _went_along(self) -> tuple[str, ...]:
        """Those that went down along; where nobody could be asked, those of whom it was told."""
        if self._still_up is not None:
            return tuple(name for name in self._along_names if name not in self._still_up)
        down = {w.name for w in self.along if w.finished and w.told.active_state in ENDED}
        return tuple(name for name in self._along_names if name in down)

    def record(self) -> StopRecord:
        """All that was gathered."""
        up = self._still_up or frozenset()
        triggers = tuple(u for u in self._details.triggered_by if u in up)
        again = self.told.started_us is not None
        done = self.told.job_result == "done" or again
        undone = done and self.told.active_state not in ENDED
        released, held = self._ports()
        along = tuple(
            timeline.build(w.record()) for w in self.along if w.finished and w.told.has_job
        )
        return StopRecord(
            unit=self.name,
            policy=self.told.policy,
            observers=self._observer_states(),
            tier=self._record.tier(tell_status=self._observers.tell_status),
            manager_pid=self._record.manager,
            requested_us=self.told.requested_us,
            ended_us=self.told.ended_us,
            events=self._own_events(),
            processes=self._own_processes(),
            survivors=self._survivors,
            job_result=self.told.job_result,
            job_result_reason=self.told.job_result_reason,
            result=self.told.result,
            result_reason=self.told.result_reason,
            started_again=again,
            active_state=self.told.active_state,
            released=released,
            held=held,
            also_stopped=self._went_along(),
            along=along,
            # Systemd does not say which of several it was: named only where it is certain.
            reactivated_by=triggers if undone and len(triggers) == 1 else (),
            triggers_active=triggers,
            result_before=self._details.unit.result,
            already_inactive=self.already_inactive,
            unread_reason=self._last_word.unread_reason,
            last_state_read=self._last_state_read,
            commands=self._commands,
            lost_along=tuple(w.name for w in self.along if w.told.has_job and not w.finished),
        )

    def _own_processes(self) -> tuple[WatchedProcess, ...]:
        """Those of this stop; a unit that was started again has new ones already."""
        known = self._members.known
        if self.told.started_us is None:
            return known
        # Of the new run they can be seen before it is told, but not before the end of the old.
        until_us = min(self.told.started_us, self.told.ended_us)
        return tuple(p for p in known if p.seen_us is None or p.seen_us < until_us)

    def _own_events(self) -> tuple[Event, ...]:
        """What happened to its processes; those of a new run have a stop of their own."""
        if self.told.started_us is None:
            return self._log.events
        own = {process.id for process in self._own_processes()}
        return tuple(e for e in self._log.events if e.process is None or e.process in own)

    def _ports(self) -> tuple[tuple[PortChange, ...], tuple[PortChange, ...]]:
        """Its listening ports that are free, and those that are taken."""
        ports = [(row, self._port(row)) for row in self._observers.listeners]
        if self._still_held is None:
            # Nobody could look: free is what the kernel has said so of.
            return tuple(port for _, port in ports if port.at_us is not None), ()
        held = self._still_held
        return (
            tuple(port for row, port in ports if row not in held),
            tuple(port for row, port in ports if row in held),
        )

    def _port(self, row: SocketFacts) -> PortChange:
        """A port with the time it was free at, by the kernel's word."""
        at_us = self._observers.freed_at(row)
        return PortChange(
            protocol=row.protocol, address=row.address or "", port=row.port or 0, at_us=at_us
        )

    def _observer_states(self) -> tuple[ObserverState, ...]:
        bus = ObserverState(name="dbus", available=True, reason=self._manager.info.transport)
        return (bus, *self._record.states(), *self._observers.states(), self._journal.state)

    def close(self) -> None:
        """End every observer and question; safe to call at any moment."""
        self._last_word.close()
        self._observers.close()
