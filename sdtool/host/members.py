"""The processes of one unit while it stops: found in its cgroup, or told by the kernel's record.

The record knows who was born, and when; walks of the cgroup find who is there. Where there is no
record the walks are all there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from sdtool.analysis.signals import predict
from sdtool.host.eventlog import EventLog, now_us
from sdtool.model.kernel import TaskBorn, TaskMoved
from sdtool.model.process import Disposition, ProcessFacts, ProcessId, ProcessRef, Role
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

BORN_LATE = Disposition.UNKNOWN, "it was born during the stop"

ADOPT_WAIT_US = 20_000
"""How long a process that a walk has found is kept back: for its name, and for the moment of its
birth where the record tells that."""

Adopt = Callable[[int, frozenset[int]], None]
"""Called with the pid and the tasks of a process that was found."""


class Members:
    """Every process that was seen in the unit, each once, with its role.

    Args:
        pidfds: Watches their exits; None when that is switched off.

    Attributes:
        adopt: Tells the kernel's record whom to tell of; None where there is no record.
        leave: Tells it of whom no more.
    """

    def __init__(
        self,
        mount: CgroupMount,
        details: UnitDetails,
        log: EventLog,
        pidfds: PidfdObserver | None,
    ) -> None:
        self._mount = mount
        self._details = details
        self._log = log
        self._pidfds = pidfds
        # What has no kill policy (a slice) has no processes of its own: its units have.
        self._group = details.unit.control_group if details.policy else None
        self._known: dict[ProcessId, WatchedProcess] = {}
        self._by_pid: dict[int, ProcessId] = {}
        self._looked_at: frozenset[int] = frozenset()
        self._control_pid = details.control_pid
        held = (details.unit.main_pid, details.control_pid)
        self._held = frozenset(pid for pid in held if pid is not None)
        self._unwatched: set[ProcessId] = set()
        self._untold: dict[ProcessId, int] = {}
        self._told_control: set[int] = set()
        self._programs: dict[int, str] = {}
        self._frozen: frozenset[str] = frozenset()
        self._missed: list[Event] = []
        self._closed = False
        self._walked_us = now_us()
        self.adopt: Adopt | None = None
        self.leave: Callable[[int], None] | None = None

    @property
    def known(self) -> tuple[WatchedProcess, ...]:
        """All that were seen, in the order they were."""
        return tuple(self._known.values())

    def find(self, pid: int) -> WatchedProcess | None:
        """The last process that was seen under a pid."""
        identity = self._by_pid.get(pid)
        return None if identity is None else self._known[identity]

    def name_of(self, pid: int) -> str | None:
        """The name of a process that was seen."""
        process = self.find(pid)
        return None if process is None else process.comm

    # Walks of the cgroup ---------------------------------------------------------------------

    def take_stock(self) -> None:
        """See what is there before the stop, until two walks agree."""
        if self._group is not None:
            groups = cgroups.read_tree(self._mount, self._group).members
            self._frozen = cgroups.read_frozen(self._mount, groups)
        while self._walk(born_now=False):
            pass

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
        self._looked_at = pids
        for pid in gone:
            self._look_after(pid)
        if self._pidfds is not None and new:
            make_room_for_descriptors(len(new))
        for pid in sorted(new):
            # First of all the pidfd: one that was born just now may be gone in a moment.
            facts = processes.read_process(pid)
            if facts is not None and not self._is_known(facts.id):
                self._meet(facts, now_us() if born_now else None)
        self._miss(pids, last_us)
        return bool(new)

    def _read_pids(self) -> frozenset[int]:
        """Those in the cgroup, and those that the manager has a hold of wherever they are.

        A main process can be in a session's scope (PAMName=), or wherever PIDFile= names it.
        """
        inside = cgroups.read_pids(self._mount, self._group) if self._group else frozenset[int]()
        outside = self._held - inside
        return inside | {pid for pid in outside if processes.read_process(pid) is not None}

    def _look_after(self, pid: int) -> None:
        """Whether who is in the cgroup no more runs elsewhere; most have ended."""
        facts = processes.read_process(pid)
        if facts is None or facts.state in "ZX" or not self._is_known(facts.id):
            return
        if pid in self._held:
            return
        if not self._is_path_inside(facts.control_group or self._group or ""):
            self.note_left(pid)
            if self.leave is not None:
                self.leave(pid)

    def _is_known(self, identity: ProcessId) -> bool:
        """Whether it was met; what the record tells has a start time that may be a tick off."""
        before = self._by_pid.get(identity.pid)
        return before is not None and abs(before.start_ticks - identity.start_ticks) <= 1

    def _meet(self, facts: ProcessFacts, seen_us: int | None) -> None:
        role = self._role_of(facts.id.pid)
        watched = self._pidfds is not None and self._pidfds.watch(facts.id, facts.comm, role)
        if not watched:
            self._unwatched.add(facts.id)
        born_now = seen_us is not None
        disposition, reason = BORN_LATE if born_now else self._predict(facts)
        self._know(
            facts.id,
            WatchedProcess(
                pid=facts.id.pid,
                start_ticks=facts.id.start_ticks,
                comm=facts.comm,
                role=role,
                disposition=disposition,
                disposition_reason=reason,
                seen_us=seen_us,
            ),
        )
        if born_now:
            self._untold[facts.id] = now_us()
        if self.adopt is None:
            return
        tasks = frozenset(processes.read_tasks(facts.id.pid))
        # The first one has ended where it is a zombie: the process is what the others are.
        ended = {facts.id.pid} if facts.state in "ZX" else set()
        self.adopt(facts.id.pid, tasks - ended)

    def _know(self, identity: ProcessId, process: WatchedProcess) -> None:
        self._known[identity] = process
        self._by_pid[identity.pid] = identity

    def _note_birth(self, identity: ProcessId, source: EventSource) -> None:
        process = self._known[identity]
        self._log.note(
            EventKind.PROCESS_NEW,
            source,
            at_us=process.seen_us,
            pid=process.pid,
            comm=process.comm,
            role=process.role,
        )

    def settle(self) -> None:
        """Tell of those that a walk has found, and of whose birth the record says nothing.

        A moment after it was made a process runs its own program, and has its name.
        """
        now = now_us()
        for identity, found_us in tuple(self._untold.items()):
            if now - found_us > ADOPT_WAIT_US:
                del self._untold[identity]
                self._read_name(identity.pid)
                self._note_birth(identity, EventSource.CGROUP)

    def _read_name(self, pid: int) -> None:
        """Read its name once more; that of one that is gone stays."""
        facts = processes.read_process(pid)
        if facts is not None and self._is_known(facts.id):
            self.rename(pid, facts.comm, None)

    def _predict(self, facts: ProcessFacts) -> tuple[Disposition, str]:
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
                pid=process.pid,
                comm=process.comm,
                role=process.role,
                text="it is gone from the cgroup; nobody could see how it ended",
            )
            self._missed.append(missed)

    def take_missed(self) -> list[Event]:
        """The ends that walks have found since the last call."""
        missed, self._missed = self._missed, []
        return missed

    # The kernel's record ---------------------------------------------------------------------

    def meet_born(
        self, event: TaskBorn, *, by_manager: bool, forget: Callable[[int], None] | None = None
    ) -> None:
        """Take note of a birth, of a process that may be gone again.

        Args:
            by_manager: The manager made it: it runs a command of the unit.
            forget: Called with the pid before it stands for a process that was not met yet.
        """
        if self._closed:
            return
        facts = processes.read_process(event.pid)
        ticks = _ticks_at(event.at_us)
        if facts is None or abs(facts.id.start_ticks - ticks) > 1:
            identity, comm = ProcessId(pid=event.pid, start_ticks=ticks), event.comm or "?"
        else:
            identity, comm = facts.id, facts.comm
        if self._is_known(identity):
            self._note_time_of_birth(self._by_pid[event.pid], event)
            return
        if forget is not None:
            forget(event.pid)
        role = Role.CONTROL if by_manager else self._role_of(event.pid)
        if facts is not None and facts.id == identity and self._pidfds is not None:
            self._pidfds.watch(identity, comm, role)
        self._know(identity, _late_born(identity, comm, role, event.at_us))
        self._note_birth(identity, event.source)

    def _note_time_of_birth(self, identity: ProcessId, event: TaskBorn) -> None:
        """A walk has found it first: when it was born is known now."""
        if self._untold.pop(identity, None) is None:
            return
        self._known[identity] = replace(self._known[identity], seen_us=event.at_us)
        self._note_birth(identity, event.source)

    def meet_moved(self, event: TaskMoved) -> None:
        """Take note of a process that was moved into the unit, or out of it."""
        if not self._is_path_inside(event.control_group):
            self._note_move(event.pid)
            return
        facts = processes.read_process(event.pid)
        if facts is not None and not self._is_known(facts.id) and not self._closed:
            self._meet(facts, event.at_us)

    def _note_move(self, pid: int) -> None:
        """It was moved out; who runs a command of the unit is its own all the same."""
        process = self.find(pid)
        if process is None or process.role is Role.OTHER:
            self.note_left(pid)
            return
        self._held |= {pid}
        if self.adopt is not None:
            self.adopt(pid, frozenset(processes.read_tasks(pid)))

    def note_left(self, pid: int) -> None:
        """It was moved out of the unit: nobody waits for its end."""
        identity = self._by_pid.get(pid)
        if identity is None:
            return
        self._known[identity] = replace(self._known[identity], has_left=True)
        self._unwatched.discard(identity)
        self.release(pid)

    def rename(self, pid: int, comm: str | None, path: str | None) -> None:
        """It runs another program."""
        if path is not None:
            self._programs[pid] = path
        identity = self._by_pid.get(pid)
        if identity is not None and comm is not None:
            self._known[identity] = replace(self._known[identity], comm=comm)

    def ignores(self, pid: int, signal: str) -> bool:
        """Whether a process ignores a signal that the kernel did not deliver to it.

        It may be on its way to its end as well.
        """
        process, policy = self.find(pid), self._details.policy
        facts = processes.read_process(pid)
        if process is None or facts is None or facts.state in "ZX":
            return False
        stop_signal = policy.kill_signal if policy is not None else None
        if signal == stop_signal and process.disposition is Disposition.IGNORES:
            return True
        masked = replace(facts, masks=processes.read_masks(pid, facts.state))
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
        if self.adopt is not None and pid not in self._by_pid:
            self.adopt(pid, frozenset())  # it is gone already, and the record has all of it
        process = self.find(pid)
        if process is not None and process.role is not Role.CONTROL:
            # The walk met it before its role was known.
            identity = self._by_pid[pid]
            self._known[identity] = replace(process, role=Role.CONTROL)
            if self._pidfds is not None:
                self._pidfds.note_role(identity, Role.CONTROL)
        self._read_name(pid)
        self._note_control(EventKind.CONTROL_START, pid, at_us, self._programs.get(pid))

    def meet_command(self, command: StopCommand) -> None:
        """Take the manager's word on a command that ran, which may have been too short to see."""
        pid, started_us = command.pid, command.started_us
        if pid is None or started_us is None:
            return
        if self.adopt is not None and pid not in self._by_pid:
            self.adopt(pid, frozenset())
        if pid not in self._by_pid:
            self._know_command(pid, started_us, command)
        if pid not in self._told_control:
            path = self._programs.get(pid, command.argv[0] if command.argv else None)
            self._note_control(EventKind.CONTROL_START, pid, started_us, path)

    def _know_command(self, pid: int, started_us: int, command: StopCommand) -> None:
        identity = ProcessId(pid=pid, start_ticks=_ticks_at(started_us))
        path = command.argv[0] if command.argv else "?"
        comm = path.rpartition("/")[2]
        self._know(identity, _late_born(identity, comm, Role.CONTROL, started_us))

    def _note_control(
        self, kind: EventKind, pid: int, at_us: int, path: str | None = None
    ) -> None:
        self._told_control.add(pid)
        self._log.note(
            kind,
            EventSource.DBUS,
            at_us=at_us,
            pid=pid,
            comm=self.name_of(pid),
            role=Role.CONTROL,
            text=path,
        )

    # Who is there ----------------------------------------------------------------------------

    def take_unseen(self, found: Iterable[WatchedProcess]) -> None:
        """Take processes of which somebody else tells, and that are gone."""
        for process in found:
            identity = ProcessId(pid=process.pid, start_ticks=process.start_ticks)
            self._know(identity, process)

    def note_leftover(self, pid: int) -> None:
        """It runs after the stop."""
        process = self.find(pid)
        if process is not None:
            self._log.note(
                EventKind.LEFTOVER,
                EventSource.CGROUP,
                pid=pid,
                comm=process.comm,
                role=process.role,
            )

    def release(self, pid: int) -> None:
        """All is known of an end: its pidfd has nothing to add."""
        identity = self._by_pid.get(pid)
        if identity is not None and self._pidfds is not None:
            self._pidfds.release(identity)

    def still_watched(self) -> frozenset[ProcessId]:
        """Those that have not been reaped yet."""
        return self._pidfds.watching() if self._pidfds is not None else frozenset()

    def survivors(self) -> Iterator[ProcessRef]:
        """Those that run now, after one more walk."""
        self.rescan()
        for identity, process in sorted(self._known.items()):
            if processes.is_running(identity) and self._is_inside(identity.pid):
                yield ProcessRef(pid=process.pid, comm=process.comm)

    def _is_inside(self, pid: int) -> bool:
        """Whether it is in the unit still: one that was moved elsewhere is no left-over."""
        path = cgroups.read_process_cgroup(pid)
        return path is None or pid in self._held or self._is_path_inside(path)

    def _is_path_inside(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self._group}/")


def _ticks_at(at_us: int) -> int:
    """The start time of a process that was born then, as /proc/PID/stat has it."""
    asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return (at_us * 1000 + asleep_ns) * os.sysconf("SC_CLK_TCK") // 1_000_000_000


def _late_born(identity: ProcessId, comm: str, role: Role, at_us: int) -> WatchedProcess:
    """A process that was born after the request: nobody predicted anything of it."""
    return WatchedProcess(
        pid=identity.pid,
        start_ticks=identity.start_ticks,
        comm=comm,
        role=role,
        disposition=BORN_LATE[0],
        disposition_reason=BORN_LATE[1],
        seen_us=at_us,
    )
