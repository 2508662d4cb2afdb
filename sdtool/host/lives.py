"""What the kernel's record tells of the processes of one unit, as events of its stop."""

from __future__ import annotations

import os
from collections.abc import Callable

from sdtool.host.ends import Ends
from sdtool.host.eventlog import EventLog
from sdtool.host.members import Members
from sdtool.model.kernel import (
    KernelEvent,
    ListenerClosed,
    SignalDelivered,
    SignalGenerated,
    SignalResult,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.stop import EventKind
from sdtool.sources import processes

PENDING = "it was pending already"
LATE = "it was ending already"
BY_KERNEL = "the kernel sent it by itself"

COMM_LENGTH = 15
"""The bytes of a process's name: TASK_COMM_LEN of the kernel, without the final zero."""


class Lives:
    """Hears what happened to the processes of a unit, and puts it into its log.

    Args:
        close_port: Called with a listener that is closed.

    Attributes:
        manager: Its process; None when that is not known.
    """

    def __init__(
        self,
        log: EventLog,
        members: Members,
        ends: Ends,
        close_port: Callable[[ListenerClosed], None],
    ) -> None:
        self._log = log
        self._members = members
        self._ends = ends
        self._close_port = close_port
        self._names: dict[int, str] = {}
        self.manager: int | None = None

    def take(self, event: KernelEvent) -> None:
        """Take one event; they come in the order of their time."""
        if isinstance(event, TaskBorn):
            self._ends.forget(event.pid)
            self._members.meet_born(event, by_manager=event.maker == self.manager)
        elif isinstance(event, TaskMoved):
            self._members.meet_moved(event)
        elif isinstance(event, TaskExecuted):
            self._on_exec(event)
        elif isinstance(event, TaskEnded):
            self._ends.take_told(event)
        elif isinstance(event, SignalGenerated):
            self._on_signal(event)
        elif isinstance(event, SignalDelivered):
            self._note(EventKind.SIGNAL_DELIVERED, event, signal=event.signal)
        else:
            self._close_port(event)

    def _on_exec(self, event: TaskExecuted) -> None:
        self._members.rename(event.pid, _comm_of(event), event.path)
        self._note(EventKind.PROCESS_EXEC, event, text=event.path)

    def _on_signal(self, event: SignalGenerated) -> None:
        is_dropped = event.result is SignalResult.IGNORED
        ignores = is_dropped and self._members.ignores(event.pid, event.signal)
        sent = {
            "signal": event.signal,
            "sender_pid": event.sender,
            "sender_comm": self._name(event.sender),
        }
        text = LATE if is_dropped and not ignores else PENDING
        if event.by_kernel:
            text = BY_KERNEL
        is_plain = event.result is SignalResult.DELIVERED or ignores
        said = None if is_plain and not event.by_kernel else text
        self._note(EventKind.SIGNAL_SENT, event, **sent, text=said)
        if ignores:
            self._note(EventKind.SIGNAL_IGNORED, event, **sent)

    def _name(self, pid: int) -> str | None:
        """The name of who sent a signal; it may be gone by now."""
        known = self._members.find(pid)
        if known is not None:
            return known.comm
        if pid not in self._names:
            sender = processes.read_process(pid)
            self._names[pid] = sender.comm if sender is not None else ""
        return self._names[pid] or None

    def _note(self, kind: EventKind, event: KernelEvent, **fields: object) -> None:
        process = self._members.find(event.pid)
        if process is None:
            return
        self._log.note(
            kind,
            event.source,
            at_us=event.at_us,
            pid=process.pid,
            comm=process.comm,
            role=process.role,
            **fields,
        )


def _comm_of(event: TaskExecuted) -> str | None:
    """What a process is called since it runs another program: by the kernel's rule if it is gone.

    Some programs rename themselves at once: that is what people know them by.
    """
    facts = processes.read_process(event.pid)
    if facts is not None:
        return facts.comm
    name = os.fsencode((event.path or "").rpartition("/")[2])[:COMM_LENGTH]
    return os.fsdecode(name) or None
