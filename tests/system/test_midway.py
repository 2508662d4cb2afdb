"""The manager or its bus has a bad moment midway: questions are answered, stops told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from sdtool.sandbox import PrivateManager
from tests.system.conftest import Client

KILL_BROKER = "timeout 10 systemctl --user kill --signal=KILL dbus.service"

MOMENTS = {
    "reexec": "systemctl --user daemon-reexec",
    "reload": "systemctl --user daemon-reload",
    "broker": KILL_BROKER,
}


def stop_with(manager: PrivateManager, moment: str, *options: str) -> dict[str, Any]:
    """The report of a stop of what ignores SIGTERM, with a bad moment right after the signal."""
    command = [sys.executable, "-m", "sdtool", "stop", "sdtool-ignores-term", "--user", "--jsonl"]
    with subprocess.Popen(
        manager.argv([*command, *options]), stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(json.loads(line))
            if lines[-1].get("sub_state") == "stop-sigterm" and lines[-1]["kind"] == "state":
                manager.run(["sh", "-c", MOMENTS[moment]])
    envelope = lines[-1]
    assert (1, []) == (envelope["exit"], envelope["errors"])
    (report,) = envelope["data"]
    return dict(report)


@pytest.mark.parametrize("moment", MOMENTS)
def test_stop_is_told_to_its_end(manager: PrivateManager, systemctl: Client, moment: str) -> None:
    """Every phase after the gap, the gap itself, and who was SIGKILLed."""
    systemctl("start", "sdtool-ignores-term")

    report = stop_with(manager, moment)

    gaps = [event for event in report["events"] if event["kind"] == "gap"]
    phases = [event["sub_state"] for event in report["events"] if event["kind"] == "state"]
    assert ("killed", "done", "failed") == (
        report["verdict"],
        report["job_result"],
        report["active_state"],
    )
    assert ["stop-sigterm", "stop-sigkill", "failed"] == phases
    assert [True] == [gap["at_min_us"] < gap["at_max_us"] for gap in gaps]


def test_reads_are_answered_whatever_happens(
    sdtool: Client, systemctl: Client, manager: PrivateManager
) -> None:
    """list, trace and ports while the manager executes itself anew and reloads."""
    systemctl("start", "sdtool-graceful")
    trouble = f"for _ in 1 2 3 4 5 6; do {MOMENTS['reexec']}; {MOMENTS['reload']}; done"
    with subprocess.Popen(
        manager.argv(["bash", "-c", trouble]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as troubling:
        statuses = set()
        while troubling.poll() is None:
            for command in ("list", "trace sdtool-graceful", "ports sdtool-graceful"):
                statuses.add(sdtool(*command.split(), "--user").returncode)

    assert {0} == statuses
