"""What systemd's D-Bus messages say: replies, signals and errors to model, without any I/O.

Source: org.freedesktop.systemd1(5). Asking for them is ``sources.systemd``'s business.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from sdtool.errors import (
    AccessDenied,
    BadUnitSetting,
    BusError,
    InvalidArgument,
    NoSuchProcess,
    NoSuchUnit,
    NotApplicable,
    NotConfigured,
    Refusal,
    SdtoolError,
    Unavailable,
    UnitMasked,
)
from sdtool.model.manager import (
    JobChange,
    MainExit,
    ManagerOwner,
    ManagerReloading,
    ManagerSignal,
    UnitChange,
)
from sdtool.model.names import MANAGE_UNITS
from sdtool.model.process import signal_name
from sdtool.model.sockets import ListenAddress
from sdtool.model.stop import (
    INFINITY,
    ExitCode,
    ExitSignal,
    ExitStatus,
    Limit,
    StopCommand,
    StopPolicy,
)
from sdtool.model.unit import Unit, UnitDetails
from sdtool.sources.bus import BROKER, BusSignal

MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
PROPERTIES = "org.freedesktop.DBus.Properties"
AUTHORIZATION_REQUIRED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
ONLY_BY_DEPENDENCY = "org.freedesktop.systemd1.OnlyByDependency"
ALREADY_SUBSCRIBED = "org.freedesktop.systemd1.AlreadySubscribed"

UINT64_MAX = 2**64 - 1

ERRORS: Mapping[str, type[SdtoolError]] = {
    "org.freedesktop.DBus.Error.AccessDenied": AccessDenied,
    "org.freedesktop.DBus.Error.AuthFailed": AccessDenied,
    AUTHORIZATION_REQUIRED: AccessDenied,
    "org.freedesktop.DBus.Error.Disconnected": Unavailable,
    "org.freedesktop.DBus.Error.IOError": Unavailable,
    "org.freedesktop.DBus.Error.LimitsExceeded": Unavailable,
    "org.freedesktop.DBus.Error.NameHasNoOwner": Unavailable,
    "org.freedesktop.DBus.Error.NoMemory": Unavailable,
    "org.freedesktop.DBus.Error.NoNetwork": Unavailable,
    "org.freedesktop.DBus.Error.NoReply": Unavailable,
    "org.freedesktop.DBus.Error.NoServer": Unavailable,
    "org.freedesktop.DBus.Error.ServiceUnknown": Unavailable,
    "org.freedesktop.DBus.Error.TimedOut": Unavailable,
    "org.freedesktop.DBus.Error.Timeout": Unavailable,
    "org.freedesktop.DBus.Error.InvalidArgs": InvalidArgument,
    "org.freedesktop.DBus.Error.NotSupported": NotApplicable,
    "org.freedesktop.DBus.Error.UnknownInterface": NotApplicable,
    "org.freedesktop.DBus.Error.UnknownMethod": NotApplicable,
    "org.freedesktop.DBus.Error.UnknownProperty": NotApplicable,
    "org.freedesktop.DBus.Error.UnknownObject": NoSuchUnit,
    "org.freedesktop.DBus.Error.UnixProcessIdUnknown": NoSuchProcess,
    "org.freedesktop.systemd1.BadUnitSetting": BadUnitSetting,
    "org.freedesktop.systemd1.LoadFailed": NotConfigured,
    "org.freedesktop.systemd1.UnitMasked": UnitMasked,
    "org.freedesktop.systemd1.NoSuchUnit": NoSuchUnit,
    "org.freedesktop.systemd1.NoUnitForInvocationID": NoSuchUnit,
    "org.freedesktop.systemd1.NoUnitForPID": NoSuchUnit,
    "org.freedesktop.systemd1.NoSuchProcess": NoSuchProcess,
    "org.freedesktop.systemd1.NoSuchJob": NotApplicable,
    ONLY_BY_DEPENDENCY: AccessDenied,
    "org.freedesktop.systemd1.FrozenUnit": NotApplicable,
    "org.freedesktop.systemd1.JobTypeNotApplicable": NotApplicable,
    "org.freedesktop.systemd1.NoIsolation": NotApplicable,
    "org.freedesktop.systemd1.NothingToKill": NotApplicable,
    "org.freedesktop.systemd1.ScopeNotRunning": NotApplicable,
    "org.freedesktop.systemd1.TransactionIsDestructive": NotApplicable,
    "org.freedesktop.systemd1.TransactionJobsConflicting": NotApplicable,
    "org.freedesktop.systemd1.TransactionOrderIsCyclic": NotApplicable,
    "org.freedesktop.systemd1.UnitBusy": NotApplicable,
    "org.freedesktop.systemd1.UnitInactive": NotApplicable,
    "org.freedesktop.systemd1.ShuttingDown": Unavailable,
}
"""Every D-Bus error name that the calls made here can bring; another one is a ``BusError``."""


STOP_SETTINGS = ("ExecStopPre", "ExecStop", "ExecStopPost")

REFUSALS: Mapping[str, Refusal] = {
    AUTHORIZATION_REQUIRED: Refusal.NEEDS_PERSON,
    ONLY_BY_DEPENDENCY: Refusal.ONLY_BY_DEPENDENCY,
}
"""What a denial says by its name; the others say no more than that."""


def translate_error(name: str, text: str, subject: str | None) -> SdtoolError:
    """The error of ours for a D-Bus error, chosen by its name alone."""
    sentence = text if text.endswith(".") else f"{text or name}."
    if subject and subject not in sentence:
        sentence = f"{subject}: {sentence}"
    kind = ERRORS.get(name)
    if kind is AccessDenied:
        reason = REFUSALS.get(name, Refusal.DENIED)
        return AccessDenied(sentence, subject=subject, hint=_hint(reason), reason=reason)
    if kind is None:
        return BusError(f"{sentence[:-1]} ({name}).", name=name, subject=subject)
    return kind(sentence, subject=subject)


def _hint(reason: Refusal) -> str:
    if reason is Refusal.ONLY_BY_DEPENDENCY:
        return "its RefuseManualStop= or RefuseManualStart= allows it as a dependency only"
    return f"run as root, or have polkit allow {MANAGE_UNITS} to this user"


ABSENT = frozenset(
    f"org.freedesktop.DBus.Error.{word}"
    for word in ("Disconnected", "NameHasNoOwner", "NoReply", "ServiceUnknown", "TimedOut")
)
"""The broker's words for a manager that is not there just now: it executes itself anew, say."""


