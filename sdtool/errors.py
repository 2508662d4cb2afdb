"""What sdtool says when it cannot answer, and the exit status of each.

An error here means "sdtool could not answer". A unit that failed, a port that is taken or a
process that vanished are answers, not errors: they travel as data.

    SdtoolError
    ├── InvalidArgument     2   the request itself makes no sense
    ├── NotApplicable       3   the verb does not apply to this unit
    ├── AccessDenied        4   the manager, polkit or the kernel refused
    │   └── CriticalUnit    4   sdtool refused: stopping it would cut the branch we sit on
    ├── NoSuchUnit          5
    │   └── NoSuchProcess   5
    ├── NotConfigured       6
    │   ├── UnitMasked      6
    │   └── BadUnitSetting  6
    ├── Unavailable        69   no systemd or bus here, or it is gone, or does not answer
    │   ├── NotBooted      69
    │   └── BusError       69   the manager answered with an error sdtool has no name for
    ├── DeadlineExceeded   75   our own deadline passed; the job goes on
    └── Interrupted       130   Ctrl-C, SIGTERM or SIGHUP

Imports nothing of ours, so every room may raise these.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import ClassVar


class Exit(IntEnum):
    """The exit statuses of every command, a contract for scripts."""

    OK = 0
    BAD = 1
    USAGE = 2
    NOT_APPLICABLE = 3
    DENIED = 4
    NO_SUCH_UNIT = 5
    NOT_CONFIGURED = 6
    UNAVAILABLE = 69
    BUG = 70
    DEADLINE = 75
    INTERRUPTED = 130


class SdtoolError(Exception):
    """sdtool could not answer; ``str()`` is one sentence that names the unit, port or pid.

    Args:
        message: One sentence ending with a full stop.
        subject: The unit, port or pid that was asked about, for scripts.
        hint: What the reader can do next, one phrase.
    """

    exit: ClassVar[Exit] = Exit.BUG

    def __init__(
        self, message: str, *, subject: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.subject = subject
        self.hint = hint

    @property
    def code(self) -> str:
        """The stable name of this kind of error: its class's."""
        return type(self).__name__


class InvalidArgument(SdtoolError):
    """The request itself makes no sense (a port out of range, an unknown protocol)."""

    exit = Exit.USAGE


class NotApplicable(SdtoolError):
    """The verb does not apply to this unit (``systemctl`` exits 3 here too)."""

    exit = Exit.NOT_APPLICABLE


class Refusal(StrEnum):
    """What the manager says of its refusal."""

    NEEDS_PERSON = "needs-person"
    ONLY_BY_DEPENDENCY = "only-by-dependency"
    DENIED = "denied"


class AccessDenied(SdtoolError):
    """The manager, polkit or the kernel refused; the hint names what would permit it.

    Attributes:
        reason: What the manager says of it; None where it was not the manager that refused.
    """

    exit = Exit.DENIED

    def __init__(
        self,
        message: str,
        *,
        subject: str | None = None,
        hint: str | None = None,
        reason: Refusal | None = None,
    ) -> None:
        super().__init__(message, subject=subject, hint=hint)
        self.reason = reason


class CriticalUnit(AccessDenied):
    """sdtool itself refuses to stop what the machine or sdtool stands on."""


class NoSuchUnit(SdtoolError):
    """The manager knows no such unit, or no unit matches the pattern."""

    exit = Exit.NO_SUCH_UNIT


class NoSuchProcess(NoSuchUnit):
    """There is no process with that pid, or it is gone."""


class NotConfigured(SdtoolError):
    """The unit cannot be used as it is configured."""

    exit = Exit.NOT_CONFIGURED


class UnitMasked(NotConfigured):
    """The unit is masked: linked to /dev/null."""


class BadUnitSetting(NotConfigured):
    """The unit's file does not parse, or a setting in it is invalid."""


class Unavailable(SdtoolError):
    """No systemd manager or bus can be reached, or it stopped answering.

    Attributes:
        silent_s: Seconds that a request for a job went without an answer though the connection
            stood: whoever was asked thinks about it. None for any other reason.
    """

    exit = Exit.UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        subject: str | None = None,
        hint: str | None = None,
        silent_s: float | None = None,
    ) -> None:
        super().__init__(message, subject=subject, hint=hint)
        self.silent_s = silent_s


class NotBooted(Unavailable):
    """This machine was not booted with systemd (see sd_booted(3))."""


class BusError(Unavailable):
    """The manager answered with a D-Bus error that sdtool has no class for.

    Attributes:
        name: The D-Bus error name as it came.
    """

    def __init__(
        self,
        message: str,
        *,
        name: str,
        subject: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, subject=subject, hint=hint)
        self.name = name


class DeadlineExceeded(SdtoolError):
    """The deadline the caller set has passed; what was asked of systemd goes on."""

    exit = Exit.DEADLINE


class Interrupted(SdtoolError):
    """The user ended the watch; what was asked of systemd is not undone."""

    exit = Exit.INTERRUPTED
