"""What this machine lets us see: each probe says whether, and what it found or why not."""

from __future__ import annotations

import os
import shutil

from sdtool.errors import Unavailable
from sdtool.model.scope import Scope
from sdtool.model.sockets import SocketFilter, SocketStates
from sdtool.model.unit import Unit
from sdtool.sources import descriptors, namespaces, processes, sockets
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.journal import require_journal


def probe_privileges() -> tuple[bool, str]:
    """Whether other users' descriptors can be seen."""
    uid = os.geteuid()
    if processes.hides_processes():
        return False, f"uid {uid} may not see other users' processes: {processes.HIDDEN}"
    if not descriptors.sees_all_descriptors():
        return False, f"uid {uid} may not see other users' descriptors: {processes.PTRACE_HINT}"
    return True, f"uid {uid} may see every process's descriptors"


def probe_polkit(unit: Unit, answers: bool | None) -> tuple[bool, str]:
    """Whether polkit can be asked to allow a stop.

    Args:
        unit: polkit.service; it runs only while somebody needs it.
        answers: Whether it has answered on the bus; None when it is not there.
    """
    if unit.load_state != "loaded" and unit.active_state != "active":
        return False, f"{unit.name} is {unit.load_state}: only root may stop units"
    if answers is None and unit.active_state == "failed":
        return False, (
            f"{unit.name} is failed, and each stop tries to start it again: "
            f"systemctl status {unit.name} may say what is wrong"
        )
    if answers is False:
        return False, f"{unit.name} is {unit.active_state} and does not answer"
    if shutil.which("pkttyagent") is None:
        return True, "asked for every stop; without pkttyagent not for a password on a terminal"
    return True, "asked for every stop; for a password on a terminal, where its rules want one"


def probe_proc() -> tuple[bool, str]:
    """Whether /proc shows the processes of other users."""
    if processes.hides_processes():
        return False, "/proc hides other users' processes (hidepid=, or ProtectProc= of our unit)"
    return True, "/proc shows the processes of every user"


def probe_cgroups(mount: CgroupMount) -> tuple[bool, str]:
    """Which hierarchy there is."""
    if mount.version == 1:
        return False, f"cgroup v1 only: systemd's own hierarchy is at {mount.path}"
    return True, f"{'hybrid' if mount.hybrid else 'unified'}, at {mount.path}"


def probe_sock_diag(mount: CgroupMount) -> tuple[bool, str]:
    """Whether sockets come with the id of the cgroup that created them."""
    rows = sockets.read_sockets(SocketFilter(states=SocketStates.LISTENING))
    if mount.version == 1:
        return False, "cgroup ids name no unit on cgroup v1"
    if rows and all(row.cgroup_id is None for row in rows):
        return False, "the kernel names no cgroup ids (needs Linux 5.9 with cgroup2)"
    many = "1 listening socket" if len(rows) == 1 else f"{len(rows)} listening sockets"
    return True, f"{many} in this network namespace, with cgroup ids"


def probe_namespaces() -> tuple[bool, str]:
    """Whether the sockets of every network namespace can be seen."""
    census = namespaces.read_namespaces()
    looks = namespaces.look_into(census.namespaces, lambda: True)
    closed = sum(1 for _, entered in looks if entered is not True)
    if census.reason:
        return False, census.reason
    if closed:
        many = "1 is" if closed == 1 else f"{closed} are"
        return False, f"{len(looks)} were found, and {many} closed to us: {namespaces.ENTER_HINT}"
    return True, "1, our own" if len(looks) == 1 else f"{len(looks)}, and all can be entered"


def probe_journal(scope: Scope) -> tuple[bool, str]:
    """Whether what the manager writes may be read."""
    try:
        place = require_journal(scope, os.geteuid())
    except Unavailable as error:
        return False, f"{str(error).rstrip('.')}: {error.hint}" if error.hint else str(error)
    return True, f"at {place}"
