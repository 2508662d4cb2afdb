"""What the kernel's record tells of the processes of one unit, as events of its stop."""

from __future__ import annotations

from collections.abc import Callable

from sdtool.analysis.phases import SIGKILL
from sdtool.host.ends import Ends
from sdtool.host.eventlog import EventLog
from sdtool.host.members import Members
from sdtool.host.record import UnitRecord
from sdtool.model.kernel import (
    KernelEvent,
    ListenerClosed,
    SignalDelivered,
    SignalGenerated,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.process import ProcessId
from sdtool.model.stop import EventKind, SignalResult, WatchedProcess
from sdtool.sources import processes


class Lives:
    """Hears what happened to the processes of a unit, and puts it into its log.

    Args:
        close_port: Called with a listener that is closed.
    """

    def __init__(
        self,
        log: EventLog,
        members: Members,
        ends: Ends,
        record: UnitRecord,
        close_port: Callable[[ListenerClosed], None],
    ) -> None:
        self._log = log
        self._members = members
        self._ends = ends
        self._record = record
        self._close_port = close_port
        self._killed: set[ProcessId] = set()
        self._senders: dict[int, tuple[int, str | None]] = {}

    def take(self, event: KernelEvent) -> None:
        """Take one event; they come in the order of their time."""
        if isinstance(event, TaskBorn):
            self._senders.pop(event.pid, None)
            by_manager = event.maker == self._record.manager
            self._members.meet_born(event, by_manager=by_manager)
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
        process = self._find(event)
        if process is not None:
            self._members.rename(process, _comm_of(event, process), event.path)
            self._note(EventKind.PROCESS_EXEC, event, text=event.path)

    def _on_signal(self, event: SignalGenerated) -> None:
        process = self._find(event)
        if process is None:
            return
        pid, comm = (None, None) if event.by_kernel else self._find_sender(event.sender)
        sent = {
            "signal": event.signal,
            "sender_pid": pid,
            "sender_comm": comm,
            "result": event.result,
        }
        self._note(EventKind.SIGNAL_SENT, event, **sent)
        dropped = event.result is SignalResult.IGNORED and process.id not in self._killed
        if event.signal == SIGKILL:
            self._killed.add(process.id)  # it acts on nothing any more, and ignores nothing
        if dropped and self._members.ignores(process, event.signal):
            self._note(EventKind.SIGNAL_IGNORED, event, **sent)

    def _find_sender(self, task: int) -> tuple[int, str | None]:
        """The process that a signal comes from, and its name; it may be gone by now."""
        known = self._members.find(task)
        if known is not None:
            return known.pid, known.comm
        if task not in self._senders:
            pid = processes.read_thread_group(task) or task
            facts = processes.read_process(pid)
            self._senders[task] = pid, facts.comm if facts is not None else None
        return self._senders[task]

    def _find(self, event: KernelEvent) -> WatchedProcess | None:
        """Whom an event happened to."""
        return self._members.find(event.pid, event.at_us)

    def _note(self, kind: EventKind, event: KernelEvent, **fields: object) -> None:
        process = self._find(event)
        if process is not None:
            self._log.note(kind, event.source, process, at_us=event.at_us, **fields)


def _comm_of(event: TaskExecuted, process: WatchedProcess) -> str | None:
    """What a process is called since it runs another program: by the kernel's rule if it is gone.

    Some programs rename themselves at once: that is what people know them by.
    """
    facts = processes.read_process(event.pid)
    if facts is not None and facts.id == process.id:
        return facts.comm
    return processes.name_after_exec(event.path) if event.path else None
