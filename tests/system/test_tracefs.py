"""The kernel's trace, in an instance of our own: whole, and gone when we are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtool.sources.tracefs import INSTANCE, Trace, open_tracefs
from sdtool.sources.tracepoints import GIVES, probe_trace
from tests.machine import eventually

pytestmark = pytest.mark.capability("tracefs")

PROBE = "from sdtool.sources.tracepoints import probe_trace; print(*probe_trace())"

SIGNALS = {
    "signal/signal_generate": "sig == 15 || sig == 10",
    "signal/signal_deliver": "sig == 15 || sig == 10",
    "sched/sched_process_exit": None,
}


@pytest.fixture
def trace() -> Iterator[Trace]:
    """One that records signals and exits."""
    recorder = Trace({**SIGNALS, "sdtool/none": None})
    yield recorder
    recorder.close()


def instances() -> list[str]:
    """The trace instances of ours that there are."""
    tree = open_tracefs()
    try:
        names = [path.name for path in Path(f"/proc/self/fd/{tree}/instances").iterdir()]
    finally:
        os.close(tree)
    return [name for name in names if INSTANCE.fullmatch(name)]


def open_descriptors() -> int:
    """How many we have."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_signal_has_sender_target_and_time(trace: Trace) -> None:
    """Between the clock before and after, and what this kernel has not is said."""
    child = subprocess.Popen(["sleep", "60"])
    before = time.monotonic_ns()
    child.terminate()
    child.wait()
    after = time.monotonic_ns()

    (sent,) = [
        event
        for event in trace.read()
        if event.name == "signal_generate" and event.values["pid"] == child.pid
    ]

    assert (os.getpid(), 15, 0) == (sent.pid, sent.values["sig"], sent.values["result"])
    assert before <= sent.at_ns <= after
    assert (("sdtool/none",), 0) == (trace.missing, trace.lost)


def test_every_signal_is_there_in_its_order(trace: Trace) -> None:
    """Thousands, in one go."""
    number = 2000
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        for _ in range(number):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    found = [event for event in trace.read() if event.values.get("sig") == signal.SIGUSR1]
    ours = [event for event in found if event.values["pid"] == os.getpid() == event.pid]
    assert (number, 0) == (len(ours), trace.lost)
    assert sorted(event.at_ns for event in ours) == [event.at_ns for event in ours]


def test_trace_is_tried_out() -> None:
    """A signal of our own comes back; in another pid namespace it cannot be told from others."""
    assert probe_trace()[0]
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", PROBE]
    done = subprocess.run(elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False what is traced cannot be told apart")


def test_nothing_is_left_behind(trace: Trace) -> None:
    """No instance, no mount, and no descriptor."""
    mine = f"sdtool-{os.getpid()}-"
    assert 1 == len([name for name in instances() if name.startswith(mine)])
    descriptors = open_descriptors()
    mounts = Path("/proc/self/mountinfo").read_text()
    Trace(SIGNALS).close()
    assert 1 == len([name for name in instances() if name.startswith(mine)])
    assert descriptors == open_descriptors()
    assert mounts == Path("/proc/self/mountinfo").read_text()


def test_instance_of_a_killed_sdtool_is_removed_by_the_next() -> None:
    """It would record for ever; that of one who lives is left alone."""
    code = f"from sdtool.sources.tracefs import Trace; import time; t = Trace({SIGNALS}); "
    other = subprocess.Popen([sys.executable, "-c", f"{code} time.sleep(60)"])
    try:
        eventually(lambda: [n for n in instances() if n.startswith(f"sdtool-{other.pid}-")])
        Trace(SIGNALS).close()
        assert [n for n in instances() if n.startswith(f"sdtool-{other.pid}-")]
    finally:
        other.kill()
        other.wait()
    Trace(SIGNALS).close()
    assert [] == [n for n in instances() if n.startswith(f"sdtool-{other.pid}-")]


def test_trace_that_is_mounted_to_be_read_is_opened_elsewhere(tmp_path: Path) -> None:
    """As a hardened unit sees it; no instance could be made there."""
    script = 'mount -t tracefs none "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    command = ["unshare", "--mount", "sh", "-euc", script, "sh", str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    assert f"True {GIVES}\n" == done.stdout


def test_trace_that_is_closed_to_us_says_what_it_needs() -> None:
    """Root without CAP_SYS_ADMIN gets the answer of a kernel that is locked down."""
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False needs root (CAP_SYS_ADMIN), and a kernel that is not")
