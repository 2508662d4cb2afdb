"""What the questions to one host share: the connection, made when it is first needed."""

from __future__ import annotations

import asyncio
from functools import cached_property

from sdtool.analysis.cgroups import uid_of_manager
from sdtool.errors import SdtoolError
from sdtool.model.scope import Scope
from sdtool.model.unit import ManagerRoots
from sdtool.sources import cgroups
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.pidfds import probe_exit_info
from sdtool.sources.systemd import Manager

JOURNAL_TURNS = 4


class Session:
    """A lazily made connection to one manager, with the cgroup hierarchy it uses."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._manager: Manager | None = None
        self._others: dict[str, Manager | SdtoolError] = {}
        self._failure: SdtoolError | None = None

    async def manager(self) -> Manager:
        """The connection to the manager.

        Raises:
            Unavailable: It cannot be reached.
        """
        if self._failure is not None:
            raise self._failure
        if self._manager is None:
            try:
                self._manager = await Manager.open(self.scope)
            except SdtoolError as error:
                # Once is enough: a dead manager costs its deadline only the first time.
                self._failure = error
                raise
        return self._manager

    async def manager_of(self, name: str) -> Manager:
        """The connection to the manager of any unit.

        Args:
            name: As in ``CgroupOwner.manager``: a ``Scope``, or the user@UID.service that runs it.

        Raises:
            Unavailable: It cannot be reached, or lets in nobody but root and its own user.
        """
        if name == self.scope:
            return await self.manager()
        known = self._others.get(name)
        if known is None:
            try:
                known = await _open_other(name)
            except SdtoolError as error:
                known = error
            self._others[name] = known
        if isinstance(known, SdtoolError):
            raise known
        return known

    @cached_property
    def journal_turns(self) -> asyncio.Semaphore:
        """How many may read the journal at once: each reading is a process."""
        return asyncio.Semaphore(JOURNAL_TURNS)

    @cached_property
    def mount(self) -> CgroupMount:
        """The cgroup hierarchy."""
        return cgroups.read_mount()

    @cached_property
    def exit_info(self) -> tuple[bool, str]:
        """Whether this kernel tells wait statuses of any process, and why not."""
        return probe_exit_info()

    async def roots(self) -> ManagerRoots:
        """Where the managers keep their units; only a user manager has to be asked for it."""
        system = cgroups.read_manager_root()
        if self.scope is Scope.SYSTEM:
            return ManagerRoots(system=system)
        return ManagerRoots(system=system, user=(await self.manager()).info.control_group)

    async def close(self) -> None:
        """End the connections that were made."""
        for manager in (self._manager, *self._others.values()):
            if isinstance(manager, Manager):
                await manager.close()
        self._manager = None
        self._others.clear()


async def _open_other(name: str) -> Manager:
    if name == Scope.SYSTEM:
        return await Manager.open(Scope.SYSTEM)
    return await Manager.open_user(uid_of_manager(name))
