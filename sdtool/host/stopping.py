"""stop: several units at once, each watched from before its job to after its end.

The order is the point: everything that observes is armed before StopUnit is called, so nothing
that happens at once is missed. Then signals of the manager, exits, cgroup changes and destroyed
sockets are collected as they come, the cgroup is walked again every 20 ms for new processes, and
what was gathered goes to ``analysis.timeline``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sdtool.analysis import phases, protection, timeline
from sdtool.errors import DeadlineExceeded, SdtoolError, Unavailable
from sdtool.host.eventlog import OnEvents, now_us
from sdtool.host.session import Session
from sdtool.host.stopwatch import StopWatch
from sdtool.model.answer import Answer
from sdtool.model.manager import ConnectionLost, ManagerSignal
from sdtool.model.stop import INFINITY, StopReport
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups
from sdtool.sources.systemd import Manager

RESCAN_S = 0.020
LIVENESS_S = 1.0
MARGIN_S = 30.0
MAX_ALONG = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOptions:
    """How to stop.

    Attributes:
        deadline_s: Seconds after which the watch is given up; None waits as long as systemd may
            take by its own limits, which can be for ever.
        force: Stop critical units too.
        interactive: Let polkit ask for a password on this terminal.
        observers: Names of the observers to use; None for all (see ``stopwatch.OBSERVERS``).
    """

    deadline_s: float | None = None
    force: bool = False
    interactive: bool = False
    observers: frozenset[str] | None = None


async def stop_units(
    session: Session,
    names: Sequence[str],
    options: StopOptions,
    on_events: OnEvents,
) -> Answer[StopReport]:
    """Stop the units and report on each; a unit that cannot be stopped is an error."""
    if not names:
        return Answer()
    manager = await session.manager()
    watches: list[StopWatch] = []
    errors: list[SdtoolError] = []
    try:
        for name in names:
            try:
                details = await manager.read_unit(name)
                protection.require_stoppable(details.unit.name, _own_cgroup(), options.force)
                along = await _read_along(manager, details)
                watches.append(
                    StopWatch(session.mount, manager, details, along, options.observers)
                )
            except SdtoolError as error:
                errors.append(error)
        errors += await _watch(manager, watches, options, on_events)
        return Answer(
            data=tuple(timeline.build(w.record()) for w in watches if w.finished),
            errors=tuple(errors),
        )
    finally:
        for watch in watches:
            watch.close()


def _own_cgroup() -> str:
    return cgroups.read_process_cgroup("self") or "/"


async def _read_along(manager: Manager, details: UnitDetails) -> tuple[UnitDetails, ...]:
    """The active units that go down with this one, and with those, and so on."""
    known: dict[str, UnitDetails] = {}
    waiting = list(details.stops_along)
    while waiting and len(known) < MAX_ALONG:
        name = waiting.pop(0)
        if name in known or name == details.unit.name:
            continue
        with contextlib.suppress(SdtoolError):
            other = await manager.read_unit(name)
            if other.unit.active_state not in ("inactive", "failed"):
                known[name] = other
                waiting += other.stops_along
    return tuple(known.values())


async def _watch(
    manager: Manager,
    watches: Sequence[StopWatch],
    options: StopOptions,
    on_events: OnEvents,
) -> list[SdtoolError]:
    """Arm everything, ask for the stops, and stay until all of them are over."""
    active = [watch for watch in watches if not watch.finished]
    if not active:
        return []
    signals = await manager.subscribe()
    for watch in active:
        await watch.arm(on_events)
    async with _pumping(manager, signals, active):
        errors = await _request(active, options)
        running = [watch for watch in active if watch.requested]
        try:
            async with asyncio.timeout(_deadline(running, options)):
                for watch in running:
                    await watch.wait_for_end()
        except TimeoutError:
            return errors + [_too_late(w.name, options) for w in running if not w.finished]
        for watch in running:
            if watch.failure is not None:
                errors.append(watch.failure)
    return errors


async def _request(watches: Sequence[StopWatch], options: StopOptions) -> list[SdtoolError]:
    errors: list[SdtoolError] = []
    for watch in watches:
        try:
            await watch.request(interactive=options.interactive)
        except SdtoolError as error:
            errors.append(error)
    return errors


def _deadline(watches: Sequence[StopWatch], options: StopOptions) -> float | None:
    """Seconds to wait: the caller's, else what systemd's own limits add up to."""
    if options.deadline_s is not None:
        return options.deadline_s
    longest = 0.0
    for watch in watches:
        policies = [policy for policy in (watch.policy, *watch.along_policies) if policy]
        for limit in map(phases.worst_case, policies):
            if limit == INFINITY:
                return None
            longest += limit / 1_000_000
    return longest + MARGIN_S


def _too_late(name: str, options: StopOptions) -> DeadlineExceeded:
    after = f"{options.deadline_s:g} s" if options.deadline_s else "all of systemd's own limits"
    return DeadlineExceeded(
        f"{name} is still stopping after {after}; the stop job goes on.",
        subject=name,
        hint=f"systemctl list-jobs, or sdtool trace {name}",
    )


@contextlib.asynccontextmanager
async def _pumping(
    manager: Manager, signals: asyncio.Queue[ManagerSignal], watches: Sequence[StopWatch]
) -> AsyncIterator[None]:
    """Carry signals, observers' events and the passing of time to the watches."""
    loop = asyncio.get_running_loop()
    files = [(fd, watch) for watch in watches for fd in watch.filenos()]
    tasks = [
        asyncio.create_task(_carry_signals(signals, watches)),
        asyncio.create_task(_carry_time(watches)),
        asyncio.create_task(_check_liveness(watches)),
    ]
    for fd, watch in files:
        loop.add_reader(fd, watch.read_observers)
    try:
        yield
    finally:
        for fd, _ in files:
            loop.remove_reader(fd)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _carry_signals(
    signals: asyncio.Queue[ManagerSignal], watches: Sequence[StopWatch]
) -> None:
    while True:
        signal = await signals.get()
        for watch in watches:
            watch.on_signal(signal)
        if isinstance(signal, ConnectionLost):
            return


async def _carry_time(watches: Sequence[StopWatch]) -> None:
    """The tick: new processes, and events whose hold-back is over."""
    while True:
        for watch in watches:
            watch.on_tick(now_us())
        await asyncio.sleep(RESCAN_S)


async def _check_liveness(watches: Sequence[StopWatch]) -> None:
    """Ask now and then: a signal can be lost (daemon-reexec), a manager can freeze."""
    while True:
        await asyncio.sleep(LIVENESS_S)
        for watch in watches:
            try:
                await watch.check()
            except Unavailable as error:
                watch.fail(error)
