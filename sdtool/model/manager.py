"""What a service manager says about itself and, over time, about its units and jobs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdtool.model.scope import Scope
from sdtool.model.stop import ExitStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerInfo:
    """The manager we are connected to.

    Attributes:
        version: As it says, "252.38-1~deb12u1".
        control_group: The root of its units in the cgroup tree, "/" for most system managers.
        transport: How it was reached: "bus" or "private" (its own socket, without a broker).
        transport_reason: Why not over the bus; None when over the bus.
        library: The D-Bus library in use.
    """

    scope: Scope
    version: str
    control_group: str
    transport: str
    transport_reason: str | None
    library: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MainExit:
    """How and when the main process of a service ended, as the manager was told by wait(2).

    Attributes:
        at_us: By CLOCK_MONOTONIC, the manager's own time.
    """

    pid: int
    at_us: int
    exit: ExitStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitChange:
    """Properties of a unit that changed, from one PropertiesChanged signal.

    A field is None when the signal did not carry it. Times (CLOCK_MONOTONIC) come from the
    message, never from its arrival.

    Attributes:
        heard_us: When the signal came in; None for what was read by asking.
    """

    unit_path: str
    active_state: str | None = None
    sub_state: str | None = None
    changed_us: int | None = None
    result: str | None = None
    control_pid: int | None = None
    main_exit: MainExit | None = None
    heard_us: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobChange:
    """A job that was queued (``result`` None) or has ended.

    Attributes:
        heard_us: When the signal came in, by CLOCK_MONOTONIC: it has no time of its own.
    """

    job: str
    unit: str
    result: str | None
    heard_us: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerReloading:
    """daemon-reload or daemon-reexec began (``active``) or ended: signals may be lost between."""

    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerOwner:
    """The manager left the bus (daemon-reexec does that) or took its name there anew."""

    present: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLost:
    """The connection to the manager ended; nothing more will come over it.

    Attributes:
        reason: What ended it, in words.
        silent: It stood until it was given up: nothing had come over it for a while.
    """

    reason: str
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRenewed:
    """There is a new connection, and signals come over it; those in between were lost.

    Attributes:
        reason: What ended the old one, in words.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerGap:
    """A time in which nothing was heard of the manager, by CLOCK_MONOTONIC.

    Attributes:
        since_us: From when on its signals may be missing.
        until_us: When it had been asked for what was missed.
        reason: Why nothing was heard, in words.
    """

    since_us: int
    until_us: int
    reason: str


ManagerSignal = (
    UnitChange | JobChange | ManagerReloading | ManagerOwner | ConnectionLost | ConnectionRenewed
)
