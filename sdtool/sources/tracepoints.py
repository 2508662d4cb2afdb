"""Which of the kernel's trace points tell how processes live and end, and what each says.

Births come from task_newtask, which tells threads from processes and says where CLONE_INTO_CGROUP
has made one elsewhere. Of signals those are recorded that end processes, and those that are asked
for: what programs say to each other (SIGCHLD, SIGURG) is too much, and SIGCONT follows each
SIGTERM of systemd's.

Source: the format files, and include/trace/events/ of the kernel: task.h, sched.h, cgroup.h,
signal.h, sock.h; include/uapi/linux/sched.h for the flags of clone(2).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping

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
from sdtool.model.process import signal_name, signal_number
from sdtool.model.stop import EventSource, SignalResult
from sdtool.sources.processes import is_initial_pid_namespace
from sdtool.sources.tracefs import Trace, explain_refusal
from sdtool.sources.tracepages import TraceEvent, Value

CLONE_THREAD = 0x00010000
CLONE_INTO_CGROUP = 0x200000000

UNIFIED_ROOT = 0
"""The number of the cgroup2 hierarchy among all, as in the 0:: line of /proc/PID/cgroup."""

SENT_BY_TASKS = frozenset({0, -1, -6})
"""Codes of signals that a task has sent: SI_USER, SI_QUEUE, SI_TKILL; others are the kernel's.

