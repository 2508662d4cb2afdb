"""How processes live and end, by the kernel's trace: what they do here, it tells."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from sdtool.model.kernel import (
    KernelEvent,
    ListenerClosed,
    SignalDelivered,
    SignalGenerated,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.stop import SignalResult
from sdtool.sources.mounts import read_mounts
from sdtool.sources.tracefs import Trace, open_tracefs
from sdtool.sources.tracepoints import KernelTrace

pytestmark = pytest.mark.capability("tracefs")

US = os.getpid()

Kind = TypeVar("Kind")


@pytest.fixture
def trace() -> Iterator[KernelTrace]:
    """One that was tried out."""
    recorder = KernelTrace()
    yield recorder
    recorder.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a handler for SIGHUP, ignores SIGINT and blocks SIGQUIT; it is ready."""
    code = """
import signal, sys
signal.signal(signal.SIGHUP, lambda *_: print("handled", flush=True))
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
print("ready", flush=True)
while True:
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"ready\n" == process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup below our own, from the root of the hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (own,) = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    path = Path(own) / f"sdtool-test-{US}"
    made = mounted(path)
    made.mkdir()
    yield path
    made.rmdir()


def mounted(cgroup: Path) -> Path:
    """Where a cgroup can be found."""
    (mount, *_) = read_mounts("self", "cgroup2")
    return Path(mount.path) / cgroup.relative_to("/")


def of(events: list[KernelEvent], kind: type[Kind], pid: int) -> list[Kind]:
    """The events of one kind and one task."""
    return [event for event in events if isinstance(event, kind) and event.pid == pid]


def test_life_of_a_process_is_told(trace: KernelTrace) -> None:
    """Who has made it, what it ran, and when it ended, by our own clock."""
    before = time.monotonic_ns() // 1000
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
    os.waitpid(child, 0)
    after = time.monotonic_ns() // 1000
    events = trace.read()
    (born,) = of(events, TaskBorn, child)
    (executed,) = of(events, TaskExecuted, child)
    (ended,) = of(events, TaskEnded, child)
    assert (US, False, False) == (born.maker, born.is_thread, born.is_elsewhere)
    assert (child, "/bin/sh", None) == (executed.before, executed.path, ended.status)
    assert before <= born.at_us <= executed.at_us <= ended.at_us <= after
    assert 0 == trace.lost


def test_thread_is_told_from_a_process(trace: KernelTrace) -> None:
    """It is born and ends too."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    events = trace.read()
    (born,) = of(events, TaskBorn, thread.native_id)
    assert (US, True) == (born.maker, born.is_thread)


def test_thread_that_runs_a_program_becomes_the_process(trace: KernelTrace) -> None:
    """The first task ends, and then the program runs under its pid, and ends."""
    code = """
import os, threading
threading.Thread(target=os.execv, args=("/bin/true", ["true"])).start()
threading.Event().wait()
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    assert 0 == child.wait()
    events = trace.read()
    (thread,) = [e for e in events if isinstance(e, TaskBorn) and e.maker == child.pid]
    (_, last) = of(events, TaskExecuted, child.pid)
    (first, end) = of(events, TaskEnded, child.pid)
    assert (True, "/bin/true", thread.pid) == (thread.is_thread, last.path, last.before)
    assert thread.at_us <= first.at_us <= last.at_us <= end.at_us


def test_child_is_moved(trace: KernelTrace, child: subprocess.Popen[bytes], cgroup: Path) -> None:
    """By the path from the root of the hierarchy, once for all its threads; and back again."""
    for path in (cgroup, cgroup.parent):
        (mounted(path) / "cgroup.procs").write_text(str(child.pid))
    moves = [event.control_group for event in of(trace.read(), TaskMoved, child.pid)]
    assert [str(cgroup), str(cgroup.parent)] == moves


def test_result_of_a_signal_is_told(trace: KernelTrace, child: subprocess.Popen[bytes]) -> None:
    """A handler runs; what is ignored or pending already is told by the sending alone."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGQUIT, signal.SIGKILL)
    for number in numbers:
        child.send_signal(number)
        if number == signal.SIGHUP:
            assert child.stdout is not None
            assert b"handled\n" == child.stdout.readline()
    child.wait()
    events = trace.read()
    sent = of(events, SignalGenerated, child.pid)
    delivered, ignored = SignalResult.DELIVERED, SignalResult.IGNORED
    assert [
        ("SIGHUP", delivered),
        ("SIGINT", ignored),
        ("SIGQUIT", delivered),
        ("SIGQUIT", SignalResult.ALREADY_PENDING),
        ("SIGKILL", delivered),
    ] == [(event.signal, event.result) for event in sent]
    assert {(US, False)} == {(event.sender, event.by_kernel) for event in sent}
    assert ["SIGHUP"] == [event.signal for event in of(events, SignalDelivered, child.pid)]


