"""The cgroup tree: where units live, who is in them, and when one empties.

The truth is the cgroup2 hierarchy (on a hybrid host the one at .../unified, a process's ``0::``
line); on a host with cgroup v1 only it is systemd's own ``name=systemd`` hierarchy. A cgroup's
id is the inode of its directory (kernfs, 64-bit kernels).

Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdtool.errors import Unavailable
from sdtool.model.stop import Event, EventKind, EventSource
from sdtool.sources.mounts import parse_mounts

NAMED = "name=systemd"
"""What marks systemd's own hierarchy among those of cgroup v1."""

USUAL_MOUNTS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """The hierarchy that systemd keeps its units in.

    Attributes:
        path: Where it is mounted.
        version: 2, or 1 for the name=systemd hierarchy.
        hybrid: Version 2 beside version 1 controllers.
    """

    path: Path
    version: int
    hybrid: bool

    def directory(self, control_group: str) -> Path:
        """The directory of a cgroup path such as /system.slice/x.service."""
        return self.path / control_group.lstrip("/")


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """One sweep through the hierarchy below a cgroup.

    Attributes:
        paths: Every cgroup, parents first.
        ids: Cgroup id -> path; None on cgroup v1, whose inodes sock_diag does not mean.
        members: Path -> pids, for the cgroups that have any.
    """

    paths: tuple[str, ...]
    ids: Mapping[int, str] | None
    members: Mapping[str, tuple[int, ...]]


def read_mount() -> CgroupMount:
    """Find the hierarchy of this mount namespace.

    Raises:
        Unavailable: No cgroup hierarchy that systemd could use is mounted.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        mount = parse_mountinfo(os.fsdecode(file.read()))
    if mount is None:
        raise Unavailable(
            "No cgroup hierarchy of systemd's is mounted.",
            hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )
    return mount


def parse_mountinfo(text: str) -> CgroupMount | None:
    """The hierarchy that systemd uses among the lines of /proc/PID/mountinfo (proc(5))."""
    unified: list[str] = []
    parts: list[str] = []
    named = parse_named_mount(text)
    v1 = False
    for mount in parse_mounts(text):
        v1 = v1 or mount.kind == "cgroup"
        # "/.." is from outside our cgroup namespace
        if mount.kind == "cgroup2" and not mount.root.startswith("/.."):
            (unified if mount.root == "/" else parts).append(mount.path)
    if unified or parts:
        # The place that systemd itself uses comes before any other that shows the whole; a part
        # of the hierarchy counts only where the whole is not mounted (a container's own cgroup).
        usual = [path for path in USUAL_MOUNTS if path in unified]
        return CgroupMount(Path((usual or unified or parts)[-1]), 2, v1)
    return CgroupMount(named, 1, False) if named else None


def read_named_mount() -> Path | None:
    """Where systemd's own cgroup v1 hierarchy is mounted, also beside cgroup2; None if nowhere."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_named_mount(os.fsdecode(file.read()))


def parse_named_mount(text: str) -> Path | None:
    """The mount of the hierarchy name=systemd, the last if there are several."""
    named = [m.path for m in parse_mounts(text) if m.kind == "cgroup" and NAMED in m.options]
    return Path(named[-1]) if named else None


def read_tree(mount: CgroupMount, control_group: str = "/") -> CgroupTree:
    """Walk a cgroup and everything below it, once; cgroups that go away meanwhile are skipped."""
    ids: dict[int, str] = {}
    members: dict[str, tuple[int, ...]] = {}
    top = mount.directory(control_group)
    prefix_length = len(str(mount.path).rstrip("/"))
    for directory, inode in _walk(str(top)):
        path = directory[prefix_length:] or "/"
        ids[inode] = path
        pids = read_procs(directory)
        if pids:
            members[path] = pids
    return CgroupTree(tuple(ids.values()), ids if mount.version == 2 else None, members)


def read_ids(mount: CgroupMount) -> Mapping[int, str] | None:
    """Cgroup id -> path for the whole hierarchy; None on cgroup v1, where ids say nothing."""
    if mount.version == 1:
        return None
    prefix_length = len(str(mount.path).rstrip("/"))
    return {inode: path[prefix_length:] or "/" for path, inode in _walk(str(mount.path))}


def _walk(top: str) -> Iterator[tuple[str, int]]:
    """Every cgroup directory from ``top`` down, with its inode, parents first."""
    with contextlib.suppress(OSError):
        yield top, os.stat(top).st_ino
    stack = [top]
    while stack:
        directory = stack.pop()
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                # inode() comes with the directory entry: no stat for each.
                if entry.is_dir(follow_symlinks=False):
                    yield entry.path, entry.inode()
                    stack.append(entry.path)


