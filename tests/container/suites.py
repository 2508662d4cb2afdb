"""The suites under test, and the runs of the system tests inside their containers."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sdtool.model.scope import Scope
from sdtool.sandbox import Container
from sdtool.sandbox.rootfs import TESTER

SUITES = tuple(os.environ.get("SUITES", "bookworm trixie").split())
"""``SUITES="bookworm trixie sid"`` adds Debian's newest."""

CHECKOUT = Path(__file__).resolve().parents[2]
PLACE = "/srv/sdtool"
"""Where the checkout is in a container: everybody may go there, wherever it is outside."""

REPORTS = CHECKOUT / "build" / "reports"

REQUIREMENTS = ("pytest>=8",)

AS_REAL = ("--system-call-filter=pidfd_getfd",)
"""Of nspawn: root may take a copy of another process's descriptor, as it may on a real machine."""

# The sandbox has tests of its own, which are about the machine that it runs on.
_PYTEST = ("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/system")
_PYTEST += ("--ignore=tests/system/test_sandbox.py",)
_PYTEST += ("--ignore=tests/system/test_sandbox_command.py",)

_TIMEOUT = 500.0


@dataclass(frozen=True, slots=True)
class Inside:
    """The system tests in one container: of which suite, about which manager."""

    suite: str
    scope: Scope

    @property
    def title(self) -> str:
        """What reports and tests call it: "trixie-root" or "trixie-tester"."""
        return f"{self.suite}-{self.user}"

    @property
    def user(self) -> str:
        """Who runs them: root on the system's manager, tester on tester's own."""
        return "root" if self.scope is Scope.SYSTEM else TESTER


INSIDE = tuple(Inside(suite, scope) for suite in SUITES for scope in (Scope.SYSTEM, Scope.USER))


def run_inside(run: Inside) -> subprocess.CompletedProcess[str]:
    """Boot a container, run the system tests in it, and keep their report."""
    # The journal is open to tester, as it is to administrators: the tests read it.
    prepare = f"chroot . usermod --append --groups systemd-journal {TESTER}"
    container = Container(
        run.suite,
        bind={PLACE: CHECKOUT},
        prepare=prepare,
        arguments=AS_REAL,
        requirements=REQUIREMENTS,
    )
    with container:
        if run.scope is Scope.USER:
            container.log_in()
        done = subprocess.run(
            container.argv(
                [*_PYTEST, "--junit-xml=/tmp/report.xml"],
                user=run.user,
                directory=PLACE,
                env={
                    "SDTOOL_TEST_SCOPE": run.scope,
                    "SDTOOL_REQUIRE": "1",
                    "PYTHONPYCACHEPREFIX": "/tmp/pycache",
                },
            ),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        report = container.run(["cat", "/tmp/report.xml"])
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / f"{run.title}.xml").write_text(report.stdout)
    return done
