"""Where a manager is reached: over the bus, or over its own private socket where the bus is dead.

A bus that starts and a manager that executes itself anew (daemon-reexec) are out of reach for a
moment. Whatever may pass is tried again until the caller's patience ends; what cannot pass, a
bus that does not exist, is said at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdtool.errors import AccessDenied, NotBooted, SdtoolError, Unavailable
from sdtool.model.manager import ManagerInfo
from sdtool.model.scope import Scope
from sdtool.sources.bus import BROKER, Connection, NoAnswer, RemoteError, unwrap
from sdtool.sources.messages import (
    ABSENT,
    ERRORS,
    MANAGER,
    MANAGER_PATH,
    PROPERTIES,
    translate_error,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
"""For each of the ways to the manager."""

UCRED = struct.Struct("=iII")  # pid, uid, gid

PAUSE_S = 0.1
"""Before a way that led nowhere is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Where one manager is reached, and what it means where it is not.

    Attributes:
        read_addresses: The ways as (transport, D-Bus address), best first; they come and go.
        is_expected: Whether the manager should be there: only then is it worth waiting for.
        unreachable: The error, from the reason of each way.
    """

    scope: Scope
    read_addresses: Callable[[], list[tuple[str, str]]]
    is_expected: Callable[[], bool]
    unreachable: Callable[[Sequence[str]], Unavailable]


def doors_of(scope: Scope) -> Doors:
    """The bus, and the private socket, of the system's manager or of our own."""
    return Doors(
        scope=scope,
        read_addresses=partial(_addresses, scope),
        is_expected=partial(_is_expected, scope),
        unreachable=partial(_unreachable, scope),
    )


def doors_of_user(uid: int) -> Doors:
    """The one way, as root, to the manager of any user: its bus admits nobody but the user."""
    address = f"unix:path=/run/user/{uid}/systemd/private"
    return Doors(
        scope=Scope.USER,
        read_addresses=lambda: [("private", address)],
        is_expected=lambda: True,
        unreachable=lambda reasons: Unavailable(f"{'; '.join(reasons)}."),
    )


def read_manager_pid(name: str) -> int | None:
    """The process of a manager, by who listens on its private socket; None when nobody does.

    Args:
        name: As in ``CgroupOwner.manager``: a ``Scope``, or the user@UID.service that runs it.
    """
    if name == Scope.SYSTEM:
        return 1
    uid = name.removeprefix("user@").removesuffix(".service")
    runtime = f"/run/user/{os.geteuid() if name == Scope.USER else uid}"
    if name == Scope.USER:
        runtime = os.environ.get("XDG_RUNTIME_DIR", runtime)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as door:
        door.settimeout(CONNECT_TIMEOUT_S)
        door.connect(f"{runtime}/systemd/private")
        credentials = door.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        return int(UCRED.unpack(credentials)[0]) or None
    return None


async def reach(
    doors: Doors, *, patience_s: float, was_there: bool = False
) -> tuple[Connection, ManagerInfo]:
    """Connect to the manager; every way is tried at least once.

    Args:
        patience_s: Seconds to go on trying where what is in the way may pass.
        was_there: We have spoken to it: whatever is in the way now may pass.

    Raises:
        NotBooted: This machine was not booted with systemd.
        AccessDenied: The bus does not let us talk to the manager.
        Unavailable: Nobody answers.
    """
    clock = asyncio.get_running_loop().time
    until = clock() + patience_s
    while True:
        failures: list[NoAnswer | RemoteError] = []
        for transport, address in doors.read_addresses():
            try:
                return await _try(doors.scope, transport, address, failures, until)
            except (NoAnswer, RemoteError) as error:
                log.debug("%s: %s", address, error)
                failures.append(error)
        denied = _find_denial(failures, doors.scope)
        if denied is not None:
            raise denied
        hopeful = was_there or (doors.is_expected() and any(map(_may_pass, failures)))
        if not hopeful or clock() + PAUSE_S >= until:
            raise doors.unreachable([str(failure) for failure in failures])
        await asyncio.sleep(PAUSE_S)


