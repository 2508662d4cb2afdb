"""Every manager of this machine in one answer: the system's, and each user's that runs.

A user manager lets root in through its private socket; its bus lets in nobody but the user. All
are asked at once, each for no longer than its time; one that does not tell everything is an error.
There is one sweep of the cgroups and one of the sockets for all of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdtool.analysis import cgroups, membership
from sdtool.errors import AccessDenied, InvalidArgument, SdtoolError, Unavailable
from sdtool.host.asking import nothing_matches, split
from sdtool.host.session import Session
from sdtool.host.units import read_census, require_known_types, unit_patterns
from sdtool.model.answer import Answer
from sdtool.model.scope import Scope
from sdtool.model.sockets import SocketUnit
from sdtool.model.unit import ListedUnit, ListFilter, Unit
from sdtool.sources.processes import read_user_name
from sdtool.sources.systemd import Manager

ANSWER_S = 3.5
"""How long each user manager has for all that it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserManager:
    """A user manager that has answered.

    Attributes:
        unit: The system's unit that runs it, user@UID.service.
        socket_units: Those that may stand behind the sockets it made itself.
    """

    unit: str
    user: str
    units: tuple[Unit, ...]
    socket_units: tuple[SocketUnit, ...]


async def list_all_managers(
    session: Session, patterns: Sequence[str], filters: ListFilter
) -> Answer[ListedUnit]:
    """The units of all managers, the system's first; a manager that does not answer is an error.

    Raises:
        AccessDenied: We are not root.
        InvalidArgument: An unknown unit type, or the host is about a user manager.
        NoSuchUnit: No loaded unit of any manager matches the patterns.
    """
    if session.scope is not Scope.SYSTEM:
        sentence = "All managers are listed through the system's, not through a user's."
        raise InvalidArgument(sentence, hint="leave --user out")
    _require_root()
    require_known_types(filters)
    wanted = unit_patterns(patterns)
    system = await session.manager()
    units = await system.list_units(wanted)
    names = cgroups.running_user_managers(await system.list_units(["user@*.service"]))
    found = split(await asyncio.gather(*(_ask(name, wanted) for name in names)))
    if patterns and not found.errors and not (units or any(one.units for one in found.data)):
        raise nothing_matches(patterns)
    census, notes = await read_census(session, {one.unit: one.socket_units for one in found.data})
    rows = membership.list_units(_wanted(filters, units), census, Scope.SYSTEM)
    for one in found.data:
        rows += membership.list_units(_wanted(filters, one.units), census, one.unit, one.user)
    return Answer(data=rows, errors=found.errors, notes=notes)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise AccessDenied(
            "The managers of all users let in nobody but root.",
            hint="run as root; sdtool list --user asks your own",
        )


def _wanted(filters: ListFilter, units: Iterable[Unit]) -> list[Unit]:
    return [unit for unit in units if membership.wants(filters, unit)]


async def _ask(unit: str, patterns: Sequence[str]) -> _UserManager | SdtoolError:
    """All that a user manager is asked, in its own time: what another one costs is not its."""
    uid = cgroups.uid_of_manager(unit)
    user = read_user_name(uid)
    try:
        async with asyncio.timeout(ANSWER_S), await Manager.open_user(uid) as manager:
            units = await manager.list_units(patterns)
            socket_units = await manager.list_socket_units()
    except TimeoutError:
        return _in_vain(unit, user, f"nothing came within {ANSWER_S:g} s.")
    except SdtoolError as error:
        return _in_vain(unit, user, str(error))
    return _UserManager(unit=unit, user=user, units=units, socket_units=socket_units)


def _in_vain(unit: str, user: str, reason: str) -> Unavailable:
    sentence = f"The manager of user {user} ({unit}) was asked in vain: {reason}"
    return Unavailable(sentence, subject=unit, hint=f"systemctl status {unit}")
