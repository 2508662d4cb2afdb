"""What the questions to one host share: the connection, made when it is first needed."""

from __future__ import annotations

from functools import cached_property

from sdtool.errors import SdtoolError
from sdtool.model.scope import Scope
from sdtool.model.unit import ManagerRoots
from sdtool.sources import cgroups
from sdtool.sources.cgroups import CgroupMount
from sdtool.sources.pidfds import probe_exit_info
from sdtool.sources.systemd import Manager


class Session:
    """A lazily made connection to one manager, with the cgroup hierarchy it uses."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._manager: Manager | None = None
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
        """End the connection, if one was made."""
        if self._manager is not None:
            await self._manager.close()
            self._manager = None
