"""Options of other processes' sockets, from copies of their descriptors.

A copy keeps the socket, and so its port, for as long as it is open: each is closed before the
next is made. Pids and descriptors are used again, so a copy counts only when its inode is the one
that was asked for.

Source: pidfd_open(2), pidfd_getfd(2), socket(7), ipv6(7), linux/sockios.h (SIOCGSKNS).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from sdtool.model.binding import OptionScan, SocketOptions
from sdtool.model.sockets import SocketFacts
from sdtool.sources.binding import SO_BINDTOIFINDEX
from sdtool.sources.processes import PTRACE_HINT, hides_processes, read_netns, read_pids
from sdtool.sources.sockets import PROTOCOLS, read_sockets

PIDFD_GETFD = 438
SO_PROTOCOL = 38
SO_DOMAIN = 39
SIOCGSKNS = 0x894C

TCP = (socket.IPPROTO_TCP, PROTOCOLS["mptcp"])
TAGGING = (b"net_cls", b"net_prio")
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of linux/proc_ns.h."""

UNSUPPORTED = "needs Linux 5.6 (pidfd_getfd)"
FILTERED = "pidfd_getfd is forbidden here (a container's filter of system calls)"
TAGGED = "a copy would change the net_cls or net_prio tag of its socket (cgroup v1)"
HIDES_BOUND = "this kernel does not list TCP sockets that are bound and do not listen"


def read_options(pids: Mapping[int, Iterable[int]]) -> OptionScan:
    """The options of sockets.

    Args:
        pids: Socket inode -> the processes that hold it, of which one is enough.
    """
    wanted: dict[int, set[int]] = {}
    for inode, holders in pids.items():
        for pid in holders:
            wanted.setdefault(pid, set()).add(inode)
    found: dict[int, SocketOptions] = {}
    reasons: dict[str, None] = {}
    for pid, inodes in wanted.items():
        try:
            for inode, copy in _copy_sockets(pid, inodes - found.keys()):
                found[inode] = _read_options(copy)
        except OSError as error:
            reasons[_explain(error)] = None
    missed = pids.keys() - found.keys()
    return OptionScan(
        by_inode=tuple(sorted(found.items())), reason=next(iter(reasons), None) if missed else None
    )


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return UNSUPPORTED
    if error.errno == errno.EXDEV:
        return TAGGED
    return PTRACE_HINT if may_copy_descriptors() else FILTERED


def may_copy_descriptors() -> bool:
    """Whether we may copy descriptors at all: of our own process, if of none else."""
    try:
        own = os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        number = _library().syscall(PIDFD_GETFD, own, own, 0)
        if number >= 0:
            os.close(number)
        return bool(number >= 0)
    finally:
        os.close(own)


