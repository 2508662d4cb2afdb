"""What of the kernel watches one unit while it stops: pidfds, its cgroup, its listening sockets.

They need no manager, and go on while it is out of reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sdtool.analysis.tiers import explain_switch
from sdtool.errors import Unavailable
from sdtool.host.session import Session
from sdtool.model.sockets import Socket, SocketFacts, SocketFilter, SocketStates, inodes_of
from sdtool.model.stop import Event, ObserverState
from sdtool.model.unit import Unit
from sdtool.sources import cgroups, namespaces
from sdtool.sources.cgroups import CgroupObserver
from sdtool.sources.descriptors import Sweep
from sdtool.sources.pidfds import PidfdObserver
from sdtool.sources.sockevents import SocketObserver

if TYPE_CHECKING:
    from sdtool.model.journal import JournalRecord

JOURNAL_LAG_S = 0.5
"""How long the manager's last record of a stop may take to be there, where others flood it."""


class Observer(Protocol):
    """What watches a unit: a descriptor that becomes readable, and the events behind it."""

    name: str
    available: bool
    reason: str
    lost: int

    def fileno(self) -> int:
        """Readable when there are events."""

    def read_events(self) -> tuple[Event, ...]:
        """The events since the last call."""

    def close(self) -> None:
        """Stop watching."""


class JournalObserver:
    """What the manager wrote of a stop, read once it is over, and only where it is needed.

    Attributes:
        is_wanted: Nobody has switched it off.
    """

    def __init__(self, session: Session, wanted: frozenset[str] | None) -> None:
        off = explain_switch("journal", wanted)
        self._session = session
        self.is_wanted = off is None
        reason = off or "not asked: nothing was left open"
        self.state = ObserverState(name="journal", available=off is None, reason=reason)

    async def read(
        self, unit: Unit, *, since_us: int, manager: int | None, deadline_s: float
    ) -> tuple[JournalRecord, ...]:
        """The manager's records of a stop that is over; none where they may not be read."""
        from sdtool.sources.journal import read_stop_records

        try:
            async with asyncio.timeout(deadline_s), self._session.journal_turns:
                records = await read_stop_records(
                    unit.name,
                    self._session.scope,
                    since_us=since_us,
                    deadline_s=deadline_s,
                    patience_s=min(JOURNAL_LAG_S, deadline_s),
                    invocation_id=unit.invocation_id,
                    manager_pid=manager,
                )
        except (TimeoutError, Unavailable) as error:
            hint = error.hint if isinstance(error, Unavailable) else None
            reason = f"{error} ({hint})" if hint else str(error) or "there was no time left for it"
            self.state = replace(self.state, available=False, reason=reason)
            return ()
        many = "1 record" if len(records) == 1 else f"{len(records)} records"
        self.state = replace(self.state, reason=f"{many} of the manager")
        return records


class Observers:
    """All that watch one unit.

    Args:
        wanted: Names of ``OBSERVERS`` to use; None for all.

    Attributes:
        pidfds: Those of its processes; None when that is switched off.
    """

    def __init__(self, unit: str, session: Session, wanted: frozenset[str] | None) -> None:
        self._unit = unit
        self._mount = session.mount
        self._wanted = wanted
        self.pidfds: PidfdObserver | None = None
        if self._is_wanted("pidfd"):
            off = explain_switch("pidfd-info", wanted)
            self.pidfds = PidfdObserver(unit, (False, off) if off else session.exit_info)
        self._all: list[Observer] = [self.pidfds] if self.pidfds else []
        self._sockets: SocketObserver | None = None

    def _is_wanted(self, switch: str) -> bool:
        return explain_switch(switch, self._wanted) is None

    def arm(self, group: str | None, listeners: Collection[Socket]) -> None:
        """Start to watch a cgroup and the sockets that it made.

        Args:
            group: None for a unit without one.
            listeners: What the manager itself listens on for it, a .socket.
        """
        if group is not None and self._is_wanted("cgroup"):
            self._all.append(CgroupObserver(self._unit, self._mount, group))
        if (group is not None or listeners) and self._is_wanted("sockets"):
            self._sockets = SocketObserver(self._unit)
            self._all.append(self._sockets)
            if group is not None:
                self._observe_group(self._sockets, group)
            if listeners:
                self._observe_listeners(self._sockets, listeners)

    def _observe_listeners(self, observer: SocketObserver, listeners: Collection[Socket]) -> None:
        known = inodes_of(observer.listeners)
        inodes = {socket.inode for socket in listeners if socket.inode} - known
        wanted = SocketFilter(states=SocketStates.LISTENING)
        places = {socket.netns for socket in listeners}
        census = namespaces.read_namespaces()
        observer.arm([one for one in census.namespaces if one.inode in places], wanted, inodes)

    def _observe_group(self, observer: SocketObserver, group: str) -> None:
        tree = cgroups.read_tree(self._mount, group)
        if not tree.ids:
            return
        wanted = SocketFilter(cgroups=tuple(sorted(tree.ids)))
        sweep = Sweep(pid for found in tree.members.values() for pid in found)
        places = namespaces.read_namespaces_of(sweep.pids).namespaces
        listed = observer.arm(places, wanted)
        left = sweep.with_ports(sweep.sockets - listed)
        with sweep.look_closer(left, {place.inode for place in places}) as closer:
            observer.arm(closer.namespaces, wanted)

    def filenos(self, *, with_pidfds: bool) -> list[int]:
        """Their descriptors.

        Args:
            with_pidfds: Those of its processes too: a thousand that end wake us as often.
        """
        chosen = (one for one in self._all if with_pidfds or one is not self.pidfds)
        return [observer.fileno() for observer in chosen if observer.available]

    def read_events(self) -> list[tuple[Observer, tuple[Event, ...]]]:
        """The events of each since the last call."""
        return [(one, one.read_events()) for one in self._all if one.available]

    @property
    def tell_status(self) -> bool:
        """Whether they tell how processes end."""
        return self.pidfds is not None and self.pidfds.has_status

    @property
    def listeners(self) -> tuple[SocketFacts, ...]:
        """The listening sockets that it had when the watch began."""
        return self._sockets.listeners if self._sockets is not None else ()

    def find_listener(self, address: str, port: int, at_us: int) -> SocketFacts | None:
        """The one that was closed then, once: its notification has nothing to add then."""
        sockets = self._sockets
        return sockets.take_closed(address, port, at_us) if sockets is not None else None

    def freed_at(self, row: SocketFacts) -> int | None:
        """When one of the listening sockets was gone; None while it is there or nobody told."""
        return self._sockets.freed.get(row.cookie) if self._sockets is not None else None

    def read_held(self) -> tuple[SocketFacts, ...]:
        """Those of the listening sockets that are there still."""
        return self._sockets.read_held() if self._sockets is not None else ()

    def states(self) -> tuple[ObserverState, ...]:
        """What each gave, and which were switched off."""
        watching = (
            ObserverState(name=o.name, available=o.available, reason=o.reason, lost=o.lost)
            for o in self._all
        )
        off = (
            ObserverState(name=name, available=False, reason=reason)
            for name in ("pidfd", "cgroup", "sockets")
            if (reason := explain_switch(name, self._wanted))
        )
        return (*watching, *off)

    def close(self) -> None:
        """End every one; safe to call at any moment."""
        for observer in self._all:
            observer.close()
        self._all.clear()
