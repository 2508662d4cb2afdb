"""Exits of processes that are not our children, with their wait status, by pidfd.

Any user may watch any process so. POLLIN says that it exited, POLLHUP that its parent reaped it;
only then can the wait status be read, by PIDFD_GET_INFO (kernel >= 6.15).

Source: pidfd_open(2), linux/pidfd.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import struct
import time

from sdtool.model.process import ProcessId, Role, signal_name
from sdtool.model.stop import Event, EventKind, EventSource, ExitCode, ExitSignal, ExitStatus
from sdtool.sources.processes import read_identity

# struct pidfd_info: u64 mask, cgroupid; u32 pid tgid ppid ruid rgid euid egid suid sgid fsuid
# fsgid; s32 exit_code. 64 bytes is its first published size, which every later kernel accepts.
INFO = struct.Struct("=QQ11Ii")
PIDFD_INFO_EXIT = 1 << 3
PIDFD_GET_INFO = (3 << 30) | (INFO.size << 16) | (0xFF << 8) | 11

REAP_WAIT_US = 30_000
"""How long an exit is kept back for its wait status, which only the reaping makes readable."""

LATE_US = 50_000
"""After so long a time without a look an exit has bounds: it was seen, but not when it was."""

SPARE_DESCRIPTORS = 64

NO_EXIT_INFO = "the kernel gives wait statuses to the parent only (needs Linux 6.15)"


def read_exit_status(pidfd: int) -> ExitStatus | None:
    """The wait status of a process that was reaped; None while it was not.

    Raises:
        OSError: This kernel does not tell (ENOTTY before 6.13).
    """
    buffer = bytearray(INFO.size)
    struct.pack_into("=Q", buffer, 0, PIDFD_INFO_EXIT)
    fcntl.ioctl(pidfd, PIDFD_GET_INFO, buffer, True)
    return parse_info(bytes(buffer))


def parse_info(data: bytes) -> ExitStatus | None:
    """The exit part of struct pidfd_info; None when the kernel did not fill it in."""
    mask, *_, status = INFO.unpack(data)
    return parse_wait_status(status) if mask & PIDFD_INFO_EXIT else None


def parse_wait_status(status: int) -> ExitStatus:
    """A status as wait(2) gives it."""
    if os.WIFSIGNALED(status):
        return ExitSignal(signal=signal_name(os.WTERMSIG(status)), core=os.WCOREDUMP(status))
    return ExitCode(code=os.WEXITSTATUS(status))


def probe_exit_info() -> tuple[bool, str]:
    """Whether this kernel tells wait statuses of other people's children, and why not.

    Asked of a process of our own, because the version number does not tell on patched kernels.
    """
    # Not fork(2): the caller may have threads, a live view for one.
    pidfd = -1
    try:
        child = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
        try:
            pidfd = os.pidfd_open(child)
        finally:
            os.waitpid(child, 0)
        status = read_exit_status(pidfd)
    except OSError:
        return False, NO_EXIT_INFO
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    if status == ExitCode(code=3):
        return True, "wait statuses of any process (PIDFD_GET_INFO)"
    return False, NO_EXIT_INFO


def make_room_for_descriptors(count: int) -> None:
    """Lift the soft limit of open files, up to the hard one, where ``count`` more would not fit.

    A unit may have 1,000 processes, and the usual soft limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + SPARE_DESCRIPTORS
    if wanted > soft:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _open(pid: int) -> int:
    """A pidfd, over the soft limit of open files too.

    Raises:
        OSError: There is no such process, or the hard limit is reached.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    make_room_for_descriptors(1)
    return os.pidfd_open(pid)


class PidfdObserver:
    """Watches the exits of a growing set of processes of one unit.

    Args:
        exit_info: What ``probe_exit_info`` said.
    """

    name = "pidfd"

    def __init__(self, unit: str, exit_info: tuple[bool, str]) -> None:
        self._unit = unit
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[ProcessId, str, Role]] = {}
        self._pidfds: dict[ProcessId, int] = {}
        self._exited: dict[int, int] = {}
        self._read_us = 0
        self._bounds: dict[int, tuple[int, int]] = {}
        self.lost = 0
        self.available = True
        self.has_status, self.reason = exit_info

    def fileno(self) -> int:
        """Readable when a process exited or was reaped."""
        return self._epoll.fileno()

    def watch(self, process: ProcessId, comm: str, role: Role) -> bool:
        """Begin to watch a process; False when it is gone already or its pid was reused."""
        try:
            pidfd = _open(process.pid)
        except ProcessLookupError:
            return False
        except OSError as error:
            self.lost += 1
            self.reason = f"not all processes watched: {os.strerror(error.errno or 0)}"
            return False
        if read_identity(process.pid) != process:
            os.close(pidfd)
            return False
        self._watched[pidfd] = (process, comm, role)
        self._pidfds[process] = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)
        return True

    def release(self, process: ProcessId) -> None:
        """Watch a process no more: others have told its end."""
        pidfd = self._pidfds.get(process)
        if pidfd is not None:
            self._exited.pop(pidfd, None)
            self._forget(pidfd)

    def note_role(self, process: ProcessId, role: Role) -> None:
        """Correct the role that a process is reported with."""
        pidfd = self._pidfds.get(process)
        if pidfd is not None:
            self._watched[pidfd] = (process, self._watched[pidfd][1], role)

    def read_events(self) -> tuple[Event, ...]:
        """Exits and reaps since the last call; call it every few milliseconds.

        An exit comes with its wait status when it is reaped soon, else without it, and the
        status comes with the reap. Those of one call are a microsecond apart, in their order.
        """
        ready = self._epoll.poll(0, max(len(self._watched), 1))
        # Not before the look: somebody can end, and we stand still, between the two.
        last_us, now = self._read_us, time.monotonic_ns() // 1000
        self._read_us = now
        is_late = 0 < last_us < now - LATE_US
        events: list[Event] = []
        # epoll(7) queues what becomes ready: who was killed because another had ended comes later.
        for at_us, (pidfd, mask) in enumerate(ready, now - len(ready) + 1):
            if mask & select.EPOLLIN:
                # An exit that is not reaped stays readable for ever: wait for POLLHUP alone.
                self._epoll.modify(pidfd, 0)
                self._exited[pidfd] = at_us
                if is_late:
                    self._bounds[pidfd] = last_us, at_us
            if mask & select.EPOLLHUP:
                events.append(self._read_reaped(pidfd, at_us))
        return (*events, *self._read_unreaped(now))

    def _read_reaped(self, pidfd: int, now: int) -> Event:
        exited_us = self._exited.pop(pidfd, None)
        kind = EventKind.PROCESS_REAPED if exited_us is None else EventKind.PROCESS_EXIT
        status, why = self._read_status(pidfd)
        event = self._event(pidfd, kind, exited_us or now, status, why)
        self._forget(pidfd)
        return event

    def _read_unreaped(self, now: int) -> list[Event]:
        late = [pidfd for pidfd, at_us in self._exited.items() if now - at_us > REAP_WAIT_US]
        kind, why = EventKind.PROCESS_EXIT, "its parent has not reaped it yet"
        return [self._event(pidfd, kind, self._exited.pop(pidfd), None, why) for pidfd in late]

    def _read_status(self, pidfd: int) -> tuple[ExitStatus | None, str | None]:
        if self.has_status:
            try:
                return read_exit_status(pidfd), None
            except OSError:
                self.has_status = False
                self.reason = f"exits only: {NO_EXIT_INFO}"
        return None, NO_EXIT_INFO

    def _event(
        self, pidfd: int, kind: EventKind, at_us: int, status: ExitStatus | None, why: str | None
    ) -> Event:
        process, comm, role = self._watched[pidfd]
        at_min_us, at_max_us = self._bounds.get(pidfd, (None, None))
        return Event(
            unit=self._unit,
            at_us=at_us,
            at_min_us=at_min_us,
            at_max_us=at_max_us,
            kind=kind,
            source=EventSource.PIDFD,
            pid=process.pid,
            start_ticks=process.start_ticks,
            comm=comm,
            role=role,
            exit=status,
            text=why,
        )

    def _forget(self, pidfd: int) -> None:
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        self._bounds.pop(pidfd, None)
        del self._pidfds[self._watched.pop(pidfd)[0]]

    def watching(self) -> frozenset[ProcessId]:
        """The processes that have not been reaped yet."""
        return frozenset(self._pidfds)

    def close(self) -> None:
        """Stop watching."""
        for pidfd in tuple(self._watched):
            self._forget(pidfd)
        self._epoll.close()