def _copy_sockets(pid: int, inodes: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """(inode, a copy of the descriptor) for each that the process still holds.

    Raises:
        OSError: The kernel refuses, or making a copy would change the socket (EXDEV).
    """
    wanted = set(inodes)
    if not wanted:
        return
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            _refuse_tagging(pid)
        for fd, inode in _read_descriptors(pid):
            if inode not in wanted:
                continue
            with contextlib.suppress(ProcessLookupError), _copy(pidfd, fd, inode) as copy:
                if copy is not None:
                    wanted.discard(inode)
                    yield inode, copy
    finally:
        os.close(pidfd)


def _read_descriptors(pid: int) -> Iterator[tuple[int, int]]:
    """(descriptor, inode) of each socket that a process holds; none when it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:["):
                    yield int(fd), int(target[8:-1])


def _refuse_tagging(pid: int) -> None:
    """Where cgroup v1 tags sockets, a process that gets a copy gives them its own tag."""
    if _read_tags("self") != _read_tags(pid):
        raise OSError(errno.EXDEV, TAGGED)


def _read_tags(pid: int | str) -> tuple[bytes, ...]:
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        lines = file.read().splitlines()
    return tuple(line for line in lines if {*TAGGING} & {*line.split(b":")[1].split(b",")})


@contextlib.contextmanager
def _copy(pidfd: int, fd: int, inode: int) -> Iterator[socket.socket | None]:
    """A copy of a descriptor while it is needed; None when it is another socket by now."""
    number = _library().syscall(PIDFD_GETFD, pidfd, fd, 0)
    if number < 0:
        code = _read_errno()
        if code == errno.EBADF:
            yield None
            return
        raise OSError(code, os.strerror(code))
    facts = os.fstat(number)
    if not stat.S_ISSOCK(facts.st_mode) or facts.st_ino != inode:
        os.close(number)
        yield None
        return
    with _wrap(number) as copy:
        yield copy


def _wrap(number: int) -> socket.socket:
    """The descriptor as an object of its family."""
    # Told a kind (whatever it is) and that it does not block, Python changes nothing in the flags
    # of the descriptor: the copy shares them.
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    copy = socket.socket(socket.AF_INET, kind, 0, fileno=number)
    family = copy.getsockopt(socket.SOL_SOCKET, SO_DOMAIN)
    return socket.socket(family, kind, 0, fileno=copy.detach())


@cache
def _library() -> Any:
    import ctypes  # 10 ms of start-up that only --bind needs

    return ctypes.CDLL(None, use_errno=True)


def _read_errno() -> int:
    import ctypes

    return ctypes.get_errno()


def _read_options(copy: socket.socket) -> SocketOptions:
    def is_set(level: int, option: int) -> bool:
        return bool(copy.getsockopt(level, option))

    inet6 = copy.family == socket.AF_INET6
    return SocketOptions(
        reuseaddr=is_set(socket.SOL_SOCKET, socket.SO_REUSEADDR),
        reuseport=is_set(socket.SOL_SOCKET, socket.SO_REUSEPORT),
        v6only=is_set(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) if inet6 else None,
    )


# Sockets that no dump has --------------------------------------------------------------------


def find_bound_sockets(port: int) -> tuple[tuple[SocketFacts, ...], str | None]:
    """TCP sockets of our network namespace that have a port, and that sock_diag does not list.

    Returns:
        What was found, and why there may be more.
    """
    found: dict[int, SocketFacts] = {}
    reason = _explain_unseen()
    netns, known = read_netns("self"), _read_listed()
    for pid in read_pids():
        try:
            inodes = {inode for _, inode in _read_descriptors(pid)} - known - found.keys()
            for inode, copy in _copy_sockets(pid, inodes):
                if _is_tcp(copy) and copy.getsockname()[1] == port and _netns_of(copy) == netns:
                    found[inode] = _describe(copy, inode, netns)
        except OSError as error:
            reason = f"{HIDES_BOUND}: {_explain(error)}"
    return tuple(found.values()), reason


def _read_listed() -> frozenset[int]:
    """The sockets that the kernel does list in some way: none of these is looked for."""
    listed = {row.inode or 0 for row in read_sockets() if row.state != "BOUND"}
    with contextlib.suppress(OSError), open("/proc/net/unix", "rb") as file:
        listed.update(int(line.split()[6]) for line in file.readlines()[1:])
    return frozenset(listed)


def _explain_unseen() -> str | None:
    if hides_processes():
        return f"{HIDES_BOUND}, and /proc hides other users' processes"
    try:
        if os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE:
            return None
    except OSError:
        pass
    return f"{HIDES_BOUND}, and there may be processes outside of this pid namespace"


def _is_tcp(copy: socket.socket) -> bool:
    protocol = copy.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)
    return copy.family in (socket.AF_INET, socket.AF_INET6) and protocol in TCP


def _netns_of(copy: socket.socket) -> int:
    namespace = fcntl.ioctl(copy, SIOCGSKNS)
    try:
        return os.fstat(namespace).st_ino
    finally:
        os.close(namespace)


def _describe(copy: socket.socket, inode: int, netns: int | None) -> SocketFacts:
    """As sock_diag would, without the creator: nothing else tells who that was."""
    address, port = copy.getsockname()[:2]
    options = _read_options(copy)
    return SocketFacts(
        family="inet" if options.v6only is None else "inet6",
        protocol="tcp",
        type="stream",
        address=address.partition("%")[0],
        port=port,
        peer_address=None,
        peer_port=None,
        state="BOUND",
        inode=inode,
        uid=os.fstat(copy.fileno()).st_uid,
        cookie=0,
        cgroup_id=None,
        v6only=options.v6only,
        expires_us=None,
        netns=netns,
        interface=copy.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) or None,
    )
