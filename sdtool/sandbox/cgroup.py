"""The sandbox's cgroups: where they live, whose they are, and how they end.

A sandbox is one directory at the root of the cgroup2 hierarchy, named after its guardian
process, so that one left behind is recognised without any state file. What the kernel says is
read by sdtool.sources; this is about writing (kernel: Documentation/admin-guide/cgroup-v2.rst).
Nothing here touches a cgroup that is not named so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from sdtool.errors import AccessDenied, Unavailable
from sdtool.sources.cgroups import parse_populated, read_mount, read_named_mount, read_procs
from sdtool.sources.processes import read_identity, read_process

_LOGGER = logging.getLogger(__name__)

_NAME = re.compile(r"sdtool-sandbox-(?P<pid>\d+)-(?P<ticks>\d+)-(?P<pidns>\d+)")
_ROUND = 0.1
_STALE_TIMEOUT = 0.2
_SWEEP_TIMEOUT = 0.5


def read_hierarchy() -> Path:
    """Read where cgroup2 is mounted.

    Raises:
        Unavailable: It is not mounted.
    """
    mount = read_mount()
    if mount.version != 2:
        raise Unavailable(
            "No cgroup2 hierarchy is mounted here.", hint="mount -t cgroup2 cgroup2 DIRECTORY"
        )
    return mount.path


def tree_of(pid: int) -> Path:
    """Name the directory of the sandbox that process ``pid`` of this pid namespace guards.

    Raises:
        Unavailable: cgroup2 is not mounted, or there is no such process.
    """
    guardian = read_identity(pid)
    if guardian is None:
        raise Unavailable(f"The guardian, process {pid}, is gone.")
    name = f"sdtool-sandbox-{pid}-{guardian.start_ticks}-{_read_pid_namespace()}"
    return read_hierarchy() / name


def _read_pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def create(tree: Path, members: tuple[str, ...]) -> None:
    """Make a sandbox's cgroup with its members, and hand every controller it has to them.

    ``tree`` itself must never hold a process: that is what allows it controllers.

    Raises:
        AccessDenied: The hierarchy is read-only, or not ours to write.
    """
    try:
        for member in members:
            (tree / member).mkdir(parents=True, mode=0o755)
    except OSError as error:
        raise AccessDenied(
            f"Cannot create the cgroup {tree}: {error.strerror}.",
            hint="a container needs its cgroup2 mounted writable (run it privileged)",
        ) from error
    for controller in (tree / "cgroup.controllers").read_text().split():
        # One at a time: a controller that cannot be delegated must not cost the others.
        with contextlib.suppress(OSError):
            write(tree / "cgroup.subtree_control", f"+{controller}")


def write(file: Path, text: str) -> None:
    """Write an interface file; a missing one is FileNotFoundError, never created."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def destroy(tree: Path, *, timeout: float) -> bool:
    """Kill every process in ``tree`` and remove it, directories bottom up.

    Args:
        tree: Directory of the cgroup; one that does not exist is already destroyed.
        timeout: Seconds to wait for the kernel, which cannot kill what sleeps uninterruptibly
            or what a debugger holds; with 0 it is tried once.

    Returns:
        Whether the cgroup is gone.
    """
    deadline = time.monotonic() + timeout
    remaining = timeout
    while tree.exists():
        _kill(tree)
        # Short rounds: without cgroup.kill a fork can slip through, and a process can join late.
        if _wait_empty(tree, timeout=min(_ROUND, remaining)):
            remove(tree)
        if remaining <= 0:
            break
        remaining = max(0.0, deadline - time.monotonic())
    return not tree.exists()


def _kill(tree: Path) -> None:
    with contextlib.suppress(OSError):  # before Linux 5.14, or somebody else has just removed it
        write(tree / "cgroup.kill", "1")
    # cgroup.kill signals main threads: one that has ended while another runs does not hear it.
    for pid in _read_members(tree):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _read_members(tree: Path) -> Iterator[int]:
    """Read the processes of a cgroup and its descendants, visible ones of our pid namespace."""
    for directory, _, _ in os.walk(tree):
        yield from read_procs(directory)


def _wait_empty(tree: Path, *, timeout: float) -> bool:
    """Wait until no process is left in a cgroup, at most ``timeout`` seconds.

    The kernel flags a change of cgroup.events with POLLPRI.
    """
    try:
        events = (tree / "cgroup.events").open()
    except OSError:  # it is gone, or going
        return True
    with events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        deadline = time.monotonic() + timeout
        while parse_populated(_reread(events.fileno())):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            poll.poll(remaining * 1000)
    return True


def _reread(fd: int) -> bytes:
    try:
        return os.pread(fd, 4096, 0)
    except OSError:  # ENODEV: the cgroup was removed while it was open
        return b""


def remove(tree: Path) -> None:
    """Remove an empty cgroup and its descendants; a directory still in use stays."""
    for directory, _, _ in os.walk(tree, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def remove_mirror(name: str) -> None:
    """Remove what a sandbox of this name has in systemd's cgroup v1 hierarchy, once it is over."""
    mirror = read_named_mount()
    if mirror is not None and _NAME.fullmatch(name):
        remove(mirror / name)


def sweep() -> tuple[Path, ...]:
    """Destroy the sandboxes whose guardian is dead, and return those that could not be.

    It takes half a second at most: what the kernel cannot kill now is for a later sweep. Those
    of another pid namespace are left alone: whether their guardian lives is not known.
    """
    paths = read_hierarchy().glob("sdtool-sandbox-*")
    stale = [path for path in paths if _is_stale(path.name)]
    mirror = read_named_mount()
    for path in mirror.glob("sdtool-sandbox-*") if mirror else ():
        if _is_stale(path.name):
            remove(path)
    for path in stale:
        _kill(path)  # all of them, before any is waited for
    deadline = time.monotonic() + _SWEEP_TIMEOUT
    left = []
    for path in stale:
        remaining = max(0.0, deadline - time.monotonic())
        if not destroy(path, timeout=min(_STALE_TIMEOUT, remaining)):
            left.append(path)
            report(path)
    return tuple(left)


def _is_stale(name: str) -> bool:
    match = _NAME.fullmatch(name)
    if match is None or int(match["pidns"]) != _read_pid_namespace():
        return False
    guardian = read_process(int(match["pid"]))
    if guardian is None or guardian.state in "ZX":
        return True
    return guardian.id.start_ticks != int(match["ticks"])


def report(tree: Path) -> None:
    """Log that a sandbox could not be removed, and which processes are to blame."""
    members = " ".join(map(str, sorted(_read_members(tree)))) or "(none that we see)"
    _LOGGER.warning("The cgroup %s stays: its processes %s cannot be killed.", tree, members)
