"""The manager or its bus has a bad moment midway: questions are answered, stops told."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.system.bench import Bench, Client, flag_of, sdtool_argv

MOMENTS = {
    "reexec": "daemon-reexec",
    "reload": "daemon-reload",
    "broker": "kill --signal=KILL dbus.service",
}


def bring_about(manager: Bench, moment: str) -> None:
    """Have the bad moment; systemctl may lose the manager in it too."""
    words = ["timeout", "10", "systemctl", flag_of(manager), *MOMENTS[moment].split()]
    assert 124 != manager.run(words).returncode


def stop_with(manager: Bench, moment: str) -> dict[str, Any]:
    """The report of a stop of what ignores SIGTERM, with a bad moment right after the signal."""
    command = sdtool_argv(manager, "stop", "sdtool-ignores-term", "--jsonl")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(json.loads(line))
            if lines[-1].get("sub_state") == "stop-sigterm" and lines[-1]["kind"] == "state":
                bring_about(manager, moment)
    envelope = lines[-1]
    assert (1, []) == (envelope["exit"], envelope["errors"])
    (report,) = envelope["data"]
    return dict(report)


@pytest.mark.parametrize("moment", MOMENTS)
def test_stop_is_told_to_its_end(manager: Bench, systemctl: Client, moment: str) -> None:
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
    sdtool: Client, systemctl: Client, manager: Bench
) -> None:
    """list, trace and ports while the manager executes itself anew and reloads."""
    systemctl("start", "sdtool-graceful")
    here = f"systemctl {flag_of(manager)}"
    trouble = f"for _ in 1 2 3 4 5 6; do {here} daemon-reexec; {here} daemon-reload; done"
    before = manager.log_text().count("Reexecuting")
    with subprocess.Popen(
        manager.argv(["bash", "-c", trouble]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as troubling:
        statuses = set()
        while troubling.poll() is None:
            for command in ("list", "trace sdtool-graceful", "ports sdtool-graceful"):
                statuses.add(sdtool(*command.split()).returncode)

    assert {0} == statuses
    assert before + 6 == manager.log_text().count("Reexecuting")
