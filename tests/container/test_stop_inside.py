"""stop on a whole system: frozen units, and what only the journal tells."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.container.system import System

UNIT = "sdtool-t-late.service"

# Its child is born when it is told to end, and SIGKILLed a moment later (KillMode=mixed).
LATE = r"""
import os, signal, socket
def end(*_):
    if os.fork() == 0:
        open("/proc/self/comm", "w").write("born-late")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


def report_of(system: System, unit: str, *options: str) -> dict[str, Any]:
    """What a stop says."""
    (report,) = system.sdtool("stop", unit, *options).data
    return report


def test_frozen_unit_promises_nothing(healthy: System) -> None:
    """Its processes act on no signal; systemd thaws it, or later refuses to stop it."""
    healthy.run(["systemctl", "start", "sdtool-graceful"])
    healthy.run(["systemctl", "freeze", "sdtool-graceful"])
    try:
        (trace,) = healthy.sdtool("trace", "sdtool-graceful").data
        (process,) = trace["processes"]
        report = report_of(healthy, "sdtool-graceful")
    finally:
        healthy.run(["systemctl", "thaw", "sdtool-graceful"])

    assert "unknown" == process["disposition"]
    assert "frozen" in process["disposition_reason"]
    version = int(healthy.shell("systemctl --version | head -1 | cut -d' ' -f2").stdout)
    expected = ("done", "clean") if version < 254 else ("frozen", "failed")
    assert expected == (report["job_result"], report["verdict"])
    assert [] == report["killed"]


@pytest.mark.parametrize("observers", ["-tracefs", "-pidfd", "journal"])
def test_journal_names_who_was_killed_unseen(healthy: System, observers: str) -> None:
    """Whomever systemd says it has killed is in the report, however short its life was."""
    start = ["systemd-run", "--quiet", f"--unit={UNIT}", "--service-type=notify"]
    settings = ["--property=KillMode=mixed", "--property=NotifyAccess=all"]
    # The manager expands $ and %; there are none.
    started = healthy.run([*start, *settings, "python3", "-c", LATE])
    assert 0 == started.status, started.stderr
    shown = healthy.enter(["systemctl", "show", "-P", "InvocationID", UNIT]).stdout.strip()

    report = report_of(healthy, UNIT, f"--observers={observers}")

    match = f"INVOCATION_ID={shown}"
    records = healthy.shell(f"journalctl --output=json --no-pager {match}").stdout.splitlines()
    texts = [json.loads(record)["MESSAGE"] for record in records]
    told = [int(pid) for text in texts for pid in re.findall(r"Killing process (\d+) \(", text)]
    assert 1 == len(told)
    assert told == report["killed"]
    assert "killed" == report["verdict"]
    assert "success" == report["result"]
