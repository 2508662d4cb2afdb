"""Processes: identity, what they are in their unit, and what a signal would do to them."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What the manager knows a process as."""

    MAIN = "main"
    CONTROL = "control"
    OTHER = "other"


class Disposition(StrEnum):
    """What the unit's own KillSignal will do to a process.

    ``HANDLES`` means that the application decides: it has a handler, a signalfd or a waiting
    thread.
    """

    DIES = "dies"
    IGNORES = "ignores"
    HANDLES = "handles"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ProcessId:
    """The identity of a process: a pid is reused, a pid with its start time is not.

    Attributes:
        start_ticks: Field 22 of /proc/PID/stat: clock ticks since boot.
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalMasks:
    """What a process does with signals, as bit masks (signal n is bit n-1), from proc(5).

    Attributes:
        caught: Signals with a handler (SigCgt).
        ignored: Signals set to SIG_IGN (SigIgn).
        blocked: Signals that every thread blocks; a process-wide signal then stays pending.
        namespace_init: It is PID 1 of a pid namespace below ours: the kernel drops signals
            that it has no handler for.
        traced: A debugger is attached, and decides what becomes of signals.
        signalfd: Signals that its signalfd descriptors take; None when not readable.
        waiting: A thread sits in sigwait(3); None when not readable.
    """

    caught: int
    ignored: int
    blocked: int
    namespace_init: bool
    traced: bool
    signalfd: int | None
    waiting: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """One process as /proc shows it, before anything is concluded from it.

    Attributes:
        state: The kernel's letter: R, S, D, T, t, Z, X, I.
        argv: None when the process has none (a zombie, a kernel thread) or it is hidden.
        user: The name of the effective user, or its number when it has no name.
        masks: None for a zombie.
        netns: Inode of its network namespace, None when hidden.
        frozen: Its cgroup is frozen: it acts on nothing but SIGKILL until it is thawed.
        unread_reason: Why what is None was not read; None when it is known to be none.
    """

    id: ProcessId
    ppid: int
    comm: str
    state: str
    control_group: str | None
    argv: tuple[str, ...] | None = None
    user: str | None = None
    cpu_us: int | None = None
    rss_bytes: int | None = None
    masks: SignalMasks | None = None
    netns: int | None = None
    frozen: bool = False
    unread_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The container that a cgroup path belongs to.

    Attributes:
        runtime: docker, podman, crio, containerd, nspawn, lxc, qemu; kubepods where Kubernetes
            runs it and the path does not tell with what.
        pod: The Kubernetes pod's uid.
    """

    runtime: str
    id: str
    pod: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a unit.

    Attributes:
        adopted: Its role is other and its parent is not in the unit: its parent ended, or it
            was moved in.
        disposition: What the unit's own KillSignal will do to it.
        disposition_reason: Which bits say so, or why it is not known.
        unread_reason: Why the fields that are None were not read; None when there is nothing.
    """

    pid: int
    start_ticks: int
    ppid: int
    comm: str
    argv: tuple[str, ...] | None
    user: str | None
    state: str
    role: Role
    control_group: str | None
    cpu_us: int | None
    rss_bytes: int | None
    adopted: bool
    disposition: Disposition
    disposition_reason: str
    unread_reason: str | None
    container: Container | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process named in passing: a holder of a socket, an ancestor, a left-over."""

    pid: int
    comm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOwner:
    """Who manages a process.

    Attributes:
        unit: The unit of the system manager it belongs to.
        user_unit: The unit of a user manager it belongs to.
        role_reason: Why the role is None: no manager has it, or none could be asked.
        managed: False when no manager started it as part of a service or scope of its own.
        managed_reason: What it is then: started from a terminal, a left-over, or outside.
        ancestry: From its parent up to the oldest visible ancestor.
    """

    pid: int
    comm: str
    unit: str | None
    user_unit: str | None
    slice: str | None
    session: str | None
    container: Container | None
    role: Role | None
    role_reason: str | None
    managed: bool
    managed_reason: str
    ancestry: tuple[ProcessRef, ...]


def signal_name(number: int) -> str:
    """Name a signal as signal(7) and systemd do: SIGTERM, SIGRTMIN+3, SIGRTMAX."""
    first, last = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    if first < number < last:
        return f"SIGRTMIN+{number - first}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def signal_number(name: str) -> int:
    """The number of a name that ``signal_name`` made."""
    base, plus, offset = name.partition("+")
    if base.isdecimal():
        return int(base)
    return int(signal.Signals[base]) + (int(offset) if plus else 0)
