"""doctor: what sdtool can see on this machine, facility by facility, and what it lacks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from functools import partial

from sdtool.analysis.tiers import tier_of
from sdtool.errors import SdtoolError
from sdtool.host.session import Session
from sdtool.model.facility import Facility
from sdtool.model.names import POLKIT, POLKIT_NAME
from sdtool.model.scope import Scope
from sdtool.sources import probes
from sdtool.sources.pidfds import probe_exit_info
from sdtool.sources.procevents import probe_procevents
from sdtool.sources.reach import probe_bus, probe_name
from sdtool.sources.tracepoints import probe_trace

Finding = tuple[bool, str]
"""Whether a facility is available, and what was found, or why it is not."""

KERNEL: tuple[tuple[str, Callable[[Session], Finding], str, str], ...] = (
    (
        "cgroups",
        lambda session: probes.probe_cgroups(session.mount),
        "the units of sockets and processes, a cgroup that empties during a stop",
        "the creators of sockets are unknown, and when a cgroup emptied",
    ),
    (
        "privileges",
        lambda _: probes.probe_privileges(),
        "holders of sockets, signalfd and sigwait users",
        "holders of other users' sockets are null; some dispositions are unknown",
    ),
    (
        "proc",
        lambda _: probes.probe_proc(),
        "the processes of every user",
        "other users' processes are counted, but nothing is said of them",
    ),
    (
        "pidfd",
        lambda _: probe_exit_info(),
        "exits with their wait status while a unit stops",
        "only main and control processes have an exit status, from systemd",
    ),
    (
        "sock_diag",
        lambda session: probes.probe_sock_diag(session.mount),
        "ports with the cgroup that created each",
        "the owner of a port is told by its holders alone",
    ),
    (
        "netns",
        lambda _: probes.probe_namespaces(),
        "the sockets of every network namespace: containers, PrivateNetwork=",
        "of others' network namespaces only what /proc/PID/net shows is seen, without owners",
    ),
    (
        "tracefs",
        lambda _: probe_trace(),
        "the kernel's own record of a stop: signals with their sender, births, ends",
        "signals of a stop are inferred, with the bounds of their time",
    ),
    (
        "procevents",
        lambda _: probe_procevents(),
        "births and ends during a stop, with the wait status of the shortest process too",
        "without tracefs, what is born and ends within milliseconds can go unseen",
    ),
    (
        "journal",
        lambda session: probes.probe_journal(session.scope),
        "whom systemd SIGKILLed, where a stop left that open",
        "where nobody saw how a process ended, nobody says it",
    ),
)
"""The facilities that need no manager: name, probe, what each gives, what its lack costs."""


async def read_facilities(session: Session) -> tuple[Facility, ...]:
    """Every facility with the truth about it; the manager and its bus first."""
    kernel = tuple(
        _facility(name, _find(partial(probe, session)), gives, costs)
        for name, probe, gives, costs in KERNEL
    )
    return (
        *await _probe_manager(session),
        await _probe_authorization(session),
        *kernel,
        _tell_tier({facility.facility for facility in kernel if facility.available}),
    )


def _tell_tier(available: Collection[str]) -> Facility:
    """How much of a stop can be observed here, by what is available."""
    tier = tier_of(
        sees_signals="tracefs" in available,
        sees_births="procevents" in available,
        sees_status="pidfd" in available,
    )
    gives = "how much of a stop is observed, from the kernel's own record (A) to D-Bus (D)"
    return _facility("tier", (True, f"{tier}: {tier.gives}"), gives, "")


def _find(probe: Callable[[], Finding]) -> Finding:
    """What a probe finds; what keeps it from finding out is a finding too."""
    try:
        return probe()
    except (SdtoolError, OSError) as error:
        return False, str(error)


def _facility(name: str, finding: Finding, gives: str, costs: str) -> Facility:
    available, reason = finding
    return Facility(
        facility=name,
        available=available,
        reason=reason,
        gives=gives,
        costs=None if available else costs,
    )


async def _probe_manager(session: Session) -> tuple[Facility, ...]:
    bus = "the way to the manager for every user"
    manager = "units, their states and properties; stops"
    # At the same time: each of the two may have to be given up.
    probing = asyncio.create_task(probe_bus(session.scope))
    try:
        info = (await session.manager()).info
    except SdtoolError as error:
        everything = "units cannot be asked about; ports and processes can"
        return (
            _facility("bus", await probing, bus, everything),
            _facility("manager", (False, _sentence(error)), manager, everything),
        )
    finding = await probing
    if info.transport == "bus":
        finding = True, f"over the bus, with {info.library}"
    through = "" if info.transport == "bus" else ", over its private socket"
    where = f"systemd {info.version}, the {info.scope} manager, units at {info.control_group}"
    return (
        _facility("bus", finding, bus, _cost_of_bus(session.scope)),
        _facility("manager", (True, where + through), manager, ""),
    )


async def _probe_authorization(session: Session) -> Facility:
    gives = "stops of units"
    if os.geteuid() == 0 or session.scope is Scope.USER:
        who = "root" if os.geteuid() == 0 else "its own user"
        return _facility("polkit", (True, f"not asked: the manager obeys {who}"), gives, "")
    try:
        (unit,) = await (await session.manager()).list_named([POLKIT])
    except SdtoolError as error:
        reason = _sentence(error)
        return _facility("polkit", (False, reason), gives, "no stop can be asked for")
    answers = await probe_name(session.scope, POLKIT_NAME)
    finding = probes.probe_polkit(unit, answers)
    return _facility("polkit", finding, gives, "every stop is refused unless polkit answers")


def _cost_of_bus(scope: Scope) -> str:
    who = "root" if scope is Scope.SYSTEM else f"uid {os.geteuid()}"
    return f"nothing for {who}: the manager's private socket is used instead"


def _sentence(error: SdtoolError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