def read_procs(directory: str) -> tuple[int, ...]:
    """The pids in cgroup.procs, without the 0 that stands for a pid outside our namespace.

    A cgroup that is gone has none; a threaded one refuses to list processes: its threads are
    listed in the domain above it.
    """
    try:
        with open(f"{directory}/cgroup.procs", "rb") as file:
            return tuple(int(pid) for pid in file.read().split() if pid != b"0")
    except OSError:
        return ()


def read_pids(mount: CgroupMount, control_group: str) -> frozenset[int]:
    """All processes of a cgroup and its sub-cgroups; none when it is gone."""
    members = read_tree(mount, control_group).members
    return frozenset(pid for pids in members.values() for pid in pids)


def exists(mount: CgroupMount, control_group: str) -> bool:
    """Whether the cgroup is there."""
    return mount.directory(control_group).is_dir()


def read_frozen(mount: CgroupMount, control_groups: Iterable[str | None]) -> frozenset[str]:
    """Those of some cgroups whose processes are all frozen; one that is gone is not."""
    return frozenset(path for path in set(control_groups) if path and _is_frozen(mount, path))


def _is_frozen(mount: CgroupMount, control_group: str) -> bool:
    try:
        data = mount.directory(control_group).joinpath("cgroup.events").read_bytes()
    except OSError:
        return False
    return parse_frozen(data)


def read_process_cgroup(pid: int | str) -> str | None:
    """The path of a process's cgroup, None when it is gone or outside our cgroup namespace."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            return parse_process_cgroup(file.read())
    except OSError:
        return None


def parse_process_cgroup(data: bytes) -> str | None:
    """The ``0::`` line of /proc/PID/cgroup, or systemd's own hierarchy where that is in use.

    With cgroup v1 only the unified line is missing, or it is "/" for all: nobody moves a process
    there. Where both are in use systemd keeps the same path in both.
    """
    unified = named = None
    for line in data.decode(errors="surrogateescape").split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = path.removesuffix(" (deleted)")
        if hierarchy == "0":
            unified = path
        elif controllers == NAMED:
            named = path
    found = named if unified in (None, "/") and named else unified
    return None if found is None or f"{found}/".startswith("/../") else found


def read_manager_root() -> str:
    """The root of the system manager's units: PID 1's cgroup without /init.scope.

    This is systemd's own rule (cg_get_root_path); "/" unless we share a container's view.
    """
    path = read_process_cgroup(1) or "/"
    return path.removesuffix("/init.scope") or "/"


class CgroupObserver:
    """Watches cgroup.events of one unit: populated, empty, removed.

    "Empty" is not "stopped": ExecStopPost= populates the cgroup again. On cgroup v1 there is no
    such file, and ``available`` is False.
    """

    name = "cgroup"

    def __init__(self, unit: str, mount: CgroupMount, control_group: str) -> None:
        self._unit = unit
        self._epoll = select.epoll()
        self._file = -1
        self._populated: bool | None = None
        self.lost = 0
        try:
            path = mount.directory(control_group) / "cgroup.events"
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._populated = parse_populated(os.pread(self._file, 4096, 0))
            self._epoll.register(self._file, select.EPOLLPRI)
            self.available, self.reason = True, "populated and removed, by poll"
        except OSError as error:
            self.available = False
            self.reason = f"no cgroup.events for {control_group}: {os.strerror(error.errno or 0)}"

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._epoll.fileno()

    def read_events(self) -> tuple[Event, ...]:
        """What has changed since the last call."""
        if self._file < 0 or not self._epoll.poll(0):
            return ()
        now = time.monotonic_ns() // 1000
        try:
            populated = parse_populated(os.pread(self._file, 4096, 0))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            self._release()
            return (self._event(EventKind.CGROUP_REMOVED, now),)
        if populated == self._populated:
            return ()
        self._populated = populated
        kind = EventKind.CGROUP_POPULATED if populated else EventKind.CGROUP_EMPTY
        return (self._event(kind, now),)

    def _event(self, kind: EventKind, at_us: int) -> Event:
        return Event(unit=self._unit, at_us=at_us, kind=kind, source=EventSource.CGROUP)

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        """Stop watching."""
        self._release()
        self._epoll.close()


def parse_populated(data: bytes) -> bool:
    """The ``populated`` line of cgroup.events."""
    return b"populated 1" in data.splitlines()


def parse_frozen(data: bytes) -> bool:
    """The ``frozen`` line of cgroup.events (since Linux 5.2)."""
    return b"frozen 1" in data.splitlines()
