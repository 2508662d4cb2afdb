"""doctor: what sdtool can see on this machine, facility by facility."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sdtool.errors import SdtoolError
from sdtool.host.session import Session
from sdtool.model.facility import Facility
from sdtool.sources import processes, sockets
from sdtool.sources.pidfds import probe_exit_info

Probe = Callable[[], tuple[bool, str]]


async def read_facilities(session: Session) -> tuple[Facility, ...]:
    """Every facility with the truth about it; the manager's bus first."""
    probes: tuple[tuple[str, Probe, str], ...] = (
        ("cgroups", lambda: _probe_cgroups(session), "processes of units, owners of sockets"),
        ("privileges", _probe_privileges, "holders of sockets, signalfd and sigwait users"),
        ("pidfd", probe_exit_info, "exits with their wait status while a unit stops"),
        ("sock_diag", _probe_sock_diag, "ports with the cgroup that created each"),
        ("tracefs", _probe_tracefs, "the kernel's own record of signals (not used yet)"),
        ("journal", _probe_journal, "past stops and failures (not used yet)"),
    )
    return (
        *await _probe_manager(session),
        *(_facility(name, probe, gives) for name, probe, gives in probes),
    )


def _facility(name: str, probe: Probe, gives: str) -> Facility:
    try:
        available, reason = probe()
    except (SdtoolError, OSError) as error:
        available, reason = False, str(error)
    return Facility(facility=name, available=available, reason=reason, gives=gives)


async def _probe_manager(session: Session) -> tuple[Facility, ...]:
    gives = "units, their states and properties; stops"
    try:
        info = (await session.manager()).info
    except SdtoolError as error:
        return (Facility(facility="bus", available=False, reason=_sentence(error), gives=gives),)
    over_bus = info.transport == "bus"
    how = "over the bus" if over_bus else f"over its private socket: {info.transport_reason}"
    return (
        Facility(
            facility="bus", available=True, reason=f"{how}, with {info.library}", gives=gives
        ),
        Facility(
            facility="manager",
            available=True,
            reason=f"systemd {info.version}, the {info.scope} manager, units at "
            f"{info.control_group}",
            gives="everything that is said about units",
        ),
    )


def _sentence(error: SdtoolError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def _probe_cgroups(session: Session) -> tuple[bool, str]:
    mount = session.mount
    if mount.version == 1:
        return True, f"v1 only, at {mount.path}: no ids, so owners by descriptors alone"
    return True, f"{'hybrid' if mount.hybrid else 'unified'}, cgroup2 at {mount.path}"


def _probe_privileges() -> tuple[bool, str]:
    uid = os.geteuid()
    if not processes.sees_all_descriptors():
        return False, f"uid {uid} may not see other users' descriptors: {processes.PTRACE_HINT}"
    return True, f"uid {uid} may see every process's descriptors"


def _probe_sock_diag() -> tuple[bool, str]:
    rows = sockets.read_listeners()
    if rows and all(row.cgroup_id is None for row in rows):
        return False, "the kernel names no cgroup ids (needs Linux 5.9 with cgroup2)"
    return True, f"{len(rows)} listening sockets in this network namespace, with cgroup ids"


def _probe_tracefs() -> tuple[bool, str]:
    path = Path("/sys/kernel/tracing/instances")
    if not path.is_dir():
        return False, "not mounted at /sys/kernel/tracing"
    if not os.access(path, os.W_OK):
        return False, "needs root"
    return True, f"at {path.parent}"


def _probe_journal() -> tuple[bool, str]:
    for directory in (Path("/var/log/journal"), Path("/run/log/journal")):
        if directory.is_dir():
            if os.access(directory, os.R_OK | os.X_OK):
                return True, f"at {directory}"
            return False, f"{directory} may not be read: needs root or group systemd-journal"
    return False, "there is no journal (no /var/log/journal, no /run/log/journal)"
