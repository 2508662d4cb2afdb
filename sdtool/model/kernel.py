"""What the kernel tells of tasks over time: who was born, moved, signalled, ended, and when.

A task is a thread; the first of a process has the process's pid. All pids are those of the initial
pid namespace. Several sources tell the same things, and each tells what it knows.

Source: proc(5), signal(7), include/trace/events/ and include/uapi/linux/cn_proc.h of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdtool.model.stop import EventSource, ExitStatus, SignalResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBorn:
    """A task was made, by another one.

    Attributes:
        comm: The name that it inherits; None where that is not told.
        is_thread: It belongs to the process of the task that made it.
        is_elsewhere: It was made in another cgroup than its maker's (CLONE_INTO_CGROUP).
    """

    at_us: int
    source: EventSource
    pid: int
    maker: int
    comm: str | None
    is_thread: bool
    is_elsewhere: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMoved:
    """A task was moved to another cgroup, by its path from the root of the hierarchy."""

    at_us: int
    source: EventSource
    pid: int
    control_group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExecuted:
    """A process runs another program; of its threads only this one is left.

    Attributes:
        pid: The process.
        before: The thread that asked for it, which is the process's first from now on.
        path: Of the program; None where that is not told.
    """

    at_us: int
    source: EventSource
    pid: int
    before: int
    path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEnded:
    """A task ended; with the last of its tasks a process has.

    Attributes:
        status: What wait(2) gives of it; None where that is not told.
    """

    at_us: int
    source: EventSource
    pid: int
    status: ExitStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalGenerated:
    """A signal was sent to a task, or to its whole process.

    Attributes:
        sender: The task that sent it; where the kernel itself did, the one that it ran in.
        result: What the kernel did with it; None where it says so in a way that is not known.
        by_kernel: The kernel sent it by itself: a fault, memory that ran out.
    """

    at_us: int
    source: EventSource
    pid: int
    sender: int
    signal: str
    result: SignalResult | None
    by_kernel: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalDelivered:
    """A task runs its handler for a signal now."""

    at_us: int
    source: EventSource
    pid: int
    signal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerClosed:
    """A TCP socket listens no more.

    Attributes:
        pid: The task that closed it.
    """

    at_us: int
    source: EventSource
    pid: int
    address: str
    port: int


KernelEvent = (
    TaskBorn
    | TaskMoved
    | TaskExecuted
    | TaskEnded
    | SignalGenerated
    | SignalDelivered
    | ListenerClosed
)
