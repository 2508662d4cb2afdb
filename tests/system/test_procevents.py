"""The kernel's process connector: every birth and every end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sdtool.sources.procevents import ProcEvents, What

pytestmark = pytest.mark.capability("tracefs")


@pytest.fixture
def events() -> Iterator[ProcEvents]:
    """A connection that was acknowledged."""
    connector = ProcEvents()
    yield connector
    connector.close()


def test_life_of_a_process_is_told(events: ProcEvents) -> None:
    """Fork, exec and exit, with the parent and the wait status, by the monotonic clock."""
    before = time.monotonic_ns()
    child = subprocess.Popen(["sh", "-c", "exit 7"])
    child.wait()
    ours = [event for event in events.read() if event.tgid == child.pid]
    assert [What.FORK, What.EXEC, What.EXIT] == [event.what for event in ours]
    assert (os.getpid(), os.getpid()) == (ours[0].parent, ours[2].parent)
    assert 7 == os.waitstatus_to_exitcode(ours[2].status or 0)
    assert before <= ours[0].at_ns <= ours[1].at_ns <= ours[2].at_ns <= time.monotonic_ns()


def test_end_by_a_signal_is_told(events: ProcEvents) -> None:
    """As wait(2) tells it, to whom is not the parent as well."""
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    (gone,) = [e for e in events.read() if (e.pid, e.what) == (child.pid, What.EXIT)]
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(gone.status or 0)


def test_nothing_is_lost_in_a_storm(events: ProcEvents) -> None:
    """A thousand children: each is born, and ends."""
    pids = set()
    for _ in range(1000):
        child = os.posix_spawn("/bin/true", ["true"], {})
        os.waitpid(child, 0)
        pids.add(child)
    found = [event for event in events.read() if event.tgid in pids]
    assert pids == {event.pid for event in found if event.what is What.FORK}
    assert pids == {event.pid for event in found if event.what is What.EXIT}
    assert 0 == events.lost


@pytest.mark.parametrize("namespace", ["--net", "--pid"])
def test_elsewhere_it_is_refused_in_time(namespace: str) -> None:
    """In another network or pid namespace nothing would come."""
    code = """
from sdtool.sources.procevents import ProcEvents
try:
    ProcEvents()
except OSError as error:
    print("refused", error.errno)
"""
    command = ["unshare", namespace, "--fork", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.startswith("refused")
