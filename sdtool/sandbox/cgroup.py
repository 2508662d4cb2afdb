"""The sandbox's cgroups: where they live, whose they are, and how they end.

A sandbox is one directory at the root of the cgroup2 hierarchy, named after its guardian
process, so that one left behind is recognised without any state file. The truth comes from
/proc/self/mountinfo and /proc/PID/stat (proc(5)) and the cgroup2 interface files (kernel:
Documentation/admin-guide/cgroup-v2.rst). Nothing here touches a cgroup that is not named so.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdtool.errors import AccessDenied, Unavailable

_NAME = re.compile(r"sdtool-sandbox-(?P<pid>\d+)-(?P<ticks>\d+)-(?P<pidns>\d+)")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """The cgroup2 hierarchy as this process sees it.

    Attributes:
        mount: Where it is mounted.
        prefix: The cgroup that stands at ``mount``, "" for the root; not "" where a container
            was given a part of its host's hierarchy.
    """

    mount: Path
    prefix: str


def parse_hierarchy(mountinfo: str) -> Hierarchy | None:
    """Find the cgroup2 mount that shows most of the hierarchy, None when there is none.

    Source: proc(5), /proc/PID/mountinfo.
    """
    found = []
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(" - ")
        root, mount = fields.split()[3:5]
        # A root of "/.." lies outside this cgroup namespace: nothing can be placed there.
        if tail.split()[0] == "cgroup2" and not root.startswith("/.."):
            found.append(
                Hierarchy(mount=Path(_unescape(mount)), prefix=_unescape(root).rstrip("/"))
            )
    return min(found, key=lambda hierarchy: len(hierarchy.prefix), default=None)


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def read_hierarchy() -> Hierarchy:
    """Read where cgroup2 is mounted.

    Raises:
        Unavailable: It is not mounted.
    """
    hierarchy = parse_hierarchy(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    if hierarchy is None:
        raise Unavailable(
            "No cgroup2 hierarchy is mounted here.", hint="mount -t cgroup2 cgroup2 DIRECTORY"
        )
    return hierarchy


def read_own_cgroup() -> str:
    """Read the cgroup2 path of this process, "/" for the root.

    Source: cgroups(7), /proc/PID/cgroup.
    """
    for line in Path("/proc/self/cgroup").read_text(errors="surrogateescape").splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def name_of(pid: int) -> str:
    """Name the sandbox that process ``pid`` of this pid namespace guards."""
    return f"sdtool-sandbox-{pid}-{_read_start_ticks(pid)}-{_read_pid_namespace()}"


def _read_start_ticks(pid: int) -> int | None:
    """Read when a process started, in clock ticks since boot; None once it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


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
        timeout: Seconds to wait for the kernel, which cannot kill what sleeps uninterruptibly.

    Returns:
        Whether the cgroup is gone.
    """
    deadline = time.monotonic() + timeout
    while tree.exists() and time.monotonic() < deadline:
        _kill(tree)
        # Short rounds: without cgroup.kill a fork can slip through, and a process can join late.
        if _wait_empty(tree, timeout=0.1):
            remove(tree)
    return not tree.exists()


def _kill(tree: Path) -> None:
    try:
        write(tree / "cgroup.kill", "1")  # Linux 5.14
    except FileNotFoundError:
        for pid in _read_pids(tree):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _read_pids(tree: Path) -> Iterator[int]:
    """Read the processes of a cgroup and its descendants, visible ones of our pid namespace."""
    for directory, _, _ in os.walk(tree):
        with contextlib.suppress(OSError):
            pids = map(int, Path(directory, "cgroup.procs").read_text().split())
            yield from (pid for pid in pids if pid > 0)


def _wait_empty(tree: Path, *, timeout: float) -> bool:
    """Wait until no process is left in a cgroup, at most ``timeout`` seconds.

    The kernel flags a change of cgroup.events with POLLPRI.
    """
    try:
        events = (tree / "cgroup.events").open()
    except FileNotFoundError:
        return True
    with events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        deadline = time.monotonic() + timeout
        while "populated 1" in _reread(events.fileno()):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            poll.poll(remaining * 1000)
    return True


def _reread(fd: int) -> str:
    try:
        return os.pread(fd, 4096, 0).decode()
    except OSError:  # ENODEV: the cgroup was removed while it was open
        return ""


def remove(tree: Path) -> None:
    """Remove an empty cgroup and its descendants; a directory still in use stays."""
    for directory, _, _ in os.walk(tree, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def sweep(hierarchy: Hierarchy, *, timeout: float = 5.0) -> tuple[str, ...]:
    """Destroy the sandboxes whose guardian is dead, and return their names.

    Those of another pid namespace are left alone: whether their guardian lives is not known.
    """
    stale = [path for path in hierarchy.mount.glob("sdtool-sandbox-*") if _is_stale(path.name)]
    for path in stale:
        destroy(path, timeout=timeout)
    return tuple(path.name for path in stale)


def _is_stale(name: str) -> bool:
    match = _NAME.fullmatch(name)
    if match is None or int(match["pidns"]) != _read_pid_namespace():
        return False
    return _read_start_ticks(int(match["pid"])) != int(match["ticks"])