def parse_unit_row(row: Sequence[Any]) -> Unit:
    """One row of ListUnits, ``(ssssssouso)``; a list or a tuple, depending on the library."""
    name, description, load_state, active_state, sub_state, following, _, _, job, _ = row
    return Unit(
        name=name,
        description=description,
        load_state=load_state,
        active_state=active_state,
        sub_state=sub_state,
        job=job or None,
        following=following or None,
    )


def parse_details(unit: Unit, properties: Mapping[str, Any]) -> UnitDetails:
    """All properties of a unit, of all its interfaces, as GetAll("") gives them."""
    get = properties.get
    return UnitDetails(
        unit=Unit(
            name=get("Id") or unit.name,
            description=get("Description") or unit.description,
            load_state=get("LoadState") or unit.load_state,
            active_state=get("ActiveState") or unit.active_state,
            sub_state=get("SubState") or unit.sub_state,
            unit_file_state=get("UnitFileState") or None,
            main_pid=get("MainPID") or None,
            control_group=get("ControlGroup") or None,
            result=get("Result") or None,
            n_restarts=get("NRestarts"),
            fragment_path=get("FragmentPath") or None,
            invocation_id=bytes(get("InvocationID") or b"").hex() or None,
            job=unit.job,
            following=get("Following") or None,
        ),
        policy=parse_policy(properties),
        can_stop=get("CanStop", True) or get("RefuseManualStop", False),
        control_pid=get("ControlPID") or None,
        job_path=parse_job(get("Job")),
        collect_mode=get("CollectMode") or None,
        triggered_by=tuple(get("TriggeredBy") or ()),
        stored_descriptors=get("NFileDescriptorStore") or 0,
        stops_along=_join(properties, "RequiredBy", "BoundBy", "ConsistsOf"),
        stop_commands=tuple(
            parse_command(setting, row) for setting in STOP_SETTINGS for row in get(setting) or ()
        ),
    )


def parse_command(setting: str, row: Sequence[Any]) -> StopCommand:
    """One entry of ExecStop and its like, ``(sasbttttuii)``."""
    _, argv, _, _, started_us, _, ended_us, pid, code, status = row
    return StopCommand(
        setting=setting,
        argv=tuple(argv),
        pid=pid or None,
        started_us=started_us or None,
        ended_us=ended_us or None,
        exit=parse_exit(code, status) if pid and ended_us else None,
    )


