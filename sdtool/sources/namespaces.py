"""Network namespaces: which there are, and a look at something in each.

A socket belongs to a network namespace, and sock_diag shows those of one. A namespace lives while
a process is in it, a file system has it mounted, or a descriptor holds it or a socket in it. The
first two are found here; the third where descriptors are looked through (``descriptors``).

To look into one, a thread of its own goes there: the others stay where they are.

Source: network_namespaces(7), setns(2), proc_pid_ns(5), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sdtool.sources.libc import call, load
from sdtool.sources.mounts import read_mounts
from sdtool.sources.processes import hides_processes, parse_netns, read_netns
from sdtool.sources.spread import Crew, spread

T = TypeVar("T")

CLONE_NEWNET = 0x40000000

DISCARD = 9  # the port of nobody

NAMED = ("/run/netns/", "/var/run/netns/")
"""Where ip-netns(8) keeps its own."""

ENTER_HINT = "needs CAP_SYS_ADMIN and CAP_SYS_PTRACE (root)"


@dataclass(frozen=True, slots=True)
class NetworkNamespace:
    """A network namespace and the ways to it.

    Attributes:
        inode: What names it; None for that of other users' processes, which may not be told.
        name: Below /run/netns, or the path of another mount; None when it is not mounted.
        paths: Files that stand for it, to be tried in this order.
        pids: The processes that are in it, of those that were looked at; not told of our own.
        own: It is the one we are in.
    """

    inode: int | None
    name: str | None = None
    paths: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    own: bool = False


@dataclass(frozen=True, slots=True)
class NamespaceCensus:
    """The network namespaces that were found, our own first.

    Attributes:
        reason: Why there may be more; None when every process and mount was seen.
    """

    namespaces: tuple[NetworkNamespace, ...]
    reason: str | None = None


def read_namespaces() -> NamespaceCensus:
    """Every network namespace that a process is in, or that is mounted."""
    census = _Census()
    reason = None
    if hides_processes():
        reason = "other users' processes are hidden, and with them their network namespaces"
    census.add_processes(None)
    census.add_mounts("1", "/proc/1/root")
    census.add_mounts("self", "")
    return NamespaceCensus(census.namespaces(), reason)


def read_namespaces_of(pids: Iterable[int]) -> NamespaceCensus:
    """Our own network namespace, and those that these processes are in."""
    census = _Census()
    census.add_processes(pids)
    census.add_mounts("self", "")
    found = census.namespaces()
    return NamespaceCensus(tuple(place for place in found if place.own or place.pids))


def read_thread_namespaces(
    pids: Sequence[int], known: Collection[int | None]
) -> tuple[NetworkNamespace, ...]:
    """The network namespaces beside the known ones that only a thread is in, not its process."""
    paths: dict[int, list[str]] = {}
    for part in spread(pids, _read_thread_paths):
        for inode, path in part:
            if inode not in known:
                paths.setdefault(inode, []).append(path)
    return tuple(NetworkNamespace(inode, paths=tuple(paths[inode])) for inode in sorted(paths))


def read_mounted_namespaces(
    pids: Sequence[int], known: Collection[int | None]
) -> tuple[NetworkNamespace, ...]:
    """The network namespaces beside the known ones that are mounted where other processes live.

    In a mount namespace that is neither PID 1's nor ours: of a unit with PrivateMounts=, say.
    """
    places: dict[str, int] = {}
    for found in spread(pids, _read_mount_links):
        places |= found
    census = _Census()
    for pid in places.values():
        census.add_mounts(str(pid), f"/proc/{pid}/root")
    return tuple(
        place for place in census.namespaces() if not place.own and place.inode not in known
    )


def _read_mount_links(pids: Iterable[int]) -> dict[str, int]:
    """One process of each mount namespace."""
    found: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/{pid}/ns/mnt")] = pid
    return found


def _read_thread_paths(pids: Iterable[int]) -> list[tuple[int, str]]:
    found = []
    for pid in pids:
        for link, path in _read_thread_links(pid, at_least=2):
            inode = parse_netns(link)
            if inode is not None:
                found.append((inode, path))
    return found


class _Census:
    """Namespaces as they are found, each once."""

    def __init__(self) -> None:
        self._own = read_netns("thread-self")
        self._pids: dict[int | None, list[str]] = {}
        self._untold: list[str] = []
        self._names: dict[int, str] = {}
        self._mounts: dict[int, list[str]] = {}

    def add_processes(self, pids: Iterable[int] | None) -> None:
        """Note where processes are, None for all: 5 us for each, so nothing more is done here."""
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = filter(str.isdigit, os.listdir(proc)) if pids is None else map(str, pids)
            for found in spread(tuple(names), partial(_read_links, proc)):
                for link, there in found.items():
                    if link is None:
                        self._untold += there
                    else:
                        self._pids.setdefault(parse_netns(link), []).extend(there)
        finally:
            os.close(proc)

    def add_mounts(self, pid: str, root: str) -> None:
        """Note the namespaces that a process sees mounted, by ip-netns(8) for one."""
        for mount in read_mounts(pid, "nsfs"):
            inode = parse_netns(mount.root)
            if inode is not None:
                self._names.setdefault(inode, _name_of(mount.path))
                self._mounts.setdefault(inode, []).append(f"{root}{mount.path}")

    def namespaces(self) -> tuple[NetworkNamespace, ...]:
        """All that were found, our own first, those that may not be told last."""
        inodes = {inode for inode in (*self._pids, *self._mounts) if inode is not None}
        own = NetworkNamespace(self._own, self._names.get(self._own or 0), own=True)
        others = (self._namespace(inode) for inode in sorted(inodes - {self._own}))
        return own, *others, *self._untold_namespaces()

    def _namespace(self, inode: int) -> NetworkNamespace:
        pids = tuple(map(int, self._pids.get(inode, ())))
        paths = (*self._mounts.get(inode, ()), *(f"/proc/{pid}/ns/net" for pid in pids))
        return NetworkNamespace(inode, self._names.get(inode), paths, pids)

    def _untold_namespaces(self) -> Iterator[NetworkNamespace]:
        """Those of processes whose ns/net is closed to us: /proc/PID/net tells them apart."""
        if not self._untold:
            return
        known = {_net_identity("thread-self")}
        known |= {_net_identity(pids[0]) for pids in self._pids.values()}
        found: dict[int, list[int]] = {}
        for pid in self._untold:
            identity = _net_identity(pid)
            if identity is not None and identity not in known:
                found.setdefault(identity, []).append(int(pid))
        for pids in found.values():
            yield NetworkNamespace(None, pids=tuple(pids))


def _read_links(proc: int, pids: Iterable[str]) -> dict[str | None, list[str]]:
    """The processes by their ns/net; under None those of which it may not be read."""
    found: dict[str | None, list[str]] = {}
    for pid in pids:
        try:
            link = os.readlink(pid + "/ns/net", dir_fd=proc)
        except PermissionError:
            found.setdefault(None, []).append(pid)
        except OSError:
            # It has ended, or its main thread has: then the others say where it is.
            for link in {link for link, _ in _read_thread_links(pid)}:
                found.setdefault(link, []).append(pid)
        else:
            found.setdefault(link, []).append(pid)
    return found


def _read_thread_links(pid: int | str, at_least: int = 1) -> Iterator[tuple[str, str]]:
    """(where it leads, path) of the ns/net of each thread; none where there are fewer threads."""
    threads: list[str] = []
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    for thread in threads if len(threads) >= at_least else ():
        path = f"/proc/{pid}/task/{thread}/ns/net"
        with contextlib.suppress(OSError):
            yield os.readlink(path), path


def read_inode(path: str) -> int | None:
    """The inode of a namespace that is mounted, as the machine's PID 1 sees it; None if it is not.

    Where PID 1's mounts are closed to us, our own have to do.
    """
    for root in ("/proc/1/root", ""):
        with contextlib.suppress(OSError):
            found = os.stat(f"{root}{path}")
            return found.st_ino if _is_namespace(found, found.st_ino) else None
    return None


def _name_of(path: str) -> str:
    return next((path.removeprefix(p) for p in NAMED if path.startswith(p)), path)


def _net_identity(pid: int | str) -> int | None:
    """A number that processes of one network namespace have in common, and no others.

    The files of /proc/PID/net are made once for each namespace, and everybody may look at them.
    """
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/net/tcp").st_ino
    return None


# Looking into them ---------------------------------------------------------------------------


def look_into(
    namespaces: Iterable[NetworkNamespace], look: Callable[[], T]
) -> list[tuple[NetworkNamespace, T | OSError]]:
    """Look at something in each namespace; one that was gone before we came is left out.

    Args:
        look: Called in each, by a thread that is there, in several at once. Its own errors come
            out of here.

    Returns:
        What it saw, or why we could not get in: our own first, then in the order they came in.
    """
    places = tuple(namespaces)
    own = [place for place in places if place.own]
    others = [place for place in places if not place.own]
    # Where a thread is it stays: the process's other threads never see the places it was in.
    if others:
        load()
    crew = Crew([partial(_look_there, place, look) for place in others])
    with crew.helpers(len(others)):
        seen: list[tuple[NetworkNamespace, T | OSError]] = [(place, look()) for place in own]
    for index, place in enumerate(others):
        # No threads for us (TasksMax=): then we may not go anywhere.
        found = crew.done.get(index, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
        if not isinstance(found, (FileNotFoundError, ProcessLookupError)):
            seen.append((place, found))
    return seen


def _look_there(place: NetworkNamespace, look: Callable[[], T]) -> T | OSError:
    try:
        _enter(place)
    except OSError as error:
        return error
    return look()


def explain_refusal(error: Exception) -> str:
    """Why a namespace could not be looked into, and what would permit it."""
    if isinstance(error, PermissionError):
        return ENTER_HINT
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def has_address(address: str) -> bool:
    """Whether an address is a local one in this thread's network namespace; a name never is.

    A datagram socket is pointed at it, which sends nothing: only to ourselves we speak from the
    address that we speak to. To bind it would prove less: where not even the loopback device has
    ever been up, the kernel lets any address be bound.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        raw = socket.inet_pton(family, address)
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect((address, DISCARD))
            return socket.inet_pton(family, probe.getsockname()[0]) == raw
    except OSError:
        return False


def _enter(namespace: NetworkNamespace) -> None:
    """Move this thread into a namespace.

    Raises:
        OSError: No path leads there; FileNotFoundError when all that led there are gone.
    """
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if not namespace.paths:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    for path in namespace.paths:
        try:
            if _enter_by(path, namespace.inode):
                return
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError as error:
            failure = error
    raise failure


def _enter_by(path: str, inode: int | None) -> bool:
    """Go through a path, if it still leads there: its process may have moved, or be another.

    It is opened in two steps: what the path leads to by now may be a FIFO, or a device.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not _is_namespace(os.fstat(place), inode):
            return False
        fd = os.open(f"/proc/thread-self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(fd)
        finally:
            os.close(fd)
        return True
    finally:
        os.close(place)


def _is_namespace(found: os.stat_result, inode: int | None) -> bool:
    """Whether a file is that namespace: of the file system of namespaces, and of that inode."""
    return (found.st_dev, found.st_ino) == (os.stat("/proc/thread-self/ns/net").st_dev, inode)


def _setns(fd: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(fd, CLONE_NEWNET)
        return
    call("setns", fd, CLONE_NEWNET)
