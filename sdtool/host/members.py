"""The processes of one unit while it stops: found in its cgroup, or told by the kernel's record.

The record knows who was born, and when; walks of the cgroup find who is there. Where there is no
record the walks are all there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sdtool.analysis.events import had_pid_at
from sdtool.analysis.signals import predict
from sdtool.host.eventlog import EventLog, names_of, now_us
from sdtool.host.record import UnitRecord
from sdtool.model.kernel import TaskBorn, TaskMoved
from sdtool.model.process import Disposition, ProcessFacts, ProcessId, Role
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    Evidence,
    StopCommand,
    WatchedProcess,
)
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups, processes
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.pidfds import PidfdObserver, make_room_for_descriptors

Prediction = tuple[Disposition, str]
"""What the stop signal will do to a process, and how that is known."""

BORN_LATE: Prediction = Disposition.UNKNOWN, "it was born during the stop"
GONE: Prediction = Disposition.UNKNOWN, "it was gone before anybody could look at it"

NO_NAME = "?"
"""Of a process that was gone before its name could be read."""

ADOPT_WAIT_US = 20_000
"""How long a process that a walk has found is kept back: for its name, and for the moment of its
birth where the record tells that."""

STOCK_WALKS = 8
"""So often the cgroup is walked at most before the stop."""


class Members:
    """Every process that was seen in the unit, each once, with its role.

    Args:
        pidfds: Watches their exits; None when that is switched off.
        record: The kernel's, which is told whom to tell of.
    """

    def __init__(
        self,
        mount: CgroupMount,
        details: UnitDetails,
        log: EventLog,
        pidfds: PidfdObserver | None,
        record: UnitRecord,
    ) -> None:
        self._mount = mount
        self._details = details
        self._log = log
        self._pidfds = pidfds
        self._record = record
        # What has no kill policy (a slice) has no processes of its own: its units have.
        self._group = details.unit.control_group if details.policy else None
        self._known: dict[ProcessId, WatchedProcess] = {}
        self._by_pid: dict[int, list[ProcessId]] = {}
        self._looked_at: set[int] = set()
        self._control_pid = details.control_pid
        held = (details.unit.main_pid, details.control_pid)
        self._held = frozenset(pid for pid in held if pid is not None)
        self._unwatched: set[ProcessId] = set()
        self._untold: dict[ProcessId, int] = {}
        self._control_events: dict[int, list[Event]] = {}
        self._leftovers: set[ProcessId] = set()
        self._births: set[ProcessId] = set()
        self._programs: dict[ProcessId, str] = {}
        self._frozen: frozenset[str] = frozenset()
        self._missed: list[Event] = []
        self._closed = False
        self._walked_us = now_us()

    @property
    def known(self) -> tuple[WatchedProcess, ...]:
        """All that were seen, in the order they were."""
        return tuple(self._known.values())

    def find(self, pid: int, at_us: int | None = None) -> WatchedProcess | None:
        """The process that had a pid at a moment, or was the last one to be seen under it."""
        had = [self._known[identity] for identity in self._by_pid.get(pid, ())]
        return had_pid_at(had, at_us)

    def get(self, identity: ProcessId) -> WatchedProcess | None:
        """A process by its identity; None when it was not seen."""
        return self._known.get(identity)

    def find_ended(self, pid: int, at_us: int) -> WatchedProcess:
        """The process that ended; one that nobody has seen is of the unit from now on."""
        process = self.find(pid, at_us)
        if process is not None:
            return process
        identity = ProcessId(pid=pid, start_ticks=0)
        return self._know(identity, NO_NAME, self._role_of(pid), None, GONE)

    # Walks of the cgroup ---------------------------------------------------------------------

    def take_stock(self) -> None:
        """See what is there before the stop, until two walks agree."""
        if self._group is not None:
            groups = cgroups.read_tree(self._mount, self._group).members
            self._frozen = cgroups.read_frozen(self._mount, groups)
        # Where somebody is born all the time no two of them agree.
        for _ in range(STOCK_WALKS):
            if not self._walk(born_now=False):
                break

    def rescan(self, *, after_us: int = 0) -> None:
        """Look for processes that were born, or have gone, since the last walk.

        Args:
            after_us: Unless the last walk is less than so long ago.
        """
        if now_us() - self._walked_us >= after_us:
            self._walk(born_now=True)

    def stop_adopting(self) -> None:
        """The unit has been started again: whoever is born from now on is not of this stop."""
        self._closed = True

    def _walk(self, *, born_now: bool) -> bool:
        """Walk the cgroup once; whether there was anybody new."""
        if self._details.policy is None or self._closed:
            return False
        last_us, self._walked_us = self._walked_us, now_us()
        pids = self._read_pids()
        new, gone = pids - self._looked_at, self._looked_at - pids
        # A pid that has left can come back as another process.
        self._looked_at = set(pids)
        for pid in gone:
            self._look_after(pid)
        if self._pidfds is not None and new:
            make_room_for_descriptors(len(new))
        for pid in sorted(new):
            # First of all the pidfd: one that was born just now may be gone in a moment.
            facts = processes.read_process(pid)
            if facts is not None and self._recognize(facts.id) is None:
                self._meet(facts, born_now=born_now)
        self._miss(pids, last_us)
        return bool(new)

    def _read_pids(self) -> frozenset[int]:
        """Those in the cgroup, and those that the manager has a hold of wherever they are.

        A main process can be in a session's scope (PAMName=), or wherever PIDFile= names it.
        """
        inside = cgroups.read_pids(self._mount, self._group) if self._group else frozenset[int]()
        outside = self._held - inside
        return inside | {pid for pid in outside if processes.read_process(pid) is not None}

    def look_again(self, pid: int) -> None:
        """Who had this pid has ended: the next walk can find another one that has it."""
        self._looked_at.discard(pid)

    def _look_after(self, pid: int) -> None:
        """Whether who is in the cgroup no more runs elsewhere; most have ended."""
        facts = processes.read_process(pid)
        if facts is None or facts.state in "ZX":
            return
        process = self._recognize(facts.id)
        inside = self._is_path_inside(facts.control_group or self._group or "")
        if process is not None and not inside:
            self._note_move(process)

    def _recognize(self, identity: ProcessId) -> WatchedProcess | None:
        """The process if it was met; what the record tells may have a start a tick off."""
        for before in self._by_pid.get(identity.pid, ()):
            if abs(before.start_ticks - identity.start_ticks) <= 1:
                return self._known[before]
        return None

    def _meet(
        self, facts: ProcessFacts, *, born_now: bool = False, seen_us: int | None = None
    ) -> None:
        """Take note of a process that was found.

        Args:
            born_now: It was not there before.
            seen_us: Since when it is there, where that is known better than by this look.
        """
        role = self._role_of(facts.id.pid)
        watched = self._pidfds is not None and self._pidfds.watch(facts.id, facts.comm, role)
        if not watched:
            self._unwatched.add(facts.id)
        if born_now:
            # Not before its pidfd is watched: what ended by then is no sign of the order.
            seen_us = seen_us or now_us()
            self._untold[facts.id] = now_us()
        prediction = BORN_LATE if born_now else self._predict(facts)
        self._know(facts.id, facts.comm, role, seen_us, prediction)
        if self._record.tells:
            tasks = frozenset(processes.read_tasks(facts.id.pid))
            # The first one has ended where it is a zombie: the process is what the others are.
            ended = {facts.id.pid} if facts.state in "ZX" else set()
            self._record.adopt(facts.id.pid, tasks - ended)

    def _know(
        self,
        identity: ProcessId,
        comm: str,
        role: Role,
        seen_us: int | None,
        prediction: Prediction = BORN_LATE,
    ) -> WatchedProcess:
        """Remember a process from now on."""
        disposition, reason = prediction
        process = WatchedProcess(
            pid=identity.pid,
            start_ticks=identity.start_ticks,
            comm=comm,
            role=role,
            disposition=disposition,
            disposition_reason=reason,
            seen_us=seen_us,
        )
        self._remember(process)
        return process

    def _remember(self, process: WatchedProcess) -> None:
        """Keep what is known of a process now."""
        if process.id not in self._known:
            self._by_pid.setdefault(process.pid, []).append(process.id)
        self._known[process.id] = process

    def _note_birth(self, identity: ProcessId, source: EventSource) -> None:
        process = self._known[identity]
        self._log.note(EventKind.PROCESS_NEW, source, process, at_us=process.seen_us)

    def settle(self, *, is_last: bool = False) -> None:
        """Tell of those that a walk has found, and of whose birth the record says nothing.

        A moment after it was made a process runs its own program, and has its name.

        Args:
            is_last: Nobody has more to say of it.
        """
        now = now_us()
        known_us = self._record.known_us if self._record.tells else now
        for identity, found_us in tuple(self._untold.items()):
            if is_last or (now - found_us > ADOPT_WAIT_US and known_us > found_us):
                del self._untold[identity]
                self._read_name(self._known[identity])
                self._note_birth(identity, EventSource.CGROUP)

    def _read_name(self, process: WatchedProcess) -> None:
        """Read its name once more; that of one that is gone stays."""
        facts = processes.read_process(process.pid)
        if facts is not None and self._recognize(facts.id) == process:
            self._remember(replace(process, comm=facts.comm))

    def _predict(self, facts: ProcessFacts) -> Prediction:
        policy = self._details.policy
        if policy is None:
            return Disposition.UNKNOWN, "its unit has no stop signal"
        masks = processes.read_masks(facts.id.pid, facts.state)
        frozen = facts.control_group in self._frozen
        return predict(replace(facts, masks=masks, frozen=frozen), policy.kill_signal)

    def _miss(self, pids: frozenset[int], last_us: int) -> None:
        """Note the end of those that no pidfd watches: it lies between two walks."""
        for identity in [one for one in self._unwatched if one.pid not in pids]:
            self._unwatched.discard(identity)
            process = self._known[identity]
            missed = Event(
                unit=self._details.unit.name,
                kind=EventKind.PROCESS_EXIT,
                source=EventSource.CGROUP,
                at_us=self._walked_us,
                evidence=Evidence.INFERRED,
                at_min_us=last_us,
                at_max_us=self._walked_us,
                **names_of(process),
                text="it is gone from the cgroup; nobody could see how it ended",
            )
            self._missed.append(missed)

    def take_missed(self) -> list[Event]:
        """The ends that walks have found since the last call."""
        missed, self._missed = self._missed, []
        return missed

    # The kernel's record ---------------------------------------------------------------------

    def meet_born(self, event: TaskBorn, *, by_manager: bool) -> None:
        """Take note of a birth, of a process that may be gone again.

        Args:
            by_manager: The manager made it: it runs a command of the unit.
        """
        if self._closed:
            return
        facts = processes.read_process(event.pid)
        ticks = _ticks_at(event.at_us)
        if facts is None or abs(facts.id.start_ticks - ticks) > 1:
            identity, comm = ProcessId(pid=event.pid, start_ticks=ticks), event.comm or NO_NAME
        else:
            identity, comm = facts.id, facts.comm
        known = self._recognize(identity)
        if known is not None and (known.id == identity or known.id not in self._births):
            self._births.add(known.id)
            self._note_time_of_birth(known, event)
            return
        self._births.add(identity)
        role = Role.CONTROL if by_manager else self._role_of(event.pid)
        if facts is not None and facts.id == identity and self._pidfds is not None:
            self._pidfds.watch(identity, comm, role)
        self._know(identity, comm, role, event.at_us)
        self._note_birth(identity, event.source)

    def _note_time_of_birth(self, process: WatchedProcess, event: TaskBorn) -> None:
        """A walk has found it first: when it was born is known now."""
        if self._untold.pop(process.id, None) is None:
            return
        self._remember(replace(process, seen_us=event.at_us))
        self._note_birth(process.id, event.source)

    def meet_moved(self, event: TaskMoved) -> None:
        """Take note of a process that was moved into the unit, or out of it."""
        if not self._is_path_inside(event.control_group):
            process = self.find(event.pid, event.at_us)
            if process is not None:
                self._note_move(process)
            return
        facts = processes.read_process(event.pid)
        if facts is not None and self._recognize(facts.id) is None and not self._closed:
            self._meet(facts, born_now=True, seen_us=event.at_us)

    def _note_move(self, process: WatchedProcess) -> None:
        """It was moved out: nobody waits for its end.

        Whom the manager has a hold of is the unit's own all the same.
        """
        if process.pid in self._held or process.role is not Role.OTHER:
            self._held |= {process.pid}
            if self._record.tells:
                self._record.adopt(process.pid, processes.read_tasks(process.pid))
            return
        self._remember(replace(process, has_left=True))
        self._unwatched.discard(process.id)
        self.release(process.id)
        self._record.leave(process.pid)

    def rename(self, process: WatchedProcess, comm: str | None, path: str | None) -> None:
        """It runs another program."""
        if path is not None:
            self._programs[process.id] = path
        if comm is not None:
            self._remember(replace(process, comm=comm))

    def ignores(self, process: WatchedProcess, signal: str) -> bool:
        """Whether a process ignores a signal that the kernel did not deliver to it.

        It may be on its way to its end as well.
        """
        policy = self._details.policy
        facts = processes.read_process(process.pid)
        if facts is None or facts.state in "ZX" or self._recognize(facts.id) != process:
            return False
        stop_signal = policy.kill_signal if policy is not None else None
        if signal == stop_signal and process.disposition is Disposition.IGNORES:
            return True
        masked = replace(facts, masks=processes.read_masks(process.pid, facts.state))
        return predict(masked, signal)[0] is Disposition.IGNORES

    # What the manager says of them -----------------------------------------------------------

    def _role_of(self, pid: int) -> Role:
        if pid == self._control_pid:
            return Role.CONTROL
        return self._details.role_of(pid)

    def follow_control(self, pid: int | None, at_us: int) -> None:
        """Take the manager's word on which process runs a command of ExecStop= or the like."""
        before, self._control_pid = self._control_pid, pid
        if before is not None:
            self._note_control(EventKind.CONTROL_EXIT, before, at_us)
        if pid is None:
            return
        self._held |= {pid}
        self.rescan()
        process = self._find_recorded(pid)
        if process is not None and process.role is not Role.CONTROL:
            # The walk met it before its role was known.
            process = replace(process, role=Role.CONTROL)
            self._remember(process)
            if self._pidfds is not None:
                self._pidfds.note_role(process.id, Role.CONTROL)
        if process is not None:
            self._read_name(process)
        self._note_control(EventKind.CONTROL_START, pid, at_us)

    def _find_recorded(self, pid: int) -> WatchedProcess | None:
        """A process that the manager tells of; one that is gone already the record may have."""
        if pid not in self._by_pid:
            self._record.adopt(pid, ())
        return self.find(pid)

    def meet_command(self, command: StopCommand) -> None:
        """Take the manager's word on a command that ran, which may have been too short to see."""
        pid, started_us = command.pid, command.started_us
        if pid is None or started_us is None:
            return
        path = command.argv[0] if command.argv else None
        comm = processes.name_after_exec(path) if path else NO_NAME
        process = self._find_recorded(pid)
        if process is None:
            identity = ProcessId(pid=pid, start_ticks=_ticks_at(started_us))
            process = self._know(identity, comm, Role.CONTROL, started_us)
        elif path and _is_name_before_exec(process.comm):
            process = replace(process, comm=comm)
            self._remember(process)
            self._log.rename(process)
        if pid not in self._control_events:
            self._note_control(EventKind.CONTROL_START, pid, started_us)
        path = self._programs.get(process.id, path)
        times = {EventKind.CONTROL_START: started_us, EventKind.CONTROL_EXIT: command.ended_us}
        self._control_events[pid] = [
            self._complete(event, process, times[event.kind], path)
            for event in self._control_events[pid]
        ]

    def _complete(
        self, event: Event, process: WatchedProcess, at_us: int | None, path: str | None
    ) -> Event:
        """Say whose the manager's word was, and when by its own clock: it was heard later."""
        text = path if event.kind is EventKind.CONTROL_START else event.text
        at_us = at_us or event.at_us
        return self._log.amend(event, **names_of(process), at_us=at_us, text=text)

    def _note_control(self, kind: EventKind, pid: int, at_us: int) -> None:
        """Take note of the manager's word on a command, which nobody else may have told yet."""
        process = self.find(pid)
        starts = process is not None and kind is EventKind.CONTROL_START
        path = self._programs.get(process.id) if process is not None and starts else None
        whom = {"pid": pid, "role": Role.CONTROL} if process is None else names_of(process)
        event = self._log.note(kind, EventSource.DBUS, at_us=at_us, **whom, text=path)
        self._control_events.setdefault(pid, []).append(event)

    # Who is there ----------------------------------------------------------------------------

    def take_unseen(self, found: Iterable[WatchedProcess]) -> None:
        """Take processes of which somebody else tells, and that are gone."""
        for process in found:
            self._remember(process)

    def note_leftover(self, process: WatchedProcess) -> None:
        """It runs after the stop; who looks again says it no second time."""
        if process.id not in self._leftovers:
            self._leftovers.add(process.id)
            self._log.note(EventKind.LEFTOVER, EventSource.CGROUP, process)

    def release(self, identity: ProcessId) -> None:
        """All is known of an end: its pidfd has nothing to add."""
        if self._pidfds is not None:
            self._pidfds.release(identity)

    def still_watched(self) -> frozenset[ProcessId]:
        """Those that have not been reaped yet."""
        return self._pidfds.watching() if self._pidfds is not None else frozenset()

    def survivors(self) -> Iterator[WatchedProcess]:
        """Those that run now, after one more walk."""
        self.rescan()
        for identity, process in sorted(self._known.items()):
            if processes.is_running(identity) and self._is_inside(identity.pid):
                yield process

    def _is_inside(self, pid: int) -> bool:
        """Whether it is in the unit still: one that was moved elsewhere is no left-over."""
        path = cgroups.read_process_cgroup(pid)
        return path is None or pid in self._held or self._is_path_inside(path)

    def _is_path_inside(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self._group}/")


def _is_name_before_exec(comm: str) -> bool:
    """Whether a child of the manager has its own program's name not yet, as it was last seen.

    It is called as the manager, as its executor or the number of the file that this is run by,
    or by the command in parentheses.
    """
    names = NO_NAME, "systemd", "systemd-executo"
    return comm in names or comm.isdecimal() or comm.startswith("(")


def _ticks_at(at_us: int) -> int:
    """The start time of a process that was born then, as /proc/PID/stat has it."""
    asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return (at_us * 1000 + asleep_ns) * os.sysconf("SC_CLK_TCK") // 1_000_000_000
