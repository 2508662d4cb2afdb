"""Every manager of this machine in one answer: the system's, and each user's that runs.

A user manager lets root in through its private socket; its bus lets in nobody but the user. All
are asked at once, each for no longer than its time, and there is one sweep of the cgroups and one
of the sockets for all of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from sdtool.analysis import membership, ownership
from sdtool.errors import AccessDenied, InvalidArgument, SdtoolError, Unavailable
from sdtool.host.asking import nothing_matches, split
from sdtool.host.ports import read_listeners_by_creator
from sdtool.host.session import Session
from sdtool.host.units import require_known_types, unit_patterns
from sdtool.model.answer import Answer
from sdtool.model.scope import Scope
from sdtool.model.sockets import Socket
from sdtool.model.unit import ListedUnit, ListFilter, Unit
from sdtool.sources import cgroups
from sdtool.sources.processes import read_user_name
from sdtool.sources.systemd import Manager

ANSWER_S = 3.5
"""How long the user managers have for all that they are asked."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserManager:
    """A user manager that has answered.

    Attributes:
        unit: The system's unit that runs it, user@UID.service.
    """

    unit: str
    user: str
    manager: Manager
    units: tuple[Unit, ...]


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
    async with AsyncExitStack() as stack:
        until = asyncio.get_running_loop().time() + ANSWER_S
        names = ownership.running_user_managers(await system.list_units(["user@*.service"]))
        asked = await asyncio.gather(*(_ask(name, wanted, until, stack) for name in names))
        found = split(asked)
        if patterns and not found.errors and not (units or any(one.units for one in found.data)):
            raise nothing_matches(patterns)
        roots = await session.roots()
        tree = cgroups.read_tree(session.mount, roots.system)
        listeners = await read_listeners_by_creator(session, tree.ids)
        if listeners is not None:
            listeners = await _name_user_sockets(listeners, found.data, until)
    census = membership.take_census(tree.paths, tree.members, listeners, roots)
    rows = membership.list_units(_wanted(filters, units), census, Scope.SYSTEM)
    for one in found.data:
        rows += membership.list_units(_wanted(filters, one.units), census, one.unit, one.user)
    return Answer(data=rows, errors=found.errors)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise AccessDenied(
            "The managers of all users let in nobody but root.",
            hint="run as root; sdtool list --user asks your own",
        )


def _wanted(filters: ListFilter, units: Iterable[Unit]) -> list[Unit]:
    return [unit for unit in units if membership.wants(filters, unit)]


async def _ask(
    unit: str, patterns: Sequence[str], until: float, stack: AsyncExitStack
) -> _UserManager | SdtoolError:
    """Connect to a user manager, until the stack is closed, and have its units."""
    uid = ownership.uid_of_manager(unit)
    user = read_user_name(uid)
    try:
        manager = await _in_time(Manager.open_user(uid), until)
        stack.push_async_callback(manager.close)
        units = await _in_time(manager.list_units(patterns), until)
    except SdtoolError as error:
        sentence = f"The manager of user {user} ({unit}) was asked in vain: {error}"
        return Unavailable(sentence, subject=unit, hint=f"systemctl status {unit}")
    return _UserManager(unit=unit, user=user, manager=manager, units=units)


async def _in_time(question: Awaitable[T], until: float) -> T:
    try:
        async with asyncio.timeout_at(until):
            return await question
    except TimeoutError as error:
        raise Unavailable(f"nothing came within {ANSWER_S:g} s.") from error


async def _name_user_sockets(
    listeners: tuple[Socket, ...], managers: Sequence[_UserManager], until: float
) -> tuple[Socket, ...]:
    """Say which .socket unit is behind a socket that a user manager itself made."""
    for one in managers:
        if not any(ownership.is_made_by_manager(socket, one.unit) for socket in listeners):
            continue
        try:
            units = await _in_time(one.manager.list_socket_units(), until)
        except SdtoolError:
            continue  # its ports are then its init.scope's, which is true as well
        listeners = ownership.name_socket_units(listeners, one.unit, units)
    return listeners
