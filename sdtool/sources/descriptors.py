"""Descriptors of processes: who holds a socket, and which network namespaces only they keep alive.

The descriptors of other users' processes need CAP_DAC_READ_SEARCH to be listed and CAP_SYS_PTRACE
to be read. A look costs some 50 us a process, so it is made once for all questions: a ``Sweep``.

Source: proc_pid_fd(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdtool.model.process import ProcessRef
from sdtool.model.sockets import HolderScan, SocketFacts
from sdtool.sources.namespaces import NetworkNamespace
from sdtool.sources.processes import (
    HIDDEN,
    PTRACE_HINT,
    hides_processes,
    is_hidden,
    is_initial_pid_namespace,
    may_look_into_others,
    parse_netns,
    read_pids,
    read_process,
)
from sdtool.sources.spread import spread

if TYPE_CHECKING:
    from sdtool.sources.copies import Held

INET_NAMES = (b"TCP", b"UDP", b"MPTCP")
"""How the names of protocols with ports begin, as a socket's file has them in sockfs."""


@dataclass(frozen=True, slots=True)
class CloserLook:
    """What copies of sockets told that are in none of the kernel's lists.

    Attributes:
        namespaces: Where some of them are, and nobody has looked yet.
        sockets: Those that have a port.
        reason: Why some could not be copied, and what would permit it; None when all could.
    """

    namespaces: tuple[NetworkNamespace, ...]
    sockets: tuple[SocketFacts, ...]
    reason: str | None


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What of the descriptors of one process matters here.

    Attributes:
        task: The thread whose table they are from: another than the first where that has ended.
        sockets: Inode -> one of its descriptors for that socket.
        namespaces: Inode of a network namespace -> one of its descriptors for that.
    """

    task: int
    sockets: dict[int, int]
    namespaces: dict[int, int]


def read_descriptors(pid: int) -> Descriptors | None:
    """The sockets and namespaces that a process holds; None when they may not be seen.

    A process that is gone holds none.
    """
    try:
        found = _read_table(pid)
        if found is None:
            # None at all: a kernel thread, or its main thread has ended and others go on.
            tables = map(_read_table, map(int, os.listdir(f"/proc/{pid}/task")))
            found = next(filter(None, tables), None)
    except (FileNotFoundError, ProcessLookupError):
        if is_hidden(pid):
            return None
        found = None
    except PermissionError:
        return None
    return found or Descriptors(pid, {}, {})


def _read_table(task: int) -> Descriptors | None:
    """A thread's table of descriptors; None when there is nothing in it."""
    held = Descriptors(task, {}, {})
    directory = os.open(f"/proc/{task}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        names = os.listdir(directory)
        for fd in names:
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(fd, dir_fd=directory)
                if target.startswith("socket:["):
                    held.sockets[int(target[8:-1])] = int(fd)
                elif (inode := parse_netns(target)) is not None:
                    held.namespaces[inode] = int(fd)
    finally:
        os.close(directory)
    return held if names else None


def sees_all_descriptors() -> bool:
    """Whether our capabilities let us look into the descriptors of other users' processes.

    In a user namespace they count for its own processes only (user_namespaces(7)): PID 1 tells.
    """
    if not may_look_into_others():
        return False
    return read_descriptors(1) is not None


class Sweep:
    """One look through the descriptors of processes.

    Args:
        pids: Whose; None for every process of this pid namespace.

    Attributes:
        pids: Those that were looked at.
        hidden: Those of them whose descriptors may not be seen.
    """

    def __init__(self, pids: Iterable[int] | None = None) -> None:
        self._all = pids is None
        self._found: dict[int, Descriptors] = {}
        self.hidden: set[int] = set()
        self.pids = tuple(read_pids() if pids is None else pids)
        for pid, held in (one for part in spread(self.pids, _look) for one in part):
            if held is None:
                self.hidden.add(pid)
            elif held.sockets or held.namespaces:
                self._found[pid] = held

    @property
    def reason(self) -> str | None:
        """Whose descriptors were not seen, and what would permit it; None when all were."""
        if self._all and hides_processes():
            return f"other users' processes are hidden: {HIDDEN}"
        if self.hidden:
            many = "1 process" if len(self.hidden) == 1 else f"{len(self.hidden)} processes"
            return f"{many} may not be looked into: {PTRACE_HINT}"
        return None

    @property
    def outside(self) -> bool:
        """Whether there may be processes outside our pid namespace, which nobody here sees."""
        return not is_initial_pid_namespace()

    def holders_of(self, inodes: Collection[int]) -> HolderScan:
        """Which processes hold which of these sockets."""
        wanted, found = frozenset(inodes), []
        for pid, held in self._found.items():
            inodes_here = wanted & held.sockets.keys()
            process = read_process(pid) if inodes_here else None
            # Only when it still has one of them the pid is still that of who was looked at.
            if process is None or not any(
                _still_holds(pid, (held.task, held.sockets[inode], inode)) for inode in inodes_here
            ):
                continue
            ref = ProcessRef(pid=pid, comm=process.comm)
            found += [(inode, ref, process.control_group) for inode in inodes_here]
        return HolderScan(
            by_inode=tuple(sorted(found, key=_by_inode)),
            complete=self._all and self.reason is None,
            reason=self.reason,
            outside=self.outside,
        )

    @property
    def sockets(self) -> frozenset[int]:
        """The inodes of all sockets that were seen."""
        return frozenset(inode for held in self._found.values() for inode in held.sockets)

    def namespaces(self, known: Collection[int | None]) -> Iterator[NetworkNamespace]:
        """The network namespaces beside the known ones that a descriptor stands for."""
        ways: dict[int, list[str]] = {}
        for held in self._found.values():
            for inode, fd in held.namespaces.items():
                if inode not in known:
                    ways.setdefault(inode, []).append(f"/proc/{held.task}/fd/{fd}")
        for inode, paths in ways.items():
            yield NetworkNamespace(inode, paths=tuple(paths))

    def with_ports(self, inodes: Collection[int]) -> frozenset[int]:
        """Those of the sockets that can have a port: TCP, MPTCP, UDP."""
        return frozenset(held[2] for held in self.find(inodes) if _has_port(held))

    def find(self, inodes: Collection[int]) -> Iterator[Held]:
        """One holder of each of the sockets that was seen."""
        left = set(inodes)
        for held in self._found.values():
            for inode in held.sockets.keys() & left:
                left.discard(inode)
                yield held.task, held.sockets[inode], inode

    @contextlib.contextmanager
    def look_closer(
        self, inodes: Collection[int], known: Collection[int | None]
    ) -> Iterator[CloserLook]:
        """What copies of sockets tell; the doors of new namespaces are open inside the context.

        Args:
            inodes: Of sockets that the kernel does not list where we have looked.
            known: The network namespaces where we have looked.
        """
        holders = list(filter(_has_port, self.find(inodes)))
        if not holders:
            yield CloserLook(namespaces=(), sockets=(), reason=None)
            return
        from sdtool.sources.copies import Tags, copied_socket, describe, explain_refusal

        opened: dict[int, int] = {}
        found: list[SocketFacts] = []
        reason, tags = None, Tags()
        try:
            for held in holders:
                try:
                    with copied_socket(held, tags) as copy:
                        facts = describe(copy, held[2])
                        if facts is not None:
                            netns = _note_namespace(copy, known, opened)
                            found.append(replace(facts, netns=netns))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    reason = explain_refusal(error)
            yield CloserLook(
                namespaces=tuple(
                    NetworkNamespace(netns, paths=(f"/proc/self/fd/{fd}",))
                    for netns, fd in sorted(opened.items())
                ),
                sockets=tuple(found),
                reason=reason,
            )
        finally:
            for fd in opened.values():
                os.close(fd)


def _note_namespace(
    copy: socket.socket, known: Collection[int | None], opened: dict[int, int]
) -> int:
    """The network namespace of a socket; the first of each new one leaves it open."""
    from sdtool.sources.copies import open_namespace

    fd = open_namespace(copy)
    netns = os.fstat(fd).st_ino
    if netns in known or netns in opened:
        os.close(fd)
    else:
        opened[netns] = fd
    return netns


def _still_holds(pid: int, held: Held) -> bool:
    task, fd, inode = held
    for path in (f"/proc/{task}/fd/{fd}", *_thread_paths(pid, fd)):
        with contextlib.suppress(OSError):
            return os.readlink(path) == f"socket:[{inode}]"
    return False


def _thread_paths(pid: int, fd: int) -> Iterator[str]:
    """Where a descriptor is to be seen when the main thread has ended."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield f"/proc/{pid}/task/{thread}/fd/{fd}"


def _look(pids: Iterable[int]) -> list[tuple[int, Descriptors | None]]:
    return [(pid, read_descriptors(pid)) for pid in pids]


def _by_inode(row: tuple[int, ProcessRef, str | None]) -> tuple[int, int]:
    return row[0], row[1].pid


def _has_port(held: Held) -> bool:
    """Whether a descriptor is a socket of a protocol with ports; False too when it is gone."""
    task, fd, _ = held
    try:
        name = os.getxattr(f"/proc/{task}/fd/{fd}", "system.sockprotoname")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True  # not known: a copy will tell, or say why it cannot
    return name.startswith(INET_NAMES)
