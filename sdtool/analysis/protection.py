"""Which units must not be stopped by a slip of the hand?"""

from __future__ import annotations

import re

from sdtool.errors import CriticalUnit

CRITICAL = re.compile(
    r"init\.scope|-\.slice|(?:dbus|dbus-broker)\.(?:service|socket)|user@\d+\.service"
    r"|systemd-journald(?:-[\w-]+)?\.(?:service|socket)|systemd-logind\.service"
)


def require_stoppable(unit: str, own_cgroup: str, force: bool) -> None:
    """Let a unit pass that may be stopped without a second thought.

    Args:
        own_cgroup: The cgroup of this process: what it sits in would take it down.

    Raises:
        CriticalUnit: It carries the machine, its log, its bus, the login, or sdtool itself.
    """
    if force:
        return
    if CRITICAL.fullmatch(unit):
        reason = "the machine, the bus, the log or the login stands on it"
    elif unit in own_cgroup.split("/"):
        reason = "sdtool itself runs in it"
    else:
        return
    raise CriticalUnit(
        f"{unit} was not stopped: {reason}.", subject=unit, hint="--force stops it all the same"
    )