def test_fault_is_the_kernels_signal(trace: KernelTrace) -> None:
    """One that a process has sent itself is not."""
    for code, by_kernel in (("import ctypes; ctypes.string_at(0)", True), (KILL_ITSELF, False)):
        quiet = f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {code}"
        child = subprocess.Popen([sys.executable, "-c", quiet])
        assert -signal.SIGSEGV == child.wait()
        (sent,) = of(trace.read(), SignalGenerated, child.pid)
        assert ("SIGSEGV", child.pid, by_kernel) == (sent.signal, sent.sender, sent.by_kernel)


KILL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def test_harmless_signal_is_recorded_when_it_is_asked_for(trace: KernelTrace) -> None:
    """Not before; KillSignal=SIGWINCH makes Apache stop. Those that end somebody always are."""
    with signals_blocked({signal.SIGWINCH, signal.SIGUSR1, signal.SIGRTMIN + 3}) as send:
        send()
        first = [event.signal for event in of(trace.read(), SignalGenerated, US)]
        trace.record_signals(["SIGWINCH"])
        send()
        then = [event.signal for event in of(trace.read(), SignalGenerated, US)]
    assert {"SIGUSR1", "SIGRTMIN+3"} == set(first)
    assert {"SIGUSR1", "SIGRTMIN+3", "SIGWINCH"} == set(then)


@contextmanager
def signals_blocked(numbers: set[int]) -> Iterator[Callable[[], None]]:
    """What sends each to ourselves, and takes it."""

    def send() -> None:
        for number in numbers:
            # To this thread alone: another one may have it unblocked, and it would end us.
            signal.pthread_kill(threading.get_ident(), number)
            signal.sigtimedwait({number}, 1)

    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield send
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_listener_that_is_closed_is_told(
    trace: KernelTrace, family: socket.AddressFamily, address: str
) -> None:
    """What was only bound is none, and no connection: that too comes from what listens."""
    with socket.create_server((address, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((address, port)), listener.accept()[0]:
            pass
        with socket.socket(family) as bound:
            bound.bind((address, 0))
        assert [] == of(trace.read(), ListenerClosed, US)
    closed = of(trace.read(), ListenerClosed, US)
    assert [(address, port)] == [(event.address, event.port) for event in closed]


def test_trace_does_not_tell_how_it_was_tried_out(trace: KernelTrace) -> None:
    """Neither then nor later."""
    os.kill(US, signal.SIGCONT)
    assert [] == of(trace.read(), SignalGenerated, US)


def instances_of_ours() -> list[str]:
    """Those that we have made, with what each records."""
    tree = open_tracefs()
    try:
        found = Path(f"/proc/self/fd/{tree}/instances").glob(f"sdtool-{US}-*")
        return [f"{path.name} {(path / 'set_event').read_text()}" for path in found]
    finally:
        os.close(tree)


def test_in_another_pid_namespace_no_instance_is_touched() -> None:
    """There ours would look like one whose maker is gone; it goes on recording."""
    code = """
import sys
from sdtool.sources.tracepoints import KernelTrace
seen = []
sys.addaudithook(lambda name, values: seen.append(f"{name} {values[:1]}"))
try:
    KernelTrace()
except OSError as error:
    print(error.strerror)
print([one for one in seen if "instances" in one or one.startswith(("os.mkdir", "os.rmdir"))])
"""
    ours = Trace({"sched/sched_process_exit": None})
    try:
        (before,) = instances_of_ours()
        elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
        child = subprocess.Popen(elsewhere, stdout=subprocess.PIPE, text=True)
        said, _ = child.communicate()
        reason = "what is traced cannot be told apart: this is not the initial pid namespace"
        assert f"{reason}\n[]\n" == said
        assert [before] == instances_of_ours()
        assert before.endswith(" sched:sched_process_exit\n")
        assert child.pid in [event.values["pid"] for event in ours.read()]
    finally:
        ours.close()
