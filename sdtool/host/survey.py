"""The sockets of this machine, in every network namespace, with who made and who holds them.

A ``Survey`` serves one question, or several asked at once: what is costly to read (where the
namespaces are, who holds what) it reads when it is first needed, and once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from sdtool.analysis import ownership
from sdtool.errors import SdtoolError, Unavailable
from sdtool.host.session import Session
from sdtool.model.sockets import (
    HolderScan,
    ManagersSockets,
    Socket,
    SocketFacts,
    SocketFilter,
    SocketStates,
    SocketUnit,
    inodes_of,
)
from sdtool.sources import cgroups, namespaces, processes, procnet, sockets
from sdtool.sources.descriptors import Sweep, read_descriptors
from sdtool.sources.namespaces import NamespaceCensus, NetworkNamespace
from sdtool.sources.reach import read_manager_pid

Rows = tuple[SocketFacts, ...]

MAX_FILTERED = 100
"""Cgroups that are worth a filter in the kernel, which takes twenty at a time."""


class Survey:
    """What one question needs to know of sockets.

    Args:
        pids: Look at the descriptors and into the network namespaces of these processes alone,
            and into our own; None for every one there is.
    """

    def __init__(self, session: Session, pids: Collection[int] | None = None) -> None:
        self._session = session
        self._pids = pids
        self._told: set[int] = set()
        self._partly: dict[NetworkNamespace, str] = {}
        self._not_at_all: dict[NetworkNamespace, str] = {}
        self._uncopied: str | None = None
        self._unasked: dict[str, None] = {}
        self._unseen_pids: set[int] = set()
        self._unseen: dict[str, None] = {}

    @cached_property
    def census(self) -> NamespaceCensus:
        """The network namespaces that are looked into."""
        if self._pids is not None:
            return namespaces.read_namespaces_of(self._pids)
        return namespaces.read_namespaces()

    @cached_property
    def ids(self) -> Mapping[int, str] | None:
        """Cgroup id -> path; None where ids say nothing."""
        return cgroups.read_ids(self._session.mount)

    @cached_property
    def sweep(self) -> Sweep:
        """The descriptors of the processes: 50 us for each."""
        return Sweep(self._pids)

    @property
    def reason(self) -> str | None:
        """Why there may be sockets that were not seen; None when there are not."""
        reasons = [self.census.reason] if self.census.reason else []
        for where, why in _by_reason(self._partly):
            reasons.append(f"in {where} only what /proc/PID/net shows was seen: {why}")
        for where, why in _by_reason(self._not_at_all):
            reasons.append(f"{where} may not be entered: {why}")
        if self._uncopied:
            reasons.append(
                f"sockets that the kernel does not list are closed to us: {self._uncopied}"
            )
        return "; ".join((*reasons, *self._unseen)) or None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the answers may lack for all that."""
        return (*([self.reason] if self.reason else []), *self.unasked)

    @property
    def unasked(self) -> tuple[str, ...]:
        """Which managers did not tell what they hold sockets for."""
        return tuple(self._unasked)

    @property
    def caveat(self) -> str | None:
        """Why a namespace that only a descriptor keeps alive could not be looked for."""
        why = self.sweep.reason
        return f"one that only a descriptor keeps alive may be hidden: {why}" if why else None

    @property
    def unseen_pids(self) -> frozenset[int]:
        """Processes in namespaces that were not entered, and that have sockets or may have."""
        return frozenset(self._unseen_pids)

    def read(self, wanted: SocketFilter) -> Rows:
        """The sockets of every network namespace that a process is in, or that is mounted."""
        return self._read(self.census.namespaces, wanted)

    def read_at(self, address: str, wanted: SocketFilter) -> Rows:
        """The sockets of the network namespace that has an address, ours aside.

        None of them where several have it: which one is meant depends on who asks.
        """
        others = [place for place in self.census.namespaces if not place.own]
        looks = namespaces.look_into(others, lambda: namespaces.has_address(address))
        places = [place for place, has in looks if has is True]
        return self._read(places, wanted) if len(places) == 1 else ()

    def read_deeper(self, wanted: SocketFilter) -> Rows:
        """What ``read`` does not have: behind descriptors, and what the kernel does not list.

        These are the sockets of network namespaces that a thread alone is in, that are mounted
        where others see it, or that nothing but a descriptor keeps alive; and before Linux 6.8
        those that are bound and do not listen. It takes a look at every descriptor, and at every
        socket there is.
        """
        places = list(self.census.namespaces)
        for find in (
            partial(namespaces.read_thread_namespaces, self.sweep.pids),
            partial(namespaces.read_mounted_namespaces, self.sweep.pids),
            self.sweep.namespaces,
        ):
            places += find({place.inode for place in places})
        known = {place.inode for place in places}
        rows = self._read(places[len(self.census.namespaces) :], wanted)
        looks = namespaces.look_into(places, sockets.read_inodes)
        listed = {inode for _, found in looks if not isinstance(found, OSError) for inode in found}
        unlisted = self.sweep.sockets - listed - self._told
        with self.sweep.look_closer(unlisted, known) as closer:
            rows += self._read(closer.namespaces, wanted)
        listed_now = inodes_of(rows)
        self._uncopied = closer.reason
        rows += tuple(
            _placed(row, places[0])
            for row in closer.sockets
            if row.inode not in listed_now and sockets.fits(row, wanted)
        )
        return tuple(sorted(rows, key=sockets.by_address))

    def read_of_cgroup(self, group: str, wanted: SocketFilter) -> Rows:
        """The sockets that were made in a cgroup, or are held by the survey's own processes.

        The kernel leaves out what was made elsewhere, so that it costs nothing; all is read only
        where a process has a socket from elsewhere.
        """
        below = f"{group}/"
        ids = {key for key, path in (self.ids or {}).items() if f"{path}/".startswith(below)}
        few = tuple(sorted(ids)) if self.ids is not None and len(ids) <= MAX_FILTERED else None
        rows = self.read(replace(wanted, cgroups=few))
        left = self.sweep.with_ports(self.sweep.sockets - inodes_of(rows))
        if few is not None and left and wanted.states is not SocketStates.ALL:
            # Its connections were made here too: they are known, though not wanted.
            every = replace(wanted, cgroups=few, states=SocketStates.ALL)
            left -= inodes_of(self.read(every))
        if few is not None and left:
            rows = self.read(wanted)
            left -= inodes_of(rows)
        if left:
            rows += self.read_deeper(wanted)
        held = self.sweep.sockets
        return tuple(row for row in rows if row.cgroup_id in ids or row.inode in held)

    def _read(self, places: Iterable[NetworkNamespace], wanted: SocketFilter) -> Rows:
        rows: list[SocketFacts] = []
        for place, looks in namespaces.look_into(places, partial(_read_here, wanted)):
            for part, found in [(wanted, looks)] if isinstance(looks, OSError) else looks:
                rows += self._take(place, found, part)
        self._told |= inodes_of(rows)
        return tuple(sorted(rows, key=sockets.by_address))

    def _take(
        self, place: NetworkNamespace, found: Rows | SdtoolError | OSError, wanted: SocketFilter
    ) -> Rows:
        """What was found in a namespace; where we could not look, what text files tell of it."""
        if isinstance(found, tuple):
            return _named(found, place)
        return self._read_through_proc(place, wanted, found)

    def _read_through_proc(
        self, place: NetworkNamespace, wanted: SocketFilter, error: SdtoolError | OSError
    ) -> Rows:
        """What text files tell of a namespace where sock_diag is closed to us."""
        pids = ("thread-self",) if place.own else place.pids
        rows = procnet.read_sockets(pids, wanted, place.inode)
        if rows != () and not place.own:
            self._unseen_pids |= set(place.pids)
        if rows is None:
            self._not_at_all[place] = namespaces.explain_refusal(error)
        elif procnet.shows_all(wanted):
            pass
        elif isinstance(error, SdtoolError):
            self._unseen[f"{str(error).rstrip('.')}; /proc/net shows no bound sockets"] = None
        else:
            self._partly[place] = namespaces.explain_refusal(error)
        return _named(rows or (), place)

    async def join(
        self,
        rows: Sequence[SocketFacts],
        scan: HolderScan | None,
        managers: Collection[str] | None = None,
    ) -> tuple[Socket, ...]:
        """The sockets with their owners, and the units behind what managers hold themselves.

        Args:
            managers: Ask no others; None for all that hold any of the sockets.
        """
        joined = ownership.join(rows, self.ids, scan, await self._session.roots())
        if any(map(ownership.is_rootless, joined)) and self._has_strays:
            joined = ownership.doubt_kernel(joined)
        names = ownership.managers_of(joined)
        asked = [name for name in names if managers is None or name in managers]
        for behind in await asyncio.gather(*(self._ask_if_possible(n, joined) for n in asked)):
            joined = ownership.name_units_behind(joined, behind)
        return joined

    @cached_property
    def _has_strays(self) -> bool:
        """Whether processes live outside every unit; of the kernel's threads that is no news."""
        directory = str(self._session.mount.directory("/"))
        found = map(processes.read_process, cgroups.read_procs(directory))
        return any(one is not None and 2 not in (one.id.pid, one.ppid) for one in found)

    async def _ask_if_possible(self, name: str, joined: Sequence[Socket]) -> ManagersSockets:
        try:
            return await self._ask(name, joined)
        except SdtoolError as error:
            # The manager's own init.scope is then all that is known.
            self._unasked[f"what the manager {name} holds sockets for is not known: {error}"] = (
                None
            )
            return ManagersSockets(manager=name, pid=read_manager_pid(name))

    async def _ask(self, name: str, joined: Sequence[Socket]) -> ManagersSockets:
        """What a manager may hold sockets for; its fd stores where no .socket explains one."""
        manager = await self._session.manager_of(name)
        pid = read_manager_pid(name)
        home = processes.read_netns(pid) if pid else None
        units = tuple(
            replace(unit, netns=_namespace_of(unit, home))
            for unit in await manager.list_socket_units()
        )
        behind = ManagersSockets(manager=name, pid=pid, units=units)
        left = ownership.name_units_behind(joined, behind)
        if not any(ownership.may_be_stored(socket, name) for socket in left):
            return behind
        stores = await manager.list_fd_stores()
        # Looked at again: while it answered it may have closed what was there before.
        held = read_descriptors(pid) if pid else None
        return replace(behind, stores=stores, held=frozenset(held.sockets) if held else None)


