"""The manager while units stop: its signals carried, its absence bridged, what was missed read.

The observers of the kernel need no manager and go on while it is out of reach. When it is back,
one look at each unit tells what its signals would have told, with the manager's own times.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from sdtool.errors import SdtoolError, Unavailable
from sdtool.host.eventlog import now_us
from sdtool.host.stopwatch import StopWatch
from sdtool.model.manager import (
    ConnectionLost,
    ConnectionRenewed,
    JobChange,
    ManagerGap,
    ManagerOwner,
    ManagerReloading,
    ManagerSignal,
    UnitChange,
)
from sdtool.model.names import unit_path
from sdtool.sources.systemd import Manager

LIVENESS_S = 1.0
"""How often the manager is asked even where it seems well: it can freeze without a word."""

RETURN_S = 10.0
"""How long a manager that was lost while units stop is waited for."""

SILENCE_S = 0.5
"""How long a question may wait before the manager passes for out of reach."""

LEFT = "the manager had left the bus"

SILENT = "it does not answer"

UNTOLD = "the end of the job was not told, and seen only by asking"


class Contact:
    """Keeps hold of the manager for the watches, until nobody can.

    Args:
        on_policy: Called when a reload has changed how a unit is stopped.
    """

    def __init__(
        self,
        manager: Manager,
        signals: asyncio.Queue[ManagerSignal],
        watches: Sequence[StopWatch],
        on_policy: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._signals = signals
        self._watches = watches
        # Of thousands of units each signal is for one.
        self._by_name = {watch.name: watch for watch in watches}
        self._by_path = {unit_path(watch.name): watch for watch in watches}
        self._on_policy = on_policy
        self._later: deque[ManagerSignal] = deque()
        self._checked_us = self._heard_us = now_us()
        self._lost_us: int | None = None
        self._reason = ""
        self._reloading = self._silent = False

    @property
    def gap(self) -> ManagerGap | None:
        """The time until now in which nothing was heard; None while the manager is in reach."""
        if self._lost_us is not None:
            since_us, reason = self._lost_us, self._reason or SILENT
        elif self._silent:
            since_us, reason = self._heard_us, SILENT
        else:
            return None
        return ManagerGap(since_us=since_us, until_us=now_us(), reason=reason)

    async def look(self) -> ManagerGap | None:
        """Ask once more, and take what was told before the answer: the gap if there is none."""
        if self.gap is None:
            asked_us = now_us()
            try:
                async with asyncio.timeout(SILENCE_S):
                    await self._manager.find_again()
                self._drain(asked_us)
            except (TimeoutError, SdtoolError):
                self._silent = True
        return self.gap

    async def keep(self) -> None:
        """Carry signals, and look now and then; returns when the manager is lost for good."""
        clock = asyncio.get_running_loop().time
        due = clock() + LIVENESS_S
        try:
            while True:
                signal = await self._next(due)
                if signal is None:
                    await self._check()
                    due = clock() + LIVENESS_S
                else:
                    await self._take(signal)
        except Unavailable as error:
            for watch in self._watches:
                watch.lose_manager(str(error))

    async def _next(self, due: float) -> ManagerSignal | None:
        """The next signal, None where it is time to look."""
        if self._later:
            return self._later.popleft()
        try:
            async with asyncio.timeout_at(due):
                signal = await self._signals.get()
        except TimeoutError:
            return None
        if isinstance(signal, UnitChange | JobChange):
            self._heard_us = signal.heard_us or now_us()
        return signal

    async def _take(self, signal: ManagerSignal) -> None:
        if isinstance(signal, UnitChange | JobChange):
            self._hand_on(signal)
        elif isinstance(signal, ConnectionLost):
            self._lose(signal.reason, since_us=self._heard_us if signal.silent else None)
            await self._manager.find_again()
        elif isinstance(signal, ConnectionRenewed):
            self._lose(signal.reason)
            await self._resync()
        elif isinstance(signal, ManagerOwner):
            # Of a broker that ends this can be the last word.
            self._lose(self._reason or LEFT)
            if signal.present:
                await self._resync()
        elif isinstance(signal, ManagerReloading):
            await self._take_reloading(signal)

    async def _take_reloading(self, signal: ManagerReloading) -> None:
        if signal.active:
            # It may be known already that it was lost, but not of what.
            self._lose("daemon-reload")
            self._reloading = True
        elif self._lost_us is not None:
            await self._resync()
        else:
            # The end of a daemon-reexec, after whose beginning it was found again already.
            await self._manager.subscribe_again()
            await self._check()

    def _hand_on(self, signal: UnitChange | JobChange) -> None:
        if isinstance(signal, UnitChange):
            watch = self._by_path.get(signal.unit_path)
        else:
            watch = self._by_name.get(signal.unit)
        if watch is None:
            return
        gap = None
        if self._lost_us is not None:
            # What this ends may be reported on before the manager could be asked.
            reason = _name_loss(self._reason, self._reloading, self._later)
            gap = ManagerGap(since_us=self._lost_us, until_us=now_us(), reason=reason)
        watch.told.on_signal(signal, gap)

    def _lose(self, reason: str, *, since_us: int | None = None) -> None:
        """Note since when nothing is heard, and why; the last word on it counts.

        Args:
            since_us: When something was heard last, where that is earlier than now.
        """
        if self._lost_us is None:
            self._lost_us, self._reason = since_us or now_us(), reason
        elif self._reloading:
            # It said that it would be away, and then it left: it has executed itself anew.
            self._reason = "daemon-reexec"
        else:
            self._reason = reason

    async def _resync(self) -> None:
        """The manager is back: read what was missed, and say since when."""
        await self._manager.subscribe_again()
        waiting = [watch for watch in self._watches if not watch.is_over]
        # The reference went with the connection: without it a unit may be forgotten unseen.
        for watch in waiting:
            await watch.hold()
        asked_us = now_us()
        states = [(watch, await watch.read_state()) for watch in waiting]
        since_us, self._lost_us, self._reloading = self._lost_us, None, False
        self._drain(asked_us)
        until_us = now_us()
        gap = ManagerGap(since_us=since_us or until_us, until_us=until_us, reason=self._reason)
        self._reason = ""
        policies = [watch.told.policy for watch in waiting]
        for watch, state in states:
            watch.resync(state, gap, told=True)
        if policies != [watch.told.policy for watch in waiting]:
            self._on_policy()
        self._checked_us = self._heard_us = until_us

    async def _check(self) -> None:
        """Look whether the end of a job was missed; a manager that is frozen is found out so."""
        asked_us = now_us()
        waiting = [watch for watch in self._watches if watch.is_waiting]
        with self._question():
            behind = await self._find_behind(waiting, asked_us)
        states = [(watch, await watch.read_state()) for watch in behind]
        self._drain(asked_us)
        if self._lost_us is None:
            gap = ManagerGap(since_us=self._checked_us, until_us=now_us(), reason=UNTOLD)
            for watch, state in states:
                watch.resync(state, gap, told=False)
            self._checked_us = asked_us
            if waiting:
                # Signals keep their order: what was sent before the answer has come by now.
                self._heard_us = max(self._heard_us, asked_us)
        elif not self._later:
            # Away without a word of its return, and here again: the word was lost.
            await self._resync()

    @contextlib.contextmanager
    def _question(self) -> Iterator[None]:
        """Let the manager pass for out of reach while it owes the answer for too long."""
        timer = asyncio.get_running_loop().call_later(SILENCE_S, self._fall_silent)
        try:
            yield
        finally:
            timer.cancel()
        self._silent = False

    def _fall_silent(self) -> None:
        self._silent = True

    async def _find_behind(self, watches: Sequence[StopWatch], asked_us: int) -> list[StopWatch]:
        """Those of whom the manager says what no signal has told: one question for all."""
        rows = await self._manager.list_with_jobs([watch.name for watch in watches])
        self._drain(asked_us)
        if self._lost_us is not None:
            return []  # all of them will be read
        now = {unit.name: (unit, job_path) for unit, job_path in rows}
        return [
            watch
            for watch in watches
            if watch.is_waiting
            and (watch.name not in now or watch.told.is_behind(*now[watch.name]))
        ]

    def _drain(self, asked_us: int) -> None:
        """Take what was sent before the last answer; what changes the contact comes later.

        Args:
            asked_us: When the question was asked, during which a loss in the queue happened.
        """
        for signal in self._later:
            self._note_loss(signal, asked_us)
        while not self._signals.empty():
            signal = self._signals.get_nowait()
            if isinstance(signal, UnitChange | JobChange):
                self._hand_on(signal)
            else:
                self._later.append(signal)
                self._note_loss(signal, asked_us)

    def _note_loss(self, signal: ManagerSignal, asked_us: int) -> None:
        """Note since when nothing is heard, for what is told behind such a signal."""
        if self._lost_us is None and _is_loss(signal):
            silent = isinstance(signal, ConnectionLost) and signal.silent
            self._lost_us = self._heard_us if silent else asked_us


def _is_loss(signal: ManagerSignal) -> bool:
    """Whether a signal says that nothing is heard from then on."""
    if isinstance(signal, ManagerOwner):
        return not signal.present
    if isinstance(signal, ManagerReloading):
        return signal.active
    return isinstance(signal, ConnectionLost)


def _name_loss(reason: str, reloading: bool, later: Iterable[ManagerSignal]) -> str:
    """Why nothing is heard, where the signals that say so may not have been taken yet."""
    for signal in filter(_is_loss, later):
        if reloading:
            reason = "daemon-reexec"
        elif isinstance(signal, ManagerReloading):
            reason, reloading = "daemon-reload", True
        else:
            reason = signal.reason if isinstance(signal, ConnectionLost) else reason or LEFT
    return reason or LEFT
