"""Units: what the manager says about them, and where in the cgroup tree they live."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sdtool.model.process import Process, Role
from sdtool.model.scope import Scope
from sdtool.model.sockets import Socket
from sdtool.model.stop import StopCommand, StopPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One loaded unit, in org.freedesktop.systemd1(5)'s own words.

    Attributes:
        unit_file_state: As in ``systemctl is-enabled``; None for a unit without a file.
        main_pid: None when there is no main process (or the type has none).
        control_group: Path below the cgroup root, None when the unit has no cgroup now.
        result: The last result; None for types that have none (devices, targets, slices).
        n_restarts: Automatic restarts since the last manual start; services only.
        fragment_path: The unit file, None when generated or transient in memory.
        invocation_id: 32 hex digits, None when never started.
        job: Type of the job that is queued for it: start, stop, restart ...
        following: The unit that it is another name of (devices); None for most.
    """

    name: str
    description: str
    load_state: str
    active_state: str
    sub_state: str
    unit_file_state: str | None = None
    main_pid: int | None = None
    control_group: str | None = None
    result: str | None = None
    n_restarts: int | None = None
    fragment_path: str | None = None
    invocation_id: str | None = None
    job: str | None = None
    following: str | None = None

    @property
    def unit_type(self) -> str:
        """The word after the last dot: service, socket, scope ..."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFilter:
    """Which units to list, with the meaning of systemctl's options.

    Attributes:
        types: Unit types (service, socket ...); empty for all.
        states: Load, active or sub states; empty for all that are not inactive.
        everything: Inactive units and units that follow another one too.
    """

    types: Collection[str] = ()
    states: Collection[str] = ()
    everything: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedUnit(Unit):
    """A unit in a list: read in one sweep, so only what one sweep gives is filled in.

    Attributes:
        manager: Whose unit it is: a ``Scope``, USER for your own manager (``--user``), or the
            user@UID.service that runs another one.
        manager_user: The user whose manager it is; None for the system's.
        processes: Number of processes in its cgroup and all sub-cgroups; None when the
            membership could not be read.
        processes_reason: Why ``processes`` is None.
        ports: Listening ports it owns, as "8080/tcp", in the order of the numbers; None when it
            may have others that were not seen.
        ports_reason: Why ``ports`` is None.
        unread_reason: Why the other fields that are None were not read.
    """

    manager: str
    manager_user: str | None
    processes: int | None
    processes_reason: str | None
    ports: tuple[str, ...] | None
    ports_reason: str | None
    unread_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDetails:
    """One unit with everything a trace or a stop needs, from one GetAll.

    Attributes:
        policy: None for a unit type that kills nothing (targets, devices, slices ...).
        can_stop: False for types that systemd cannot stop (devices).
        control_pid: The ExecStop=, ExecReload= ... command running now.
        job_path: The object path of the job that is queued for it, None when there is none.
        collect_mode: CollectMode=; with "inactive" a unit that failed is not forgotten.
        triggered_by: The .socket, .path or .timer units that start it.
        stored_descriptors: How many the manager keeps for it, in its fd store.
        stops_along: Units that a stop of this one takes down (RequiredBy, BoundBy, ConsistsOf).
        stop_commands: What runs when it stops, in the order of the phases.
    """

    unit: Unit
    policy: StopPolicy | None = None
    can_stop: bool = True
    control_pid: int | None = None
    job_path: str | None = None
    collect_mode: str | None = None
    triggered_by: tuple[str, ...] = ()
    stored_descriptors: int = 0
    stops_along: tuple[str, ...] = ()
    stop_commands: tuple[StopCommand, ...] = ()

    def role_of(self, pid: int) -> Role:
        """What the manager knows a process of the unit as."""
        if pid == self.unit.main_pid:
            return Role.MAIN
        return Role.CONTROL if pid == self.control_pid else Role.OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A unit with its processes and sockets.

    Attributes:
        unit: The unit's name.
        status: What the manager says about it.
        policy: How it would be stopped; None for types that kill nothing.
        processes: In tree order: every process stands after its parent.
        sockets_reason: What the list of sockets may lack, and what would lift it.
        triggered_by: The units that start this one.
    """

    unit: str
    status: Unit
    policy: StopPolicy | None
    processes: tuple[Process, ...]
    sockets: tuple[Socket, ...]
    sockets_reason: str | None
    triggered_by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerRoots:
    """Where managers keep their units in the cgroup tree.

    Attributes:
        system: The system manager's root, "/" on most machines.
        user: The root of the user manager that was asked (``--user``), None otherwise. Other
            user managers are recognised by their user@UID.service.
    """

    system: str = "/"
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupOwner:
    """What a cgroup path says about who manages a process: sd-login(3)'s reading of it.

    Attributes:
        unit: The unit of the system manager.
        user_unit: The unit of a user manager (below user@UID.service, or the manager asked).
        slice: The slice of the innermost of the two.
        session: The login session's id, when it sits in session-ID.scope.
        asked: ``user_unit`` belongs to the user manager that was asked.
    """

    unit: str | None = None
    user_unit: str | None = None
    slice: str | None = None
    session: str | None = None
    asked: bool = False

    @property
    def innermost(self) -> str | None:
        """The unit closest to the process."""
        return self.user_unit or self.unit

    @property
    def manager(self) -> str | None:
        """Whose unit the innermost one is; None when there is none.

        A ``Scope``, USER for the user manager that was asked, or another one's user@UID.service.
        """
        if self.user_unit is None:
            return Scope.SYSTEM if self.unit else None
        return Scope.USER if self.asked else self.unit