def _read_here(wanted: SocketFilter) -> list[tuple[SocketFilter, Rows | SdtoolError]]:
    """What is here; where the kernel does not list all, each part of it or why that is missing."""
    try:
        return [(wanted, sockets.read_sockets(wanted))]
    except Unavailable as error:
        parts = [replace(wanted, protocols=part) for part in sockets.split(wanted.protocols)]
        if len(parts) < 2:
            return [(wanted, error)]
    # A module for each protocol, and not all are there: udp_diag, with no more to be loaded.
    return [look for part in parts for look in _read_here(part)]


def _placed(row: SocketFacts, own: NetworkNamespace) -> SocketFacts:
    """What a copy told, seen from our own network namespace: only its devices have names here."""
    elsewhere = row.netns != own.inode
    if row.interface is None:
        return replace(row, elsewhere=elsewhere)
    device = f"if{row.interface}" if elsewhere else sockets.name_device(row.interface)
    return replace(row, elsewhere=elsewhere, device=device)


def _named(rows: Rows, place: NetworkNamespace) -> Rows:
    if place.own and place.name is None:
        return rows
    return tuple(replace(row, netns_name=place.name, elsewhere=not place.own) for row in rows)


def _namespace_of(unit: SocketUnit, home: int | None) -> int | None:
    path = unit.namespace_path
    return home if path is None else namespaces.read_inode(path)


def _by_reason(closed: Mapping[NetworkNamespace, str]) -> Iterator[tuple[str, str]]:
    """How many were closed to us for each reason."""
    for why, many in Counter(closed.values()).items():
        yield f"{many} other network namespace{'' if many == 1 else 's'}", why
