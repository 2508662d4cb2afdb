"""The one module that speaks systemd's D-Bus API: its interfaces, members and signatures.

Source: org.freedesktop.systemd1(5). A ``Manager`` is a connection to one manager, the system's
or the user's, over the bus or over the manager's own private socket. It reads, asks for jobs and
hands on signals; it draws no conclusion.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sdtool.errors import (
    AccessDenied,
    BadUnitSetting,
    BusError,
    InvalidArgument,
    NoSuchProcess,
    NoSuchUnit,
    NotApplicable,
    NotBooted,
    NotConfigured,
    SdtoolError,
    Unavailable,
    UnitMasked,
)
from sdtool.model.manager import (
    ConnectionLost,
    JobChange,
    MainExit,
    ManagerInfo,
    ManagerReloading,
    ManagerSignal,
    UnitChange,
)
from sdtool.model.names import unit_name_of_path, unit_path
from sdtool.model.process import signal_name
from sdtool.model.scope import Scope
from sdtool.model.sockets import ListenAddress, SocketUnit
from sdtool.model.stop import (
    INFINITY,
    ExitCode,
    ExitSignal,
    ExitStatus,
    Limit,
    StopPolicy,
)
from sdtool.model.unit import Unit, UnitDetails
from sdtool.sources.bus import (
    BROKER,
    SYSTEMD,
    BusSignal,
    Connection,
    NoAnswer,
    RemoteError,
    unwrap,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0

MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
PROPERTIES = "org.freedesktop.DBus.Properties"
AUTHORIZATION_REQUIRED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
ONLY_BY_DEPENDENCY = "org.freedesktop.systemd1.OnlyByDependency"
MANAGE_UNITS = "org.freedesktop.systemd1.manage-units"
ALREADY_SUBSCRIBED = "org.freedesktop.systemd1.AlreadySubscribed"
POLKIT = "polkit.service"

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


def translate_error(name: str, text: str, subject: str | None) -> SdtoolError:
    """The error of ours for a D-Bus error, chosen by its name alone."""
    sentence = text if text.endswith(".") else f"{text or name}."
    if subject and subject not in sentence:
        sentence = f"{subject}: {sentence}"
    kind = ERRORS.get(name)
    if kind is UnitMasked and POLKIT in text.split() and subject != POLKIT:
        # polkit itself is masked: the error names its unit, not the one we asked about.
        kind = AccessDenied
    if kind is AccessDenied:
        return AccessDenied(sentence, subject=subject, hint=_permission_hint(name), name=name)
    if kind is None:
        return BusError(f"{sentence[:-1]} ({name}).", name=name, subject=subject)
    return kind(sentence, subject=subject)


def _permission_hint(name: str) -> str:
    if name == ONLY_BY_DEPENDENCY:
        return "its RefuseManualStop= or RefuseManualStart= allows it as a dependency only"
    return f"run as root, or have polkit allow {MANAGE_UNITS} to this user"


class Manager:
    """A connection to one service manager; use as an async context manager."""

    def __init__(self, connection: Connection, info: ManagerInfo) -> None:
        self._connection = connection
        self.info = info
        self._gives_references = True

    @classmethod
    async def open_user(cls, uid: int) -> Manager:
        """Connect as root to the manager of any user, over its private socket.

        The user's bus admits the user alone.

        Raises:
            Unavailable: Nobody answers within about 6 seconds.
        """
        address = f"unix:path=/run/user/{uid}/systemd/private"
        failures: list[str] = []
        try:
            return await cls._open(Scope.USER, [("private", address)], failures)
        except Unavailable as error:
            raise Unavailable(f"{'; '.join(failures)}.") from error

    @classmethod
    async def open(cls, scope: Scope) -> Manager:
        """Connect over the bus, or over the manager's private socket where the bus is dead.

        Raises:
            NotBooted: This machine was not booted with systemd.
            AccessDenied: The bus does not let us talk to the manager.
            Unavailable: Nobody answers within about 4 seconds.
        """
        return await cls._open(scope, _addresses(scope), [])

    @classmethod
    async def _open(
        cls, scope: Scope, addresses: Sequence[tuple[str, str]], failures: list[str]
    ) -> Manager:
        denied: SdtoolError | None = None
        for transport, address in addresses:
            connection = None
            try:
                connection = await Connection.open(address, deadline_s=CONNECT_TIMEOUT_S)
                info = await _read_info(connection, scope, transport, failures)
                return cls(connection, info)
            except (NoAnswer, RemoteError) as error:
                log.debug("%s: %s", address, error)
                failures.append(str(error))
                if isinstance(error, RemoteError) and ERRORS.get(error.name) is AccessDenied:
                    denied = translate_error(error.name, error.text, f"{scope} manager")
                if connection is not None:
                    await connection.close()
            except BaseException:
                if connection is not None:
                    await connection.close()
                raise
        raise denied or _unreachable(scope, failures)

    async def __aenter__(self) -> Manager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection."""
        await self._connection.close()

    async def _call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
        subject: str | None = None,
        interactive: bool = False,
    ) -> tuple[Any, ...]:
        """Call the manager, with every failure translated to an error of ours."""
        try:
            return await self._connection.call(
                path, interface, member, signature, body, interactive=interactive
            )
        except RemoteError as error:
            raise translate_error(error.name, error.text, subject) from error
        except NoAnswer as error:
            raise Unavailable(
                f"The {self.info.scope} manager does not answer: {error}.",
                subject=subject,
                hint="it may be reloading, or the bus was restarted: try again",
            ) from error

    async def list_units(self, patterns: Sequence[str] = ()) -> tuple[Unit, ...]:
        """All loaded units, or those whose name or alias matches one of the globs, by name."""
        if patterns:
            (rows,) = await self._call("ListUnitsByPatterns", "asas", [[], list(patterns)])
        else:
            (rows,) = await self._call("ListUnits")
        return tuple(sorted((parse_unit_row(row) for row in rows), key=lambda unit: unit.name))

    async def list_named(self, names: Sequence[str]) -> tuple[Unit, ...]:
        """The units of these very names, loaded or not; one that does not exist is not-found."""
        if not names:
            return ()
        (rows,) = await self._call("ListUnitsByNames", "as", [list(names)])
        return tuple(parse_unit_row(row) for row in rows)

    async def read_unit(self, name: str) -> UnitDetails:
        """One unit with all that a trace or a stop needs.

        Raises:
            NoSuchUnit: There is no such unit file and nothing of that name is active.
        """
        # ListUnitsByNames and not LoadUnit: it resolves aliases and loads from disk too, but
        # does not keep the unit loaded.
        (rows,) = await self._call("ListUnitsByNames", "as", [[name]], subject=name)
        if not rows or (rows[0][2] == "not-found" and rows[0][3] in ("inactive", "")):
            raise NoSuchUnit(
                f"Unit {name} could not be found.",
                subject=name,
                hint="sdtool list --all shows the loaded units",
            )
        unit, path = parse_unit_row(rows[0]), rows[0][6]
        # The empty interface means all of them, in one call.
        (properties,) = await self._call(
            "GetAll", "s", [""], path=path, interface=PROPERTIES, subject=name
        )
        return parse_details(unit, unwrap(properties))

    async def read_properties(
        self, units: Sequence[str], properties: Sequence[tuple[str, str]]
    ) -> dict[str, dict[str, Any]]:
        """A few properties of many units, pipelined; a unit that is gone has none.

        Args:
            properties: (interface without its prefix, property): ("Service", "MainPID").
        """
        values: dict[str, dict[str, Any]] = {name: {} for name in units}

        async def read_one(name: str, interface: str, member: str) -> None:
            try:
                (value,) = await self._call(
                    "Get",
                    "ss",
                    [f"org.freedesktop.systemd1.{interface}", member],
                    path=unit_path(name),
                    interface=PROPERTIES,
                    subject=name,
                )
            except (NoSuchUnit, NotApplicable, BusError):
                return
            values[name][member] = unwrap(value)

        try:
            async with asyncio.TaskGroup() as group:
                for name in units:
                    for interface, member in properties:
                        group.create_task(read_one(name, interface, member))
        except ExceptionGroup as failures:
            # They share one reason, the connection's; a caller expects an error of ours.
            raise failures.exceptions[0] from None
        return values

    async def unit_of_pid(self, pid: int) -> str | None:
        """The unit that the manager counts a process to, None when to none.

        Raises:
            NoSuchProcess: The manager sees no such process.
        """
        try:
            (path,) = await self._call("GetUnitByPID", "u", [pid], subject=f"pid {pid}")
        except NoSuchProcess:
            raise
        except NoSuchUnit:
            return None
        return unit_name_of_path(path)

    async def subscribe(self) -> asyncio.Queue[ManagerSignal]:
        """Ask for the manager's signals; they arrive in the queue in the order they were sent."""
        queue: asyncio.Queue[ManagerSignal] = asyncio.Queue()

        def put_away(signal: BusSignal | None) -> None:
            parsed = (
                ConnectionLost(reason=self._connection.lost or "closed")
                if signal is None
                else parse_signal(signal)
            )
            if parsed is not None:
                queue.put_nowait(parsed)

        self._connection.deliver_signals(put_away)
        if self.info.transport == "bus":
            # The private socket has no broker to filter: everything arrives there.
            sender = f"type='signal',sender='{SYSTEMD}'"
            for rule in (
                f"{sender},path_namespace='{MANAGER_PATH}/unit'",
                f"{sender},interface='{MANAGER}'",
                f"type='signal',sender='{BROKER}',member='NameOwnerChanged',arg0='{SYSTEMD}'",
            ):
                await self._add_match(rule)
        await self.subscribe_again()
        return queue

    async def subscribe_again(self) -> None:
        """Have the manager send its signals to us; after a daemon-reexec it has to be told anew.

        Where it has us on its list already, that is what was wanted.
        """
        try:
            await self._call("Subscribe")
        except BusError as error:
            if error.name != ALREADY_SUBSCRIBED:
                raise

    async def _add_match(self, rule: str) -> None:
        try:
            await self._connection.call(
                "/org/freedesktop/DBus", BROKER, "AddMatch", "s", [rule], destination=BROKER
            )
        except (RemoteError, NoAnswer) as error:
            raise Unavailable(f"The bus refused to send signals: {error}.") from error

    async def list_socket_units(self) -> tuple[SocketUnit, ...]:
        """Every loaded .socket unit with the addresses that it listens on."""
        names = [unit.name for unit in await self.list_units(["*.socket"])]
        values = await self.read_properties(names, [("Socket", "Listen")])
        return tuple(
            SocketUnit(name=name, listens=parse_listens(found.get("Listen") or ()))
            for name, found in values.items()
        )

    async def ref_unit(self, name: str) -> bool:
        """Keep a unit from being garbage-collected while we look; False when not permitted."""
        if not self._gives_references:
            return False
        try:
            await self._call("Ref", path=unit_path(name), interface=UNIT, subject=name)
        except SdtoolError as error:
            log.debug("no reference on %s: %s", name, error)
            # Polkit decides about it too: one that is frozen costs its deadline once.
            self._gives_references = not isinstance(error, Unavailable)
            return False
        return True

    async def queue_job(
        self, verb: Literal["stop", "start", "restart"], name: str, *, interactive: bool = False
    ) -> str:
        """Queue a job (mode replace) and return its object path.

        Args:
            interactive: Let polkit ask the user for a password.
        """
        (path,) = await self._call(
            f"{verb.title()}Unit", "ss", [name, "replace"], subject=name, interactive=interactive
        )
        return str(path)


