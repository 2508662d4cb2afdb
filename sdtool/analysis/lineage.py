"""Which unit does a task belong to, and when has a process ended? By births, moves and ends.

A child belongs where the one that made it does; only a manager's own children are moved, or made
elsewhere, and belong nowhere until that is known: what is told of them is kept until then.
A process ends with its last task, which need not be its first one, and with the status of that:
so it is where it was killed or has called exit(3).

The events must come in the order of their time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from sdtool.model.kernel import (
    KernelEvent,
    ListenerClosed,
    SignalGenerated,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.stop import EventSource

Routed = tuple[str, KernelEvent]
"""A unit, and what happened to one of its processes; pids are those of whole processes."""

STRAYS = 1000
"""So many that have ended, and of which it was never known where they belong, are remembered."""


@dataclass(slots=True)
class _Process:
    """One process, as far as it is known.

    Attributes:
        unit: None while it is not known.
        since_us: What was told before is of another one that had its pid.
        tasks: Those that have not ended.
        maker: The process that made it, where that is one of these.
        is_elsewhere: It was made in another cgroup than its maker's.
        last: The task that ended last, once all have; its status is the process's.
        held: What was told of it while its unit was not known.
        children: Those that it made meanwhile, whose unit is not known either.
    """

    pid: int
    unit: str | None
    since_us: int
    tasks: set[int]
    maker: _Process | None = None
    is_elsewhere: bool = False
    last: int | None = None
    held: list[KernelEvent] = field(default_factory=list)
    children: list[_Process] = field(default_factory=list)


class Lineage:
    """The processes of several units, and what becomes of them.

    Args:
        primary: Who tells of births and ends; another source adds the wait statuses.
        managers: The processes whose children are the units'.
        groups: The units by their cgroups.
    """

    def __init__(
        self, primary: EventSource, managers: Collection[int], groups: Mapping[str, str]
    ) -> None:
        self._primary = primary
        self._managers = frozenset(managers)
        self._groups = groups
        self._is_lossy = False
        self._by_task: dict[int, _Process] = {}
        self._strays: dict[int, _Process] = {}
        self._ended: dict[int, _Process] = {}

    def mistrust(self) -> None:
        """The primary source has lost something: ends may be told by the other one alone."""
        self._is_lossy = True

    def rely_on(self, primary: EventSource) -> None:
        """From now on another source tells of births and ends."""
        self._primary = primary

    def leave(self, pid: int) -> None:
        """Forget a process that is in its unit no more, and so those that it makes."""
        process = self._find(pid)
        if process is not None:
            self._forget(process)

    def unit_of(self, control_group: str) -> str | None:
        """The unit that a cgroup is in, None when it is in none of them."""
        path = control_group
        while path:
            if path in self._groups:
                return self._groups[path]
            path = path.rpartition("/")[0]
        return None

    @property
    def strays(self) -> tuple[int, ...]:
        """Processes that run, and of which it is not known where they belong."""
        return tuple(pid for pid, process in self._strays.items() if process.last is None)

    def dismiss(self, pid: int) -> None:
        """Forget a process that is known to belong to none of the units."""
        process = self._strays.pop(pid, None)
        self._ended.pop(pid, None)
        if process is not None:
            self._forget(process)

    def _forget(self, process: _Process) -> None:
        for task in (process.pid, *process.tasks):
            if self._by_task.get(task) is process:
                del self._by_task[task]

    def adopt(self, unit: str, pid: int, tasks: Collection[int], at_us: int) -> list[Routed]:
        """Take note of a process that is in a unit, and hand out what was told of it so far.

        Args:
            tasks: Its tasks, as they were found; none of one that is gone already.
            at_us: When it was found; what happened before may be told later.
        """
        process = self._find(pid)
        if process is not None and process.last is not None and (tasks or process.unit):
            process = None  # what has ended was another one, which had its pid
        if process is None:
            self._strays.pop(pid, None)
            self._ended.pop(pid, None)
            self._add(_Process(pid, unit, at_us, set(tasks) or {pid}))
            return []
        return self._settle(process, unit) if process.unit is None else []

    def _find(self, pid: int) -> _Process | None:
        """The process that has, or had, a pid; a thread of another may have had it as well."""
        process = self._by_task.get(pid)
        return process if process is not None and process.pid == pid else None

    def _add(self, process: _Process) -> None:
        for task in (process.pid, *process.tasks):
            self._by_task[task] = process

    def _settle(self, process: _Process, unit: str) -> list[Routed]:
        """It is known now where a process belongs, and so do those that it has made."""
        routed: list[Routed] = []
        waiting = [process]
        while waiting:
            one = waiting.pop(0)
            if self._strays.get(one.pid) is one:
                del self._strays[one.pid]
                self._ended.pop(one.pid, None)
            one.unit, one.maker = unit, None
            routed += [(unit, event) for event in one.held]
            one.held = []
            waiting += [
                stray
                for stray in one.children
                if stray.unit is None and (stray.last is not None or not stray.is_elsewhere)
            ]
            one.children = []
        return routed

    def feed(self, event: KernelEvent) -> list[Routed]:
        """What an event means for the units; the pids in it are those of processes then."""
        if isinstance(event, TaskBorn):
            return self._on_birth(event) if event.source is self._primary else []
        if isinstance(event, TaskMoved):
            return self._on_move(event)
        if isinstance(event, TaskExecuted):
            return self._on_exec(event) if event.source is self._primary else []
        if isinstance(event, TaskEnded):
            return list(self._on_end(event))
        if isinstance(event, ListenerClosed) and event.pid in self._managers:
            return [(unit, event) for unit in dict.fromkeys(self._groups.values())]
        process = self._by_task.get(event.pid)
        if process is None:
            return []
        if isinstance(event, SignalGenerated):
            event = replace(event, sender=self._process_of(event.sender))
        return self._route(process, event)

    def _process_of(self, task: int) -> int:
        process = self._by_task.get(task)
        return task if process is None else process.pid

    def _route(self, process: _Process, event: KernelEvent) -> list[Routed]:
        event = replace(event, pid=process.pid)
        if process.unit is None:
            process.held.append(event)
            return []
        return [(process.unit, event)]

    def _on_birth(self, event: TaskBorn) -> list[Routed]:
        maker = self._by_task.get(event.maker)
        if event.is_thread:
            self._by_task.pop(event.pid, None)
            if maker is not None:
                maker.tasks.add(event.pid)
                self._by_task[event.pid] = maker
            return []
        found = self._find(event.pid)
        if found is not None and found.last is None and found.since_us >= event.at_us:
            # It was met in its cgroup before this was told.
            found.since_us = event.at_us
            return self._route(found, replace(event, maker=self._process_of(event.maker)))
        # Whoever had its pid has it no more.
        self._strays.pop(event.pid, None)
        self._ended.pop(event.pid, None)
        self._by_task.pop(event.pid, None)
        if maker is None and event.maker not in self._managers:
            return []
        is_inside = maker is not None and not (event.is_elsewhere or maker.pid in self._managers)
        unit = maker.unit if maker is not None and is_inside else None
        process = _Process(event.pid, unit, event.at_us, {event.pid}, maker, event.is_elsewhere)
        self._add(process)
        if unit is None:
            self._strays[process.pid] = process
            if maker is not None and maker.unit is None:
                maker.children.append(process)
        return self._route(process, replace(event, maker=self._process_of(event.maker)))

    def _remember(self, stray: _Process) -> None:
        """Keep one that has ended, for a while: the manager may still say whose it was."""
        self._ended[stray.pid] = stray
        while len(self._ended) > STRAYS:
            self.dismiss(next(iter(self._ended)))

    def _on_move(self, event: TaskMoved) -> list[Routed]:
        unit = self.unit_of(event.control_group)
        process = self._by_task.get(event.pid)
        if process is not None and event.pid in process.tasks - {process.pid}:
            return []  # a thread moves alone only within its process's unit
        if unit is None:
            if process is None or process.unit is None or process.pid != event.pid:
                return []
            self._forget(process)
            return [(process.unit, event)]
        if process is None or process.pid != event.pid or process.last is not None:
            process = _Process(event.pid, None, event.at_us, {event.pid})
            self._add(process)
        if process.unit == unit:
            return []
        return [*self._settle(process, unit), (unit, event)]

    def _on_exec(self, event: TaskExecuted) -> list[Routed]:
        process = self._by_task.get(event.before) or self._by_task.get(event.pid)
        if process is None:
            return []
        for task in process.tasks - {event.pid}:
            self._by_task.pop(task, None)
        process.tasks = {event.pid}
        self._by_task[event.pid] = process
        return self._route(process, event)

    def _on_end(self, event: TaskEnded) -> Iterator[Routed]:
        process = self._by_task.get(event.pid)
        if process is None:
            return
        if event.at_us < process.since_us and process.tasks <= {process.pid}:
            return  # it was found alive after that: this was another one, which had its pid
        if process.last == event.pid:
            yield from self._route(process, event)  # its status, by the other source
            return
        if event.source is not self._primary and not self._is_lossy:
            return
        if event.pid in process.tasks:
            process.tasks.discard(event.pid)
            if not process.tasks:
                process.last = event.pid
                yield from self._route(process, event)
                if process.unit is None and process.maker is not None and process.maker.unit:
                    # Made in another cgroup, by one of a unit: below its own is where it may.
                    yield from self._settle(process, process.maker.unit)
                elif process.unit is None:
                    self._remember(process)
