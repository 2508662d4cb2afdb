"""Values of the model with everything filled in that a test does not care about.

Times are microseconds after ``T0``, the moment a stop was requested; ``ms`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtool.analysis.membership import list_units, take_census
from sdtool.analysis.ownership import join, name_units_behind
from sdtool.analysis.timeline import build, infer_phase
from sdtool.host.eventlog import names_of
from sdtool.model.kernel import (
    SignalGenerated,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.process import (
    Disposition,
    ProcessFacts,
    ProcessId,
    ProcessRef,
    Role,
    SignalMasks,
)
from sdtool.model.scope import Scope
from sdtool.model.sockets import HolderScan, ManagersSockets, Socket, SocketFacts, SocketUnit
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ExitCode,
    ExitSignal,
    ExitStatus,
    ObserverState,
    SignalResult,
    StopPolicy,
    StopRecord,
    StopReport,
    Tier,
    WatchedProcess,
)
from sdtool.model.unit import ListedUnit, ManagerRoots, Unit, UnitDetails

DATA = Path(__file__).parent.parent / "data"

UNIT = "web.service"
GROUP = f"/system.slice/{UNIT}"
INIT = "/init.scope"
T0 = 1_000_000_000
LIMIT_US = 2_000_000

KILLED = ExitSignal(signal="SIGKILL", core=False)
TERMINATED = ExitSignal(signal="SIGTERM", core=False)
DONE = ExitCode(code=0)


def ms(milliseconds: float) -> int:
    """A moment so many milliseconds after the request."""
    return T0 + round(milliseconds * 1000)


def captured(name: str) -> bytes:
    """The bytes of a file below tests/data."""
    return (DATA / name).read_bytes()


def captured_json(name: str) -> Any:
    """A JSON document below tests/data."""
    return json.loads(captured(name))


# Processes -----------------------------------------------------------------------------------


def masks(**fields: Any) -> SignalMasks:
    """Masks of a process that does nothing about signals."""
    zero = {"caught": 0, "ignored": 0, "blocked": 0}
    return SignalMasks(
        **{
            **zero,
            "namespace_init": False,
            "traced": False,
            "signalfd": 0,
            "waiting": False,
            **fields,
        }
    )


def ticks_of(pid: int) -> int:
    """When a process of these tests has started."""
    return pid * 100


def facts(pid: int = 10, ppid: int = 1, **fields: Any) -> ProcessFacts:
    """A sleeping process of the unit."""
    values = {"comm": f"p{pid}", "state": "S", "control_group": GROUP, "argv": (f"p{pid}",)}
    identity = ProcessId(pid=pid, start_ticks=ticks_of(pid))
    return ProcessFacts(id=identity, ppid=ppid, **{**values, "masks": masks(), **fields})


def watched(pid: int, role: Role = Role.OTHER, seen_us: int | None = None) -> WatchedProcess:
    """A process that a stop watches."""
    return WatchedProcess(
        pid=pid,
        start_ticks=ticks_of(pid),
        comm=f"p{pid}",
        role=role,
        disposition=Disposition.DIES,
        disposition_reason="default action of SIGTERM",
        seen_us=seen_us,
    )


MAIN = watched(10, Role.MAIN)
CHILD = watched(11)


# The kernel's record -------------------------------------------------------------------------


def task_born(at_us: int, pid: int, maker: int, **fields: Any) -> TaskBorn:
    """A process was made by another one, in its cgroup."""
    values = {"comm": f"p{pid}", "is_thread": False, "is_elsewhere": False, **fields}
    return TaskBorn(**{"source": EventSource.TRACEFS, **values}, at_us=at_us, pid=pid, maker=maker)


def task_moved(at_us: int, pid: int, control_group: str = GROUP) -> TaskMoved:
    """A process was moved into the unit."""
    return TaskMoved(at_us=at_us, source=EventSource.TRACEFS, pid=pid, control_group=control_group)


def task_executed(at_us: int, pid: int, before: int | None = None, **fields: Any) -> TaskExecuted:
    """A process runs another program, by its first task or another one."""
    values = {"source": EventSource.TRACEFS, "path": "/bin/true", **fields}
    return TaskExecuted(at_us=at_us, pid=pid, before=pid if before is None else before, **values)


def task_ended(
    at_us: int,
    pid: int,
    status: ExitStatus | None = None,
    source: EventSource = EventSource.TRACEFS,
) -> TaskEnded:
    """A task ended; the trace does not say how."""
    return TaskEnded(at_us=at_us, source=source, pid=pid, status=status)


def signalled(at_us: int, pid: int, sender: int = 1, **fields: Any) -> SignalGenerated:
    """SIGTERM was sent to a task, and not ignored."""
    values = {"signal": "SIGTERM", "result": SignalResult.DELIVERED, "by_kernel": False}
    return SignalGenerated(
        **{"source": EventSource.TRACEFS, **values, **fields}, at_us=at_us, pid=pid, sender=sender
    )


# Units ---------------------------------------------------------------------------------------


def unit(name: str = UNIT, **fields: Any) -> Unit:
    """A unit that runs."""
    values = {"description": "Web", "load_state": "loaded", "active_state": "active"}
    return Unit(name=name, **{**values, "sub_state": "running", **fields})


def details(**fields: Any) -> UnitDetails:
    """The details of the unit, with pid 10 as its main process."""
    return UnitDetails(**{"unit": unit(main_pid=10, control_group=GROUP), **fields})


def policy(**fields: Any) -> StopPolicy:
    """The defaults of systemd, with a limit of two seconds."""
    values: dict[str, Any] = {
        "kill_mode": "control-group",
        "kill_signal": "SIGTERM",
        "restart_kill_signal": "SIGTERM",
        "final_kill_signal": "SIGKILL",
        "watchdog_signal": "SIGABRT",
        "send_sigkill": True,
        "send_sighup": False,
        "timeout_stop_us": LIMIT_US,
        "timeout_stop_failure_mode": "terminate",
        "timeout_abort_us": LIMIT_US,
        "exec_stop": 0,
        "exec_stop_post": 0,
    }
    return StopPolicy(**{**values, **fields})


# Sockets -------------------------------------------------------------------------------------


def row(**fields: Any) -> SocketFacts:
    """A TCP listener on 127.0.0.1:80 that cgroup 7 created."""
    values: dict[str, Any] = {
        "family": "inet",
        "protocol": "tcp",
        "type": "stream",
        "address": "127.0.0.1",
        "port": 80,
        "peer_address": None,
        "peer_port": None,
        "state": "LISTEN",
        "inode": 500,
        "uid": 0,
        "cookie": 1,
        "cgroup_id": 7,
        "v6only": None,
        "expires_us": None,
        "netns": 1,
    }
    return SocketFacts(**{**values, **fields})


def socket(**fields: Any) -> Socket:
    """The listener of ``row`` before anybody looked for its owners."""
    values: dict[str, Any] = {
        "family": "inet",
        "protocol": "tcp",
        "type": "stream",
        "address": "127.0.0.1",
        "port": 80,
        "path": None,
        "state": "LISTEN",
        "inode": 500,
        "uid": 0,
        "v6only": None,
        "netns": 1,
        "netns_name": None,
        "elsewhere": False,
        "peer": None,
        "expires_us": None,
        "creator": None,
        "creator_reason": None,
        "holders": None,
        "holders_complete": False,
        "holders_reason": None,
        "socket_unit": None,
    }
    return Socket(**{**values, **fields})


CGROUPS = {1: "/", 7: GROUP, 8: INIT, 9: "/system.slice/web.socket"}


def joined(facts: SocketFacts, look: HolderScan | None = None) -> Socket:
    """One socket of a system manager with its owners."""
    (found,) = join([facts], CGROUPS, look, ManagerRoots())
    return found


def scan(*holders: tuple[int, int, str | None], **fields: Any) -> HolderScan:
    """A complete look that found (inode, pid, cgroup)."""
    found = tuple(
        (inode, ProcessRef(pid=pid, comm=f"p{pid}"), path) for inode, pid, path in holders
    )
    return HolderScan(**{"by_inode": found, "complete": True, **fields})


# Stops ---------------------------------------------------------------------------------------


def event(at_us: int, kind: EventKind, **fields: Any) -> Event:
    """An observed event of the unit; a pid is that of ``facts`` and ``watched``."""
    values: dict[str, Any] = {"unit": UNIT, "at_us": at_us, "source": EventSource.DBUS}
    if "pid" in fields:
        values["start_ticks"] = ticks_of(fields["pid"])
    return Event(kind=kind, **{**values, **fields})


def phase(at_us: int, sub_state: str, **fields: Any) -> Event:
    """The manager entered a phase of the stop that has a limit."""
    values = {"active_state": "deactivating", "limit_us": LIMIT_US, "then": "SIGKILL"}
    return event(at_us, EventKind.STATE, sub_state=sub_state, **{**values, **fields})


def dead(at_us: int) -> Event:
    """The unit became inactive."""
    return event(at_us, EventKind.STATE, sub_state="dead", active_state="inactive")


def failed(at_us: int) -> Event:
    """The unit became failed."""
    return event(at_us, EventKind.STATE, sub_state="failed", active_state="failed")


def gone(at_us: int, process: WatchedProcess, status: ExitStatus | None = DONE) -> Event:
    """A process of the unit ended."""
    return _process_event(at_us, EventKind.PROCESS_EXIT, process, status)


def reaped(at_us: int, process: WatchedProcess, status: ExitStatus | None) -> Event:
    """The wait status of a process that had ended before became readable."""
    return _process_event(at_us, EventKind.PROCESS_REAPED, process, status)


def _process_event(
    at_us: int, kind: EventKind, process: WatchedProcess, status: ExitStatus | None
) -> Event:
    return event(
        at_us,
        kind,
        source=EventSource.PIDFD,
        **names_of(process),
        exit=status,
    )


def record(**fields: Any) -> StopRecord:
    """The record of a stop that took a second, without processes and events."""
    values: dict[str, Any] = {
        "unit": UNIT,
        "policy": policy(),
        "observers": (ObserverState(name="dbus", available=True, reason="bus"),),
        "tier": Tier.C,
        "requested_us": T0,
        "ended_us": ms(1000),
        "events": (),
        "processes": (),
        "survivors": (),
        "job_result": "done",
        "result": "success",
        "active_state": "inactive",
        "released": (),
        "held": (),
        "also_stopped": (),
        "reactivated_by": (),
    }
    return StopRecord(**{**values, **fields})


def stopped(
    processes: Sequence[WatchedProcess],
    events: Iterable[Event],
    kill: StopPolicy | None = None,
    **fields: Any,
) -> StopReport:
    """The report of a stop in which these events were seen; the host concludes the others so."""
    kill = kill or policy()
    told = list(events)
    for state in [e for e in told if e.kind is EventKind.STATE]:
        told += infer_phase(kill, state, processes, tuple(told), T0)
    return build(record(policy=kill, events=tuple(told), processes=tuple(processes), **fields))


def sent(report: StopReport) -> list[tuple[int | None, str | None]]:
    """(pid, signal) of every signal in a report, in its order."""
    return [(e.pid, e.signal) for e in report.events if e.kind is EventKind.SIGNAL_SENT]


def list_joined(
    units: Iterable[Unit],
    members: Mapping[str, Sequence[int]],
    cgroups: Mapping[int, str],
    listeners: Iterable[SocketFacts],
    socket_units: Sequence[SocketUnit],
    roots: ManagerRoots,
) -> tuple[ListedUnit, ...]:
    """``list_units`` with the listeners joined first, as the host does it."""
    scope = Scope.USER if roots.user else Scope.SYSTEM
    behind = ManagersSockets(manager=scope, units=tuple(socket_units))
    joined = name_units_behind(join(listeners, cgroups, None, roots), behind)
    census = take_census(cgroups.values(), members, joined, roots)
    return list_units(units, census, scope)