async def _read_info(
    connection: Connection, scope: Scope, transport: str, failures: Sequence[str]
) -> ManagerInfo:
    async def read(member: str) -> str:
        (value,) = await connection.call(
            MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, member], deadline_s=CONNECT_TIMEOUT_S
        )
        return str(unwrap(value))

    return ManagerInfo(
        scope=scope,
        version=await read("Version"),
        control_group=await read("ControlGroup") or "/",
        transport=transport,
        transport_reason=failures[-1] if failures else None,
        library=connection.library.name,
    )


def _addresses(scope: Scope) -> list[tuple[str, str]]:
    """Where the manager may be reached, as (transport, D-Bus address), best first."""
    if scope is Scope.SYSTEM:
        bus = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or (
            "unix:path=/run/dbus/system_bus_socket;unix:path=/var/run/dbus/system_bus_socket"
        )
        private = Path("/run/systemd/private") if os.geteuid() == 0 else None
    else:
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
        bus = os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={runtime}/bus"
        private = runtime / "systemd/private"
    addresses = [("bus", bus)]
    if private is not None and _is_socket(private):
        addresses.append(("private", f"unix:path={private}"))
    return addresses


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _unreachable(scope: Scope, failures: Sequence[str]) -> Unavailable:
    reason = "; ".join(dict.fromkeys(failures))
    if scope is Scope.USER:
        return Unavailable(
            f"No user manager can be reached: {reason}.",
            hint="log in through PAM, or `loginctl enable-linger`; sdtool sandbox boots one",
        )
    if not Path("/run/systemd/system").is_dir():
        return NotBooted(
            "This machine was not booted with systemd (no /run/systemd/system).",
            hint="sdtool sandbox boots a throwaway systemd to try things in",
        )
    return Unavailable(
        f"The system manager cannot be reached: {reason}.",
        hint="as root sdtool also tries /run/systemd/private, without the bus",
    )


# Bytes to model ------------------------------------------------------------------------------


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
        triggered_by=tuple(get("TriggeredBy") or ()),
        stops_along=_join(properties, "RequiredBy", "BoundBy", "ConsistsOf"),
    )


def parse_listens(rows: Sequence[Sequence[Any]]) -> tuple[ListenAddress, ...]:
    """The Listen property of a .socket unit, ``a(ss)``."""
    return tuple(ListenAddress(type=row[0], address=row[1]) for row in rows)


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
    code, status = properties["ExecMainCode"], properties["ExecMainStatus"]
    # waitid(2): CLD_EXITED, CLD_KILLED, CLD_DUMPED.
    ended: ExitStatus = ExitCode(code=status)
    if code != os.CLD_EXITED:
        ended = ExitSignal(signal=signal_name(status), core=code == os.CLD_DUMPED)
    return MainExit(pid=properties["ExecMainPID"], at_us=at_us, exit=ended)
