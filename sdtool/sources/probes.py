"""What this machine lets us see: each probe says whether, and what it found or why not."""

from __future__ import annotations

import os
from pathlib import Path

from sdtool.sources import processes, sockets
from sdtool.sources.cgroups import CgroupMount


def probe_privileges() -> tuple[bool, str]:
    """Whether other users' descriptors can be seen."""
    uid = os.geteuid()
    if processes.hides_processes():
        return False, f"uid {uid} may not see other users' processes: {processes.HIDDEN}"
    if not processes.sees_all_descriptors():
        return False, f"uid {uid} may not see other users' descriptors: {processes.PTRACE_HINT}"
    return True, f"uid {uid} may see every process's descriptors"


def probe_cgroups(mount: CgroupMount) -> tuple[bool, str]:
    """Which hierarchy there is."""
    if mount.version == 1:
        return True, f"v1 only, at {mount.path}: no ids, so owners by descriptors alone"
    return True, f"{'hybrid' if mount.hybrid else 'unified'}, cgroup2 at {mount.path}"


def probe_sock_diag() -> tuple[bool, str]:
    """Whether sockets come with the id of the cgroup that created them."""
    rows = sockets.read_listeners()
    if rows and all(row.cgroup_id is None for row in rows):
        return False, "the kernel names no cgroup ids (needs Linux 5.9 with cgroup2)"
    return True, f"{len(rows)} listening sockets in this network namespace, with cgroup ids"


def probe_tracefs() -> tuple[bool, str]:
    """Whether the kernel's own trace could be used."""
    path = Path("/sys/kernel/tracing/instances")
    if not os.path.ismount(path.parent):
        return False, "not mounted at /sys/kernel/tracing"
    if not os.access(path, os.W_OK):
        return False, "needs root"
    return True, f"at {path.parent}"


def probe_journal() -> tuple[bool, str]:
    """Whether there is a journal that may be read."""
    for directory in (Path("/var/log/journal"), Path("/run/log/journal")):
        # The directory is everybody's; what is in it may not be.
        found = [directory, *directory.glob("*"), *directory.glob("*/system.journal")]
        if not all(os.access(path, os.R_OK) for path in found if path.exists()):
            return False, f"{directory} may not be read: needs root or group systemd-journal"
        if len(found) > 1:
            return True, f"at {directory}"
    return False, "there is no journal (no /var/log/journal, no /run/log/journal)"