def parse_job(job: Sequence[Any] | None) -> str | None:
    """The Job property, ``(uo)``: the path of the job that is queued; its id is 0 for none."""
    return job[1] if job and job[0] else None


def parse_listens(rows: Sequence[Sequence[Any]]) -> tuple[ListenAddress, ...]:
    """The Listen property of a .socket unit, ``a(ss)``."""
    return tuple(ListenAddress(type=row[0], address=row[1]) for row in rows)


def parse_fd_store(rows: Sequence[Sequence[Any]]) -> frozenset[int]:
    """The sockets in what DumpUnitFileDescriptorStore answers, ``a(suuutuusu)``, by inode."""
    return frozenset(row[4] for row in rows if stat.S_ISSOCK(row[1]))


def _join(properties: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(unit for name in names for unit in properties.get(name) or ()))


def parse_policy(properties: Mapping[str, Any]) -> StopPolicy | None:
    """The kill context and time limits; None for a unit type that has none."""
    if "KillMode" not in properties:
        return None
    get = properties.get
    # Services and scopes call it TimeoutStopUSec, sockets, mounts and swaps TimeoutUSec.
    timeout = parse_limit(get("TimeoutStopUSec", get("TimeoutUSec", UINT64_MAX)))
    kill_signal = get("KillSignal", 15)
    return StopPolicy(
        kill_mode=get("KillMode", ""),
        kill_signal=signal_name(kill_signal),
        restart_kill_signal=signal_name(get("RestartKillSignal") or kill_signal),
        final_kill_signal=signal_name(get("FinalKillSignal") or 9),
        watchdog_signal=signal_name(get("WatchdogSignal") or 6),
        send_sigkill=get("SendSIGKILL", True),
        send_sighup=get("SendSIGHUP", False),
        timeout_stop_us=timeout,
        timeout_stop_failure_mode=get("TimeoutStopFailureMode", "terminate"),
        timeout_abort_us=parse_limit(get("TimeoutAbortUSec", 0)) if get("TimeoutAbortUSec")
        else timeout,
        exec_stop=len(get("ExecStop", get("ExecStopPre", ()))),
        exec_stop_post=len(get("ExecStopPost", ())),
    )  # fmt: skip


def parse_limit(value: int) -> Limit:
    """A timeout in microseconds; 0 and 2^64-1 both mean that there is none."""
    return INFINITY if value in (0, UINT64_MAX) else value


def parse_signal(signal: BusSignal) -> ManagerSignal | None:
    """A signal of the manager or of a unit; None when it says nothing that is asked here."""
    if signal.interface == PROPERTIES and signal.member == "PropertiesChanged":
        return parse_properties_changed(signal.path, signal.body[1])
    if signal.interface == BROKER and signal.member == "NameOwnerChanged":
        return ManagerOwner(present=bool(signal.body[2]))
    if signal.interface != MANAGER:
        return None
    if signal.member == "JobNew":
        return JobChange(job=signal.body[1], unit=signal.body[2], result=None)
    if signal.member == "JobRemoved":
        return JobChange(job=signal.body[1], unit=signal.body[2], result=signal.body[3])
    if signal.member == "Reloading":
        return ManagerReloading(active=signal.body[0])
    return None


def parse_properties_changed(path: str, changed: Mapping[str, Any]) -> UnitChange:
    """PropertiesChanged of a unit: the Service part comes just before the Unit part."""
    get = changed.get
    return UnitChange(
        unit_path=path,
        active_state=get("ActiveState"),
        sub_state=get("SubState"),
        changed_us=get("StateChangeTimestampMonotonic"),
        result=get("Result"),
        control_pid=get("ControlPID"),
        main_exit=parse_main_exit(changed),
    )


def parse_main_exit(properties: Mapping[str, Any]) -> MainExit | None:
    """The ExecMain* properties of a service; None while its main process runs."""
    at_us = properties.get("ExecMainExitTimestampMonotonic")
    if not at_us:
        return None
    ended = parse_exit(properties["ExecMainCode"], properties["ExecMainStatus"])
    return MainExit(pid=properties["ExecMainPID"], at_us=at_us, exit=ended)


def parse_exit(code: int, status: int) -> ExitStatus:
    """How a process ended, as waitid(2) tells it: CLD_EXITED, CLD_KILLED, CLD_DUMPED."""
    if code == os.CLD_EXITED:
        return ExitCode(code=status)
    return ExitSignal(signal=signal_name(status), core=code == os.CLD_DUMPED)
