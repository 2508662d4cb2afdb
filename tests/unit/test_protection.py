"""Which units are not stopped by a slip of the hand."""

from __future__ import annotations

import pytest

from sdtool.analysis.protection import require_stoppable
from sdtool.errors import CriticalUnit, Exit


@pytest.mark.parametrize(
    "unit",
    [
        "init.scope",
        "-.slice",
        "dbus.service",
        "dbus.socket",
        "dbus-broker.service",
        "user@1000.service",
        "systemd-journald.service",
        "systemd-journald.socket",
        "systemd-journald-dev-log.socket",
        "systemd-logind.service",
    ],
)
def test_unit_that_carries_the_machine_needs_force(unit: str) -> None:
    """The bus, the log, the login and the manager itself."""
    with pytest.raises(CriticalUnit, match="was not stopped") as caught:
        require_stoppable(unit, (), "/system.slice/cron.service")
    assert (unit, Exit.DENIED) == (caught.value.subject, caught.value.exit)
    assert "--force" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "unit",
    ["nginx.service", "dbus-daemon.service", "user@.service", "x-init.scope", "session-1.scope"],
)
def test_other_unit_needs_no_force(unit: str) -> None:
    """Names that only look like those are free."""
    require_stoppable(unit, (), "/system.slice/cron.service")


@pytest.mark.parametrize("unit", ["user.slice", "user-0.slice", "session-1.scope"])
def test_unit_that_sdtool_sits_in_needs_force(unit: str) -> None:
    """Stopping what we run in would end the watch with the unit."""
    with pytest.raises(CriticalUnit, match="sdtool itself runs in it"):
        require_stoppable(unit, (), "/user.slice/user-0.slice/session-1.scope")


def test_unit_that_takes_a_critical_one_along_needs_force() -> None:
    """A slice or a target can carry the bus: the sentence names both."""
    with pytest.raises(CriticalUnit, match=r"session\.slice .* dbus\.service would go down"):
        require_stoppable("session.slice", ("a.service", "dbus.service"), "/")