What a task has the kernel do for it counts as sent by it: writing cgroup.kill, or ending as the
parent of who has set PR_SET_PDEATHSIG.
"""

SIG_IGN = 1
"""The highest of the handlers that are none: SIG_DFL is 0."""

TCP_CLOSE, TCP_LISTEN = 7, 10

GENERATE, DELIVER = "signal/signal_generate", "signal/signal_deliver"

REQUIRED = frozenset(
    {"task/task_newtask", "sched/sched_process_exec", "sched/sched_process_exit"}
    | {GENERATE, DELIVER}
)
"""Without one of these the trace does not tell how a stop went."""

OUTSIDE = "what is traced cannot be told apart: this is not the initial pid namespace"

GIVES = "signals with sender and target, births and ends, by the kernel's clock"

HARMLESS_SIGNALS = frozenset({"SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"})
"""What neither ends nor stops a process by default, and is sent all the time."""

RESULTS = {
    0: SignalResult.DELIVERED,
    1: SignalResult.IGNORED,
    2: SignalResult.ALREADY_PENDING,
    3: SignalResult.OVERFLOW_FAIL,
    4: SignalResult.LOSE_INFO,
}


def trace_events(signals: Iterable[str], own_pid: int) -> dict[str, str | None]:
    """The events to record, each with its filter, for ``tracefs.Trace``.

    Args:
        signals: By name, of the harmless ones: those that may end a unit, say.
        own_pid: Our own: a SIGCONT to it is recorded too, to see whether it comes.
    """
    return {
        "task/task_newtask": None,
        "cgroup/cgroup_attach_task": f"dst_root == {UNIFIED_ROOT}",
        "sched/sched_process_exec": None,
        "sched/sched_process_exit": None,
        # A connection that comes in leaves the state of its listener too, for another one.
        "sock/inet_sock_set_state": f"oldstate == {TCP_LISTEN} && newstate == {TCP_CLOSE}",
        **_signal_filters(signals, own_pid),
    }


def _signal_filters(signals: Iterable[str], own_pid: int) -> dict[str, str]:
    harmless = sorted(map(signal_number, HARMLESS_SIGNALS - set(signals)))
    wanted = " && ".join(f"sig != {number}" for number in harmless) or "sig != 0"
    proof = f"sig == {signal_number('SIGCONT')} && pid == {own_pid}"
    return {
        GENERATE: f"({wanted}) || ({proof})",
        # The end of a process is one more delivery, of SIGKILL, but with no handler.
        DELIVER: f"({wanted}) && sa_handler > {SIG_IGN}",
    }


class KernelTrace:
    """The trace of how processes live and end, tried out before it is trusted.

    In a pid namespace of its own even root sees pids that it cannot place, and a lockdown of the
    kernel may leave an instance to be made and nothing to be read.

    Raises:
        OSError: There is no trace for us; ``explain_refusal`` says why.
    """

    def __init__(self) -> None:
        if not is_initial_pid_namespace():
            # Nothing may be touched either: whose instances there are could not be told.
            raise OSError(errno.EXDEV, OUTSIDE)
        self._trace = Trace(trace_events((), os.getpid()))
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def _try_out(self) -> None:
        lacking = REQUIRED & set(self._trace.missing)
        if lacking:
            sentence = f"this kernel does not trace {', '.join(sorted(lacking))}"
            raise OSError(errno.ENOSYS, sentence)
        os.kill(os.getpid(), signal.SIGCONT)
        self._first = self._read()
        if not any(map(_is_proof, self._first)):
            raise OSError(errno.EXDEV, OUTSIDE)

    @property
    def lost(self) -> int:
        """How many events were overwritten before they were read."""
        return self._trace.lost

    @property
    def complete_us(self) -> int:
        """What happened until then has been read, or is lost."""
        return self._trace.complete_ns // 1000

    def record_signals(self, signals: Iterable[str]) -> None:
        """Record these signals too from now on, of the harmless ones.

        Raises:
            OSError: The kernel does not take the filter.
        """
        for event, condition in _signal_filters(signals, os.getpid()).items():
            self._trace.narrow(event, condition)

    def read(self) -> list[KernelEvent]:
        """The events since the last call; one that happened before it began comes with it."""
        first, self._first = self._first, []
        return [event for event in (*first, *self._read()) if not _is_proof(event)]

    def _read(self) -> list[KernelEvent]:
        parsed = map(parse_trace_event, self._trace.read())
        return [event for event in parsed if event is not None]

    def close(self) -> None:
        """Stop recording, and leave nothing behind; it takes some 40 ms."""
        self._trace.close()


def _is_proof(event: KernelEvent) -> bool:
    """Whether it is the SIGCONT that we have sent to ourselves, from whatever thread."""
    is_cont = isinstance(event, SignalGenerated) and event.signal == "SIGCONT"
    return is_cont and event.pid == os.getpid()


def probe_trace() -> tuple[bool, str]:
    """Whether there is a trace for us, and why not."""
    try:
        KernelTrace().close()
    except OSError as error:
        return False, explain_refusal(error)
    return True, GIVES


def parse_trace_event(event: TraceEvent) -> KernelEvent | None:
    """What an event of the trace says; None for one that is of no use."""
    parse = PARSERS.get(event.name)
    return parse(event.at_ns // 1000, event.pid, event.values) if parse else None


def _born(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    flags = _number(values, "clone_flags")
    return TaskBorn(
        at_us=at_us,
        source=EventSource.TRACEFS,
        pid=_number(values, "pid"),
        maker=pid,
        comm=_text(values, "comm"),
        is_thread=bool(flags & CLONE_THREAD),
        is_elsewhere=bool(flags & CLONE_INTO_CGROUP),
    )


def _moved(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    path = _text(values, "dst_path")
    moved = _number(values, "pid")
    return TaskMoved(at_us=at_us, source=EventSource.TRACEFS, pid=moved, control_group=path)


def _executed(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    return TaskExecuted(
        at_us=at_us,
        source=EventSource.TRACEFS,
        pid=_number(values, "pid"),
        before=_number(values, "old_pid"),
        path=_text(values, "filename"),
    )


def _ended(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    ended = _number(values, "pid")
    return TaskEnded(at_us=at_us, source=EventSource.TRACEFS, pid=ended, status=None)


def _generated(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    return SignalGenerated(
        at_us=at_us,
        source=EventSource.TRACEFS,
        pid=_number(values, "pid"),
        sender=pid,
        signal=signal_name(_number(values, "sig")),
        result=RESULTS.get(_number(values, "result")),
        by_kernel=_number(values, "code") not in SENT_BY_TASKS,
    )


def _delivered(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    signal = signal_name(_number(values, "sig"))
    return SignalDelivered(at_us=at_us, source=EventSource.TRACEFS, pid=pid, signal=signal)


def _closed(at_us: int, pid: int, values: Mapping[str, Value]) -> KernelEvent:
    if _number(values, "family") == socket.AF_INET:
        raw, family = values["saddr"], socket.AF_INET
    else:
        raw, family = values["saddr_v6"], socket.AF_INET6
    packed = raw.to_bytes(4, sys.byteorder) if isinstance(raw, int) else raw
    return ListenerClosed(
        at_us=at_us,
        source=EventSource.TRACEFS,
        pid=pid,
        address=socket.inet_ntop(family, packed),
        port=_number(values, "sport"),
    )


PARSERS: Mapping[str, Callable[[int, int, Mapping[str, Value]], KernelEvent]] = {
    "task_newtask": _born,
    "cgroup_attach_task": _moved,
    "sched_process_exec": _executed,
    "sched_process_exit": _ended,
    "signal_generate": _generated,
    "signal_deliver": _delivered,
    "inet_sock_set_state": _closed,
}


def _number(values: Mapping[str, Value], name: str) -> int:
    value = values[name]
    return value if isinstance(value, int) else 0


def _text(values: Mapping[str, Value], name: str) -> str:
    value = values[name]
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)
