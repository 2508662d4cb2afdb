"""Descriptors of processes: who holds a socket, and which network namespaces only they keep alive.

The descriptors of other users' processes need CAP_DAC_READ_SEARCH to be listed and CAP_SYS_PTRACE
to be read. A look costs some 50 us a process, so it is made once for all questions: a ``Sweep``.

Source: proc_pid_fd(5), pidfd_getfd(2), linux/sockios.h (SIOCGSKNS).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from sdtool.model.process import ProcessRef
from sdtool.model.sockets import HolderScan
from sdtool.sources.namespaces import NetworkNamespace
from sdtool.sources.processes import (
    HIDDEN,
    PTRACE_HINT,
    hides_processes,
    is_hidden,
    parse_netns,
    read_capabilities,
    read_pids,
    read_process,
)
from sdtool.sources.spread import spread

CAP_DAC_READ_SEARCH = 2
CAP_SYS_PTRACE = 19

SIOCGSKNS = 0x894C

PID_NS_INIT_INO = 0xEFFFFFFC  # linux/nsfs.h, the same since Linux 3.8

PIDFD_GETFD = 438  # the same on every architecture that has it

INET_NAMES = (b"TCP", b"UDP", b"MPTCP")
"""How the names of protocols with ports begin, as a socket's file has them in sockfs."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What of the descriptors of one process matters here.

    Attributes:
        sockets: Inode -> one of its descriptors for that socket.
        namespaces: Inode of a network namespace -> one of its descriptors for that.
    """

    sockets: Mapping[int, int]
    namespaces: Mapping[int, int]


def read_descriptors(pid: int) -> Descriptors | None:
    """The sockets and namespaces that a process holds; None when they may not be seen.

    A process that is gone holds none.
    """
    sockets: dict[int, int] = {}
    namespaces: dict[int, int] = {}
    try:
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for fd in os.listdir(directory):
                with contextlib.suppress(FileNotFoundError):
                    target = os.readlink(fd, dir_fd=directory)
                    if target.startswith("socket:["):
                        sockets[int(target[8:-1])] = int(fd)
                    elif (inode := parse_netns(target)) is not None:
                        namespaces[inode] = int(fd)
        finally:
            os.close(directory)
    except (FileNotFoundError, ProcessLookupError):
        if is_hidden(pid):
            return None
    except PermissionError:
        return None
    return Descriptors(sockets, namespaces)


def sees_all_descriptors() -> bool:
    """Whether our capabilities let us look into the descriptors of other users' processes.

    In a user namespace they count for its own processes only (user_namespaces(7)): PID 1 tells.
    """
    if not {CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE} <= read_capabilities():
        return False
    return read_descriptors(1) is not None


class Sweep:
    """One look through the descriptors of processes.

    Args:
        pids: Whose; None for every process of this pid namespace.

    Attributes:
        pids: Those that were looked at.
    """

    def __init__(self, pids: Iterable[int] | None = None) -> None:
        self._all = pids is None
        self._found: dict[int, Descriptors] = {}
        self._hidden = 0
        self.pids = tuple(read_pids() if pids is None else pids)
        for pid, held in (one for part in spread(self.pids, _look) for one in part):
            if held is None:
                self._hidden += 1
            elif held.sockets or held.namespaces:
                self._found[pid] = held

    @property
    def reason(self) -> str | None:
        """Whose descriptors were not seen, and what would permit it; None when all were."""
        if self._all and hides_processes():
            return f"other users' processes are hidden: {HIDDEN}"
        if self._hidden:
            many = "1 process" if self._hidden == 1 else f"{self._hidden} processes"
            return f"{many} may not be looked into: {PTRACE_HINT}"
        return None

    def holders_of(self, inodes: Collection[int]) -> HolderScan:
        """Which processes hold which of these sockets."""
        wanted, found = frozenset(inodes), []
        for pid, held in self._found.items():
            for inode in sorted(wanted & held.sockets.keys()):
                process = read_process(pid)
                if process is not None:
                    ref = ProcessRef(pid=pid, comm=process.comm)
                    found.append((inode, ref, process.control_group))
        return HolderScan(
            by_inode=tuple(sorted(found, key=_by_inode)),
            complete=self._all and self.reason is None,
            reason=self.reason,
            outside=not _is_initial_pid_namespace(),
        )

    @property
    def sockets(self) -> frozenset[int]:
        """The inodes of all sockets that were seen."""
        return frozenset(inode for held in self._found.values() for inode in held.sockets)

    def namespaces(self, known: Collection[int | None]) -> Iterator[NetworkNamespace]:
        """The network namespaces beside the known ones that a descriptor stands for."""
        doors: dict[int, list[str]] = {}
        for pid, held in self._found.items():
            for inode, fd in held.namespaces.items():
                if inode not in known:
                    doors.setdefault(inode, []).append(f"/proc/{pid}/fd/{fd}")
        for inode, paths in doors.items():
            yield NetworkNamespace(inode, doors=tuple(paths))

    def with_ports(self, inodes: Collection[int]) -> frozenset[int]:
        """Those of the sockets that can have a port: TCP, MPTCP, UDP."""
        return frozenset(inode for pid, fd, inode in self._find(inodes) if _has_port(pid, fd))

    def _find(self, inodes: Collection[int]) -> Iterator[tuple[int, int, int]]:
        """A (pid, descriptor, inode) for each of the sockets that was seen."""
        left = set(inodes)
        for pid, held in self._found.items():
            for inode in held.sockets.keys() & left:
                left.discard(inode)
                yield pid, held.sockets[inode], inode

    @contextlib.contextmanager
    def namespaces_of_sockets(
        self, inodes: Collection[int], known: Collection[int | None]
    ) -> Iterator[tuple[NetworkNamespace, ...]]:
        """The network namespaces that sockets are in, beside the known ones.

        Their doors are open only inside the context. The socket is copied for a moment, so that
        it would outlive its process by as much.
        """
        found: dict[int, int] = {}
        try:
            for pid, fd, inode in self._find(inodes):
                opened = _open_namespace(pid, fd, inode) if _has_port(pid, fd) else None
                if opened is None:
                    continue
                netns = os.fstat(opened).st_ino
                if netns in known or netns in found:
                    os.close(opened)
                else:
                    found[netns] = opened
            yield tuple(
                NetworkNamespace(netns, doors=(f"/proc/self/fd/{fd}",))
                for netns, fd in sorted(found.items())
            )
        finally:
            for fd in found.values():
                os.close(fd)


def _look(pids: Iterable[int]) -> list[tuple[int, Descriptors | None]]:
    return [(pid, read_descriptors(pid)) for pid in pids]


def _is_initial_pid_namespace() -> bool:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid") == f"pid:[{PID_NS_INIT_INO}]"
    return False


def _by_inode(row: tuple[int, ProcessRef, str | None]) -> tuple[int, int]:
    return row[0], row[1].pid


def _has_port(pid: int, fd: int) -> bool:
    """Whether a descriptor is a socket of a protocol with ports; False too when it is gone."""
    with contextlib.suppress(OSError):
        name = os.getxattr(f"/proc/{pid}/fd/{fd}", "system.sockprotoname")
        return name.startswith(INET_NAMES)
    return False


def _open_namespace(pid: int, fd: int, inode: int) -> int | None:
    """A descriptor of the namespace that a process's socket is in.

    None when the socket has gone meanwhile, or may not be copied.
    """
    with contextlib.suppress(OSError), copied_socket(pid, fd, inode) as copy:
        return fcntl.ioctl(copy, SIOCGSKNS)
    return None


@contextlib.contextmanager
def copied_socket(pid: int, fd: int, inode: int) -> Iterator[int]:
    """A copy of another process's descriptor, for as short as can be: it keeps the socket open.

    Args:
        inode: The socket that it has to be; pids and descriptors are used again.

    Raises:
        OSError: It may not be copied (CAP_SYS_PTRACE), is gone, or is another socket by now.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy = _pidfd_getfd(pidfd, fd)
    finally:
        os.close(pidfd)
    try:
        if os.fstat(copy).st_ino != inode:
            raise FileNotFoundError(f"/proc/{pid}/fd/{fd} is another socket by now")
        yield copy
    finally:
        os.close(copy)


def _pidfd_getfd(pidfd: int, fd: int) -> int:
    import ctypes  # 5 ms, where a socket is in none of the lists

    libc = ctypes.CDLL(None, use_errno=True)
    copy = int(libc.syscall(PIDFD_GETFD, pidfd, fd, 0))
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copy
