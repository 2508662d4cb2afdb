"""The processes of one unit while it stops: found by walking its cgroup, watched by pidfd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sdtool.analysis import membership
from sdtool.analysis.signals import predict
from sdtool.host.eventlog import EventLog, now_us
from sdtool.model.process import Disposition, ProcessFacts, ProcessId, ProcessRef, Role
from sdtool.model.stop import EventKind, EventSource, WatchedProcess
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
        self._group = details.unit.control_group
        self._known: dict[ProcessId, WatchedProcess] = {}
        self._looked_at: frozenset[int] = frozenset()
        self._control_pid = details.control_pid

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
        """Look for processes that were born since the last walk."""
        self._walk(born_now=True)

    def _walk(self, *, born_now: bool) -> bool:
        """Walk the cgroup once; whether there was anybody new."""
        if self._group is None:
            return False
        pids = cgroups.read_pids(self._mount, self._group)
        new = pids - self._looked_at
        # A pid that has left can come back as another process.
        self._looked_at = pids
        if self._pidfds is not None and new:
            make_room_for_descriptors(len(new))
        found = [facts for pid in sorted(new) if (facts := processes.read_masked(pid)) is not None]
        for facts in found:
            if facts.id not in self._known:
                self._meet(facts, born_now=born_now)
        return bool(new)

    def _meet(self, facts: ProcessFacts, *, born_now: bool) -> None:
        policy = self._details.policy
        disposition = Disposition.UNKNOWN
        if policy is not None and not born_now:
            disposition, _ = predict(facts, policy.kill_signal)
        process = WatchedProcess(
            pid=facts.id.pid,
            start_ticks=facts.id.start_ticks,
            comm=facts.comm,
            role=self._role_of(facts.id.pid),
            disposition=disposition,
            seen_us=now_us() if born_now else None,
        )
        self._known[facts.id] = process
        if self._pidfds is not None:
            self._pidfds.watch(facts.id, facts.comm, process.role)
        if born_now:
            self._log.note(
                EventKind.PROCESS_NEW,
                EventSource.CGROUP,
                at_us=process.seen_us,
                pid=process.pid,
                comm=process.comm,
                role=process.role,
            )

    def _role_of(self, pid: int) -> Role:
        if pid == self._control_pid:
            return Role.CONTROL
        return membership.role_of(pid, self._details)

    def follow_control(self, pid: int | None) -> None:
        """Take the manager's word on which process runs a command of ExecStop= or the like."""
        before, self._control_pid = self._control_pid, pid
        if before is not None:
            self._note_control(EventKind.CONTROL_EXIT, before)
        if pid is None:
            return
        self.rescan()
        for identity, process in self._known.items():
            if identity.pid == pid and process.role is not Role.CONTROL:
                # The walk met it before its role was known.
                self._known[identity] = replace(process, role=Role.CONTROL)
                if self._pidfds is not None:
                    self._pidfds.note_role(identity, Role.CONTROL)
        self._note_control(EventKind.CONTROL_START, pid)

    def _note_control(self, kind: EventKind, pid: int) -> None:
        comm = self.name_of(pid)
        self._log.note(kind, EventSource.DBUS, pid=pid, comm=comm, role=Role.CONTROL)

    def still_watched(self) -> frozenset[ProcessId]:
        """Those that have not been reaped yet."""
        return self._pidfds.watching() if self._pidfds is not None else frozenset()

    def survivors(self, *, new_ones_too: bool) -> Iterator[ProcessRef]:
        """Those that run now.

        Args:
            new_ones_too: Look for others first; not when the unit has been started again.
        """
        if new_ones_too:
            self.rescan()
        for identity, process in sorted(self._known.items()):
            facts = processes.read_process(identity.pid)
            if facts is not None and facts.id == identity and facts.state not in "ZX":
                yield ProcessRef(pid=process.pid, comm=process.comm)
