"""The processes of one unit while it stops: found by walking its cgroup, watched by pidfd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sdtool.analysis import membership
from sdtool.analysis.signals import predict
from sdtool.host.eventlog import EventLog, now_us
from sdtool.model.process import Disposition, ProcessFacts, ProcessId, ProcessRef, Role
from sdtool.model.stop import EventKind, EventSource, Evidence, WatchedProcess
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups, processes
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.pidfds import PidfdObserver, make_room_for_descriptors


class Members:
    """Every process that was seen in the unit, each once, with its role.

    Args:
        pidfds: Watches their exits; None when that is switched off.
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
        self._looked_at: frozenset[int] = frozenset()
        self._control_pid = details.control_pid
        self._unwatched: set[ProcessId] = set()
        self._closed = False
        self._walked_us = now_us()

    @property
    def known(self) -> tuple[WatchedProcess, ...]:
        """All that were seen, in the order they were."""
        return tuple(self._known.values())

    def name_of(self, pid: int) -> str | None:
        """The name of a process that was seen."""
        return next((p.comm for p in self._known.values() if p.pid == pid), None)

    def take_stock(self) -> None:
        """See what is there before the stop, until two walks agree."""
        while self._walk(born_now=False):
            pass

    def rescan(self) -> None:
        """Look for processes that were born, or have gone, since the last walk."""
        self._walk(born_now=True)

    def stop_adopting(self) -> None:
        """The unit has been started again: whoever is born from now on is not of this stop."""
        self._closed = True

    def _walk(self, *, born_now: bool) -> bool:
        """Walk the cgroup once; whether there was anybody new."""
        if self._group is None or self._closed:
            return False
        last_us, self._walked_us = self._walked_us, now_us()
        pids = cgroups.read_pids(self._mount, self._group)
        new = pids - self._looked_at
        # A pid that has left can come back as another process.
        self._looked_at = pids
        if self._pidfds is not None and new:
            make_room_for_descriptors(len(new))
        for pid in sorted(new):
            # First of all the pidfd: one that was born just now may be gone in a moment.
            facts = processes.read_process(pid)
            if facts is not None and facts.id not in self._known:
                self._meet(facts, born_now=born_now)
        self._miss(pids, last_us)
        return bool(new)

    def _meet(self, facts: ProcessFacts, *, born_now: bool) -> None:
        role = self._role_of(facts.id.pid)
        watched = self._pidfds is not None and self._pidfds.watch(facts.id, facts.comm, role)
        if not watched:
            self._unwatched.add(facts.id)
        process = WatchedProcess(
            pid=facts.id.pid,
            start_ticks=facts.id.start_ticks,
            comm=facts.comm,
            role=role,
            disposition=Disposition.UNKNOWN if born_now else self._predict(facts),
            seen_us=now_us() if born_now else None,
        )
        self._known[facts.id] = process
        if born_now:
            self._log.note(
                EventKind.PROCESS_NEW,
                EventSource.CGROUP,
                at_us=process.seen_us,
                pid=process.pid,
                comm=process.comm,
                role=process.role,
            )

    def _predict(self, facts: ProcessFacts) -> Disposition:
        policy = self._details.policy
        if policy is None:
            return Disposition.UNKNOWN
        masked = replace(facts, masks=processes.read_masks(facts.id.pid, facts.state))
        return predict(masked, policy.kill_signal)[0]

    def _miss(self, pids: frozenset[int], last_us: int) -> None:
        """Note the end of those that no pidfd watches: it lies between two walks."""
        for identity in [one for one in self._unwatched if one.pid not in pids]:
            self._unwatched.discard(identity)
            process = self._known[identity]
            self._log.note(
                EventKind.PROCESS_EXIT,
                EventSource.CGROUP,
                at_us=self._walked_us,
                evidence=Evidence.INFERRED,
                at_min_us=last_us,
                at_max_us=self._walked_us,
                pid=process.pid,
                comm=process.comm,
                role=process.role,
                text="it is gone from the cgroup; nobody could see how it ended",
            )

    def _role_of(self, pid: int) -> Role:
        if pid == self._control_pid:
            return Role.CONTROL
        return membership.role_of(pid, self._details)

    def follow_control(self, pid: int | None, at_us: int) -> None:
        """Take the manager's word on which process runs a command of ExecStop= or the like."""
        before, self._control_pid = self._control_pid, pid
        if before is not None:
            self._note_control(EventKind.CONTROL_EXIT, before, at_us)
        if pid is None:
            return
        self.rescan()
        for identity, process in self._known.items():
            if identity.pid == pid and process.role is not Role.CONTROL:
                # The walk met it before its role was known.
                self._known[identity] = replace(process, role=Role.CONTROL)
                if self._pidfds is not None:
                    self._pidfds.note_role(identity, Role.CONTROL)
        self._note_control(EventKind.CONTROL_START, pid, at_us)

    def _note_control(self, kind: EventKind, pid: int, at_us: int) -> None:
        comm = self.name_of(pid)
        self._log.note(kind, EventSource.DBUS, at_us=at_us, pid=pid, comm=comm, role=Role.CONTROL)

    def still_watched(self) -> frozenset[ProcessId]:
        """Those that have not been reaped yet."""
        return self._pidfds.watching() if self._pidfds is not None else frozenset()

    def survivors(self) -> Iterator[ProcessRef]:
        """Those that run now, after one more walk."""
        self.rescan()
        for identity, process in sorted(self._known.items()):
            if processes.is_running(identity):
                yield ProcessRef(pid=process.pid, comm=process.comm)
