"""Copies of other processes' sockets, for what no list of the kernel's tells.

A copy keeps the socket, and so its port, for as long as it is open: each is closed before the next
is made. Pids and descriptors are used again, so a copy counts only when its inode is the one that
was asked for.

Source: pidfd_open(2), pidfd_getfd(2), socket(7), ipv6(7), tcp(7), linux/sockios.h (SIOCGSKNS).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator

from sdtool.model.binding import OptionScan, SocketOptions
from sdtool.model.sockets import SocketFacts, SocketSource
from sdtool.sources.libc import call
from sdtool.sources.processes import PTRACE_HINT, may_look_into_others
from sdtool.sources.sockets import CLOSE, PROTOCOLS, SOCKET_TYPES, state_name

PIDFD_GETFD = 438  # the same on every architecture that has it
PIDFD_THREAD = os.O_EXCL
SO_PROTOCOL = 38
SO_DOMAIN = 39
SO_BINDTOIFINDEX = 62
SIOCGSKNS = 0x894C

PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}

TAGGING = (b"net_cls", b"net_prio")

UNSUPPORTED = "needs Linux 5.6 (pidfd_getfd)"
NO_THREADS = "needs Linux 6.9 where the main thread of a process has ended (PIDFD_THREAD)"
FILTERED = "pidfd_getfd is forbidden here (a container's filter of system calls)"
TAGGED = "a copy would change the net_cls or net_prio tag of its socket (cgroup v1)"
BEYOND = (
    "our capabilities do not reach its process (it has others in a user namespace above ours), "
    "or a security module forbids it (kernel.yama.ptrace_scope=3)"
)
NETNS_HINT = "to name the network namespace of a socket needs CAP_NET_ADMIN there"
ASKING_NETNS = "SIOCGSKNS"

Held = tuple[int, int, int]
"""(thread, descriptor, inode) of a socket that a process holds."""


class Tags:
    """The tags that cgroup v1 gives to the sockets of processes, read once for a batch of copies.

    A process that gets a copy gives the socket its own tag.
    """

    def __init__(self) -> None:
        self._own = _read_tags("self")
        self._found: dict[int, tuple[bytes, ...]] = {}

    def differ(self, pid: int) -> bool:
        """Whether a process has another one than we."""
        # Each process is in every hierarchy that there is: without one of ours there is none.
        if not self._own:
            return False
        if pid not in self._found:
            self._found[pid] = _read_tags(pid)
        return self._found[pid] != self._own


def _read_tags(pid: int | str) -> tuple[bytes, ...]:
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        lines = file.read().splitlines()
    return tuple(line for line in lines if {*TAGGING} & {*line.split(b":")[1].split(b",")})


@contextlib.contextmanager
def copied_socket(held: Held, tags: Tags | None = None) -> Iterator[socket.socket]:
    """A copy of another process's descriptor.

    Args:
        tags: Those of the batch that it is one of; None for one alone.

    Raises:
        FileNotFoundError: The process or the descriptor is gone, or is another socket by now.
        OSError: The kernel refuses, or making a copy would change the socket (EXDEV).
    """
    task, fd, inode = held
    try:
        if (tags or Tags()).differ(task):
            raise OSError(errno.EXDEV, TAGGED)
        pidfd = _open_task(task)
    except ProcessLookupError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    try:
        number = _get_descriptor(pidfd, fd)
    finally:
        os.close(pidfd)
    facts = os.fstat(number)
    if not stat.S_ISSOCK(facts.st_mode) or facts.st_ino != inode:
        os.close(number)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with _wrap(number) as copy:
        yield copy


def _open_task(task: int) -> int:
    """A pidfd of a process, or of a thread that is not its first.

    Raises:
        ProcessLookupError: It is gone.
        OSError: EINVAL for a thread, before Linux 6.9.
    """
    try:
        return os.pidfd_open(task)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    return os.pidfd_open(task, PIDFD_THREAD)


def explain_refusal(error: OSError) -> str:
    """Why a copy could not be made, or would not tell, and what would permit it."""
    code = error.errno
    if code == errno.ENOSYS:
        return UNSUPPORTED
    if code == errno.EXDEV:
        return TAGGED
    if code == errno.EINVAL:
        return NO_THREADS
    if not isinstance(error, PermissionError):
        return f"a copy could not be made: {error.strerror}"
    if error.filename == ASKING_NETNS:
        return NETNS_HINT
    if not may_copy():
        return FILTERED
    return BEYOND if may_look_into_others() else PTRACE_HINT


def may_copy() -> bool:
    """Whether we may copy descriptors at all: of our own process, if of none else."""
    try:
        own = os.pidfd_open(os.getpid())
        try:
            os.close(_get_descriptor(own, own))
        finally:
            os.close(own)
    except OSError:
        return False
    return True


def _get_descriptor(pidfd: int, fd: int) -> int:
    try:
        return call("syscall", PIDFD_GETFD, pidfd, fd, 0)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ESRCH):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None


def _wrap(number: int) -> socket.socket:
    """The descriptor as an object of its family."""
    # Told a kind (whatever it is) and that it does not block, Python changes nothing in the flags
    # of the descriptor: the copy shares them.
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    copy = socket.socket(socket.AF_INET, kind, 0, fileno=number)
    family = copy.getsockopt(socket.SOL_SOCKET, SO_DOMAIN)
    return socket.socket(family, kind, 0, fileno=copy.detach())


def open_namespace(copy: socket.socket) -> int:
    """A descriptor of the network namespace that a socket is in.

    Raises:
        OSError: The kernel refuses; ``filename`` says at what.
    """
    try:
        return fcntl.ioctl(copy, SIOCGSKNS)
    except OSError as error:
        raise OSError(error.errno, error.strerror, ASKING_NETNS) from error


# Options -------------------------------------------------------------------------------------


def read_options(sockets: Iterable[Held]) -> OptionScan:
    """The options of sockets; one that has gone meanwhile has none."""
    found: list[tuple[int, SocketOptions]] = []
    refusal: OSError | None = None
    tags = Tags()
    for held in sockets:
        try:
            with copied_socket(held, tags) as copy:
                found.append((held[2], _read_options(copy)))
        except FileNotFoundError:
            continue
        except OSError as error:
            refusal = refusal or error
    reason = explain_refusal(refusal) if refusal is not None else None
    return OptionScan(by_inode=tuple(sorted(found)), reason=reason)


def _read_options(copy: socket.socket) -> SocketOptions:
    def is_set(level: int, option: int) -> bool:
        return bool(copy.getsockopt(level, option))

    inet6 = copy.family == socket.AF_INET6
    return SocketOptions(
        reuseaddr=is_set(socket.SOL_SOCKET, socket.SO_REUSEADDR),
        reuseport=is_set(socket.SOL_SOCKET, socket.SO_REUSEPORT),
        v6only=is_set(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) if inet6 else None,
    )


def describe(copy: socket.socket, inode: int) -> SocketFacts | None:
    """A socket that has a port as sock_diag would show it; None for one that has none.

    Its creator is not told, nor its cookie, nor its network namespace and the name of its device.
    """
    protocol = PROTOCOL_NAMES.get(copy.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL))
    if copy.family not in (socket.AF_INET, socket.AF_INET6) or protocol is None:
        return None
    address, port = copy.getsockname()[:2]
    if not port:
        return None
    options = _read_options(copy)
    return SocketFacts(
        family="inet" if options.v6only is None else "inet6",
        protocol=protocol,
        type=SOCKET_TYPES[protocol],
        address=address.partition("%")[0],
        port=port,
        peer_address=None,
        peer_port=None,
        state=state_name(protocol, _read_state(copy)),
        inode=inode,
        uid=os.fstat(copy.fileno()).st_uid,
        cookie=0,
        cgroup_id=None,
        v6only=options.v6only,
        expires_us=None,
        netns=None,
        interface=copy.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) or None,
        source=SocketSource.COPY,
    )


def _read_state(copy: socket.socket) -> int:
    """The state of a TCP socket, the first byte of its struct tcp_info; of others CLOSE."""
    try:
        return copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return CLOSE
