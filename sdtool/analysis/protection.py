"""Which units must not be stopped by a slip of the hand?"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sdtool.errors import CriticalUnit

CRITICAL = re.compile(
    r"init\.scope|-\.slice|(?:dbus|dbus-broker)\.(?:service|socket)|user@\d+\.service"
    r"|systemd-journald(?:-[\w-]+)?\.(?:service|socket)|systemd-logind\.service"
)


def require_stoppable(unit: str, along: Iterable[str], own_cgroup: str) -> None:
    """Let a unit pass that may be stopped without a second thought.

    Args:
        along: The units that would go down with it.
        own_cgroup: The cgroup of this process: what it sits in would take it down.

    Raises:
        CriticalUnit: It carries the machine, its log, its bus, the login, or sdtool itself.
    """
    reason = _find_reason(unit, own_cgroup)
    for other in along:
        inner = _find_reason(other, own_cgroup)
        if reason is None and inner is not None:
            reason = f"{other} would go down with it, and {inner}"
    if reason is not None:
        raise CriticalUnit(
            f"{unit} was not stopped: {reason}.",
            subject=unit,
            hint="--force stops it all the same",
        )


def _find_reason(unit: str, own_cgroup: str) -> str | None:
    if CRITICAL.fullmatch(unit):
        return "the machine, the bus, the log or the login stands on it"
    return "sdtool itself runs in it" if unit in own_cgroup.split("/") else None
