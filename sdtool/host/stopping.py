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
from sdtool.model.manager import ConnectionLost, ManagerReloading, ManagerSignal
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
    errors: list[SdtoolError] = []
    async with _pumping(manager, signals, active):
        try:
            async with asyncio.timeout(_deadline(active, options)):
                errors += await _request(active, options)
                for watch in active:
                    await watch.wait_for_end()
        except TimeoutError:
            late = [w for w in active if w.requested and not w.finished]
            return errors + [_too_late(watch.name, options) for watch in late]
    return errors + [watch.failure for watch in active if watch.failure is not None]


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

    def end_all(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            for watch in watches:
                watch.crash(error)

    loop = asyncio.get_running_loop()
    files = [(fd, watch) for watch in watches for fd in watch.filenos()]
    tasks = [
        asyncio.create_task(_carry_signals(manager, signals, watches)),
        asyncio.create_task(_carry_time(watches)),
        asyncio.create_task(_check_liveness(watches)),
    ]
    for task in tasks:
        task.add_done_callback(end_all)
    for fd, watch in files:
        loop.add_reader(fd, _read, watch)
    try:
        yield
    finally:
        for fd, _ in files:
            loop.remove_reader(fd)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read(watch: StopWatch) -> None:
    """The event loop would only log what a callback raises, and call it again at once."""
    try:
        watch.read_observers()
    except Exception as error:
        watch.crash(error)


async def _carry_signals(
    manager: Manager, signals: asyncio.Queue[ManagerSignal], watches: Sequence[StopWatch]
) -> None:
    while True:
        signal = await signals.get()
        for watch in watches:
            watch.on_signal(signal)
        if isinstance(signal, ManagerReloading) and not signal.active:
            with contextlib.suppress(SdtoolError):
                await manager.subscribe_again()
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
