"""The kernel's process connector: every birth and every end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sdtool.model.kernel import TaskBorn, TaskEnded, TaskExecuted
from sdtool.model.stop import ExitCode, ExitSignal
from sdtool.sources.procevents import ProcEvents

pytestmark = pytest.mark.capability("tracefs")


@pytest.fixture
def events() -> Iterator[ProcEvents]:
    """A connection that was acknowledged."""
    connector = ProcEvents()
    yield connector
    connector.close()


def test_life_of_a_process_is_told(events: ProcEvents) -> None:
    """Fork, exec and exit, with the parent and the wait status, by the monotonic clock."""
    before = time.monotonic_ns() // 1000
    child = subprocess.Popen(["sh", "-c", "exit 7"])
    child.wait()
    born, executed, ended = [event for event in events.read() if event.pid == child.pid]
    assert isinstance(born, TaskBorn)
    assert isinstance(executed, TaskExecuted)
    assert isinstance(ended, TaskEnded)
    assert (os.getpid(), False, ExitCode(code=7)) == (born.maker, born.is_thread, ended.status)
    after = time.monotonic_ns() // 1000
    assert before <= born.at_us <= executed.at_us <= ended.at_us <= after


def test_thread_is_told_from_a_process(events: ProcEvents) -> None:
    """It is born and ends too, within its process."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    made = [event for event in events.read() if isinstance(event, TaskBorn) and event.is_thread]
    assert [os.getpid()] == [event.maker for event in made if event.pid == thread.native_id]


def test_end_by_a_signal_is_told(events: ProcEvents) -> None:
    """As wait(2) tells it, to whom is not the parent as well."""
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    ended = [e for e in events.read() if isinstance(e, TaskEnded) and e.pid == child.pid]
    assert [ExitSignal(signal="SIGKILL", core=False)] == [event.status for event in ended]


def test_nothing_is_lost_in_a_storm(events: ProcEvents) -> None:
    """A thousand children: each is born, and ends."""
    pids = set()
    for _ in range(1000):
        child = os.posix_spawn("/bin/true", ["true"], {})
        os.waitpid(child, 0)
        pids.add(child)
    found = [event for event in events.read() if event.pid in pids]
    assert pids == {event.pid for event in found if isinstance(event, TaskBorn)}
    assert pids == {event.pid for event in found if isinstance(event, TaskEnded)}
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
