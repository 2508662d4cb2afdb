"""Wait statuses, and the observer on real children of this process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.process import ProcessId, Role, signal_number
from sdtool.model.stop import Event, EventKind, ExitCode, ExitSignal, ExitStatus
from sdtool.sources.pidfds import (
    INFO,
    PIDFD_INFO_EXIT,
    PidfdObserver,
    parse_info,
    parse_wait_status,
    probe_exit_info,
)
from sdtool.sources.processes import read_identity


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, ExitCode(code=0)),
        (3 << 8, ExitCode(code=3)),
        (255 << 8, ExitCode(code=255)),
        (9, ExitSignal(signal="SIGKILL", core=False)),
        (15, ExitSignal(signal="SIGTERM", core=False)),
        (6 | 0x80, ExitSignal(signal="SIGABRT", core=True)),
        (37, ExitSignal(signal="SIGRTMIN+3", core=False)),
    ],
)
def test_wait_status_is_read(status: int, expected: ExitStatus) -> None:
    """The low byte is the signal with its core bit, the next one the code."""
    assert expected == parse_wait_status(status)


@given(st.integers(0, 255))
def test_every_exit_code_is_kept(code: int) -> None:
    """0 to 255, the ones that systemd uses itself included."""
    assert ExitCode(code=code) == parse_wait_status(code << 8)


@given(st.integers(1, 64), st.booleans())
def test_every_signal_is_kept(number: int, core: bool) -> None:
    """Its name leads back to its number."""
    status = parse_wait_status(number | (0x80 if core else 0))
    assert isinstance(status, ExitSignal)
    assert (number, core) == (signal_number(status.signal), status.core)


def info(mask: int, status: int) -> bytes:
    """What the kernel makes of a struct pidfd_info."""
    return INFO.pack(mask, 1, *range(11), status)


def test_layout_of_the_kernel_is_kept() -> None:
    """64 bytes: the first published size of struct pidfd_info."""
    assert 64 == INFO.size


def test_status_counts_only_when_the_kernel_filled_it_in() -> None:
    """Before the reap the mask comes back without the exit bit."""
    assert ExitCode(code=3) == parse_info(info(PIDFD_INFO_EXIT | 7, 3 << 8))
    assert parse_info(info(7, 3 << 8)) is None


# The observer on children --------------------------------------------------------------------


@pytest.fixture
def observer() -> Iterator[PidfdObserver]:
    """An observer that is closed in the end."""
    watching = PidfdObserver("web.service", (True, "with status"))
    yield watching
    watching.close()


@pytest.fixture
def spawn() -> Iterator[Callable[[], ProcessId]]:
    """Start children that wait; they are killed and reaped in the end, if they were not before."""
    children: list[ProcessId] = []

    def start() -> ProcessId:
        identity = read_identity(os.posix_spawn("/bin/sleep", ["sleep", "60"], {}))
        assert identity is not None
        children.append(identity)
        return identity

    yield start
    for child in children:
        if read_identity(child.pid) == child:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


@pytest.fixture
def child(spawn: Callable[[], ProcessId]) -> ProcessId:
    """One of them."""
    return spawn()


def wait_for(observer: PidfdObserver, count: int = 1) -> list[Event]:
    """The next events, at most a few seconds later."""
    poll = select.poll()
    found: list[Event] = []
    poll.register(observer.fileno(), select.POLLIN)
    for _ in range(200):
        found += observer.read_events()
        if len(found) >= count:
            break
        poll.poll(20)
    return found


def test_exit_comes_with_the_status_where_the_kernel_tells(
    observer: PidfdObserver, child: ProcessId
) -> None:
    """Reaped at once: one event; without PIDFD_GET_INFO it says why there is no status."""
    assert observer.watch(child, "sleep", Role.MAIN)
    os.kill(child.pid, signal.SIGTERM)
    os.waitpid(child.pid, 0)
    (event,) = wait_for(observer)
    assert (EventKind.PROCESS_EXIT, child.pid, "sleep", Role.MAIN) == (
        event.kind,
        event.pid,
        event.comm,
        event.role,
    )
    told, why = probe_exit_info()
    expected = (ExitSignal(signal="SIGTERM", core=False), None) if told else (None, why)
    assert expected == (event.exit, event.text)
    assert frozenset() == observer.watching()


def test_exit_that_is_not_reaped_comes_without_status(
    observer: PidfdObserver, child: ProcessId
) -> None:
    """The parent takes its time: first the exit, pending, then the reap."""
    observer.watch(child, "sleep", Role.OTHER)
    os.kill(child.pid, signal.SIGKILL)
    (exited,) = wait_for(observer)
    assert (EventKind.PROCESS_EXIT, None) == (exited.kind, exited.exit)
    assert "not reaped" in (exited.text or "")
    assert frozenset({child}) == observer.watching()
    os.waitpid(child.pid, 0)
    (reaped,) = wait_for(observer)
    assert EventKind.PROCESS_REAPED == reaped.kind


def test_exits_that_are_read_at_once_keep_their_order(
    observer: PidfdObserver, spawn: Callable[[], ProcessId]
) -> None:
    """Whoever read them late, and in whatever order they were begun, watched and reaped."""
    children = [spawn() for _ in range(7)]
    for child in children:
        observer.watch(child, "sleep", Role.OTHER)
    ended = [children[place].pid for place in (3, 0, 6, 1, 5, 2, 4)]
    for pid in ended:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for child in children:
        os.waitpid(child.pid, 0)
    told = sorted(wait_for(observer, 7), key=lambda event: event.at_us)
    assert ended == [event.pid for event in told]
    assert 7 == len({event.at_us for event in told})


def test_role_can_be_corrected(observer: PidfdObserver, child: ProcessId) -> None:
    """The manager may say later that it was the control process."""
    observer.watch(child, "sleep", Role.OTHER)
    observer.note_role(child, Role.CONTROL)
    os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    assert [Role.CONTROL] == [event.role for event in wait_for(observer)]


def test_reused_pid_is_not_watched(observer: PidfdObserver, child: ProcessId) -> None:
    """The same pid with another start time is another process."""
    stranger = ProcessId(pid=child.pid, start_ticks=child.start_ticks + 1)
    assert not observer.watch(stranger, "sleep", Role.OTHER)
    assert frozenset() == observer.watching()


def test_process_that_is_gone_is_not_watched(observer: PidfdObserver) -> None:
    """Nothing can be said of it any more."""
    assert not observer.watch(ProcessId(pid=2**22, start_ticks=1), "gone", Role.OTHER)