async def probe_bus(scope: Scope) -> tuple[bool, str]:
    """Whether the message bus itself answers, whoever is on it, and what it says if not."""
    try:
        await _ping(scope, BROKER, "/org/freedesktop/DBus", BROKER, "GetId")
    except (NoAnswer, RemoteError) as error:
        return False, str(error)
    return True, "it answers"


async def probe_name(scope: Scope, name: str) -> bool | None:
    """Whether the owner of a name on the bus answers; None when there is nobody to ask.

    Nobody is started for it. To be refused is to be answered.
    """
    try:
        await _ping(scope, name, "/", "org.freedesktop.DBus.Peer", "Ping")
    except NoAnswer as error:
        return None if error.silent_s is None else False
    except RemoteError as error:
        return None if error.name in ABSENT else True
    return True


async def _ping(scope: Scope, name: str, path: str, interface: str, member: str) -> None:
    """Call a method without arguments, over a connection of its own."""
    _, address = _addresses(scope)[0]
    connection = await Connection.open(address, deadline_s=CONNECT_TIMEOUT_S)
    try:
        await connection.call(
            path, interface, member, destination=name, deadline_s=CONNECT_TIMEOUT_S
        )
    finally:
        await connection.close()


async def _try(
    scope: Scope,
    transport: str,
    address: str,
    failures: Sequence[Exception],
    until: float,
) -> tuple[Connection, ManagerInfo]:
    """Connect over one way and hear the manager itself."""
    clock = asyncio.get_running_loop().time
    # The later ways too get a chance where the first has used up the patience.
    end = clock() + min(CONNECT_TIMEOUT_S, max(until - clock(), PAUSE_S))
    connection = await Connection.open(address, deadline_s=end - clock())

    async def read(member: str) -> str:
        (value,) = await connection.call(
            MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, member], deadline_s=end - clock()
        )
        return str(unwrap(value))

    try:
        return connection, ManagerInfo(
            scope=scope,
            version=await read("Version"),
            control_group=await read("ControlGroup") or "/",
            transport=transport,
            transport_reason=str(failures[-1]) if failures else None,
            library=connection.library.name,
        )
    except BaseException:
        await connection.close()
        raise


def _may_pass(failure: NoAnswer | RemoteError) -> bool:
    if isinstance(failure, NoAnswer):
        return failure.may_pass
    return failure.name in ABSENT


def _find_denial(failures: Sequence[NoAnswer | RemoteError], scope: Scope) -> SdtoolError | None:
    for error in failures:
        if isinstance(error, RemoteError) and ERRORS.get(error.name) is AccessDenied:
            return translate_error(error.name, error.text, f"{scope} manager")
    return None


def _is_expected(scope: Scope) -> bool:
    """Whether the manager has left its traces: only then is it worth waiting for."""
    if scope is Scope.SYSTEM:
        return os.path.isdir("/run/systemd/system")
    # Somebody else's runtime directory is none of ours to look into: isdir then says no.
    return os.path.isdir(_user_runtime() / "systemd")


def _user_runtime() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def _addresses(scope: Scope) -> list[tuple[str, str]]:
    """Where the manager may be reached, as (transport, D-Bus address), best first."""
    if scope is Scope.SYSTEM:
        bus = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or (
            "unix:path=/run/dbus/system_bus_socket;unix:path=/var/run/dbus/system_bus_socket"
        )
        private = Path("/run/systemd/private") if os.geteuid() == 0 else None
    else:
        runtime = _user_runtime()
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
    if os.geteuid() == 0:
        hint = "neither the bus nor its private socket led to it; sdtool doctor tells of each"
    else:
        hint = "run as root: sdtool then also tries /run/systemd/private, without the bus"
    return Unavailable(f"The system manager cannot be reached: {reason}.", hint=hint)
