"""doctor: what sdtool can see on this machine, facility by facility."""

from __future__ import annotations

from collections.abc import Callable

from sdtool.errors import SdtoolError
from sdtool.host.session import Session
from sdtool.model.facility import Facility
from sdtool.sources import probes
from sdtool.sources.pidfds import probe_exit_info

Probe = Callable[[], tuple[bool, str]]


async def read_facilities(session: Session) -> tuple[Facility, ...]:
    """Every facility with the truth about it; the manager's bus first."""
    asked: tuple[tuple[str, Probe, str], ...] = (
        (
            "cgroups",
            lambda: probes.probe_cgroups(session.mount),
            "processes of units, socket owners",
        ),
        ("privileges", probes.probe_privileges, "holders of sockets, signalfd and sigwait users"),
        ("pidfd", probe_exit_info, "exits with their wait status while a unit stops"),
        ("sock_diag", probes.probe_sock_diag, "ports with the cgroup that created each"),
        ("tracefs", probes.probe_tracefs, "the kernel's own record of signals (not used yet)"),
        ("journal", probes.probe_journal, "past stops and failures (not used yet)"),
    )
    return (
        *await _probe_manager(session),
        *(_facility(name, probe, gives) for name, probe, gives in asked),
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
