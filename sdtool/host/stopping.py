"""stop: several units at once, each watched from before its job to after its end.

The order is the point: everything that observes is armed before StopUnit is called, so nothing
that happens at once is missed. Then signals of the manager, exits, cgroup changes and destroyed
sockets are collected as they come, the kernel's record is read every 20 ms, or where there is none
the cgroup walked for new processes, and what was gathered goes to ``analysis.timeline``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial

from sdtool.analysis import phases, protection, timeline
from sdtool.analysis.events import sort_events
from sdtool.analysis.phases import ENDED
from sdtool.errors import DeadlineExceeded, Interrupted, NotApplicable, SdtoolError
from sdtool.host import contact
from sdtool.host.asking import split
from sdtool.host.eventlog import HOLD_BACK_US, OnEvents, now_us
from sdtool.host.record import KernelRecord
from sdtool.host.requesting import Asking, request_stop
from sdtool.host.session import Session
from sdtool.host.stopwatch import StopWatch
from sdtool.model.answer import Answer
from sdtool.model.manager import ManagerGap
from sdtool.model.scope import Scope
from sdtool.model.stop import INFINITY, StopOptions, StopReport
from sdtool.model.unit import UnitDetails
from sdtool.sources import cgroups
from sdtool.sources.reach import read_manager_pid
from sdtool.sources.systemd import Manager

RESCAN_S = 0.020
MARGIN_S = 30.0

FAREWELL_S = 1.0
"""How long an interrupt is put off at most, for the reports of the units whose jobs are over."""

LAST_LOOK_S = 5.0
"""The same for a deadline: somewhat longer than the manager is asked for its last word."""


async def stop_units(
    session: Session,
    names: Sequence[str | SdtoolError],
    options: StopOptions,
    on_events: OnEvents,
    on_request: Callable[[str], None],
    asking: Asking,
    interrupt: asyncio.Event,
    record: KernelRecord,
) -> Answer[StopReport]:
    """Stop the units and report on each in the order asked; a refusal is an error.

    Args:
        record: The kernel's own, opened already.
    """
    entries: dict[str, StopWatch | SdtoolError] = {}
    try:
        for number, name in enumerate(names):
            entry = await _prepare(session, name, options, record)
            # A unit under two names is stopped, and reported, once.
            key = entry.name if isinstance(entry, StopWatch) else str(number)
            if entries.setdefault(key, entry) is not entry:
                for double in _with_along(_watches([entry])):
                    double.close()
        watched = set(entries)
        for watch in _watches(entries.values()):
            watch.leave_out(watched)
            watched |= {other.name for other in watch.along}
        watches = _watches(entries.values())
        clock = _Clock(options, interrupt)
        await _watch(session, watches, record, clock, on_events, on_request, asking)
        return split([_outcome(entry) for entry in entries.values()])
    finally:
        for watch in _with_along(_watches(entries.values())):
            watch.close()


def _watches(entries: Iterable[StopWatch | SdtoolError]) -> list[StopWatch]:
    return [entry for entry in entries if isinstance(entry, StopWatch)]


def _with_along(watches: Iterable[StopWatch]) -> list[StopWatch]:
    return [each for watch in watches for each in (watch, *watch.along)]


async def _prepare(
    session: Session, name: str | SdtoolError, options: StopOptions, record: KernelRecord
) -> StopWatch | SdtoolError:
    """Look at a unit and at what goes down with it; the error where it must not be stopped."""
    if isinstance(name, SdtoolError):
        return name
    try:
        manager = await session.manager()
        details = await manager.read_unit(name)
        along = await _read_along(manager, details)
        own = cgroups.read_process_cgroup("self") or "/"
        if not options.force:
            protection.require_stoppable(details.unit.name, (d.unit.name for d in along), own)
        if not details.can_stop:
            sentence = f"{details.unit.name} cannot be stopped (CanStop=no)."
            raise NotApplicable(sentence, subject=name)
        make = partial(StopWatch, session, manager, wanted=options.observers, record=record)
        return make(details, [make(other, ()) for other in along])
    except SdtoolError as error:
        return error


def _outcome(entry: StopWatch | SdtoolError) -> StopReport | SdtoolError:
    if isinstance(entry, SdtoolError):
        return entry
    return timeline.build(entry.record()) if entry.failure is None else entry.failure


async def _read_along(manager: Manager, details: UnitDetails) -> tuple[UnitDetails, ...]:
    """The active units that go down with this one, and with those, and so on."""
    known = {details.unit.name: details}
    waiting = details.stops_along
    while waiting:
        units = await manager.list_named([name for name in waiting if name not in known])
        active = [unit.name for unit in units if unit.active_state not in ENDED]
        found = [await manager.read_unit(name) for name in active]
        known |= {other.unit.name: other for other in found}
        waiting = tuple(name for other in found for name in other.stops_along)
    del known[details.unit.name]
    return tuple(known.values())


async def _watch(
    session: Session,
    watches: Sequence[StopWatch],
    record: KernelRecord,
    clock: _Clock,
    on_events: OnEvents,
    on_request: Callable[[str], None],
    asking: Asking,
) -> None:
    """Arm everything, ask for the stops, and stay until all of them are over."""
    active = [watch for watch in watches if not watch.finished]
    if not active:
        return
    manager = await session.manager()
    everyone = _with_along(active)
    asking = partial(clock.stopped, asking)
    with manager.patient(contact.RETURN_S):
        signals = await manager.subscribe()
        for watch in everyone:
            await watch.hold()
            await watch.find_listeners()
        _attach(record, everyone, session.scope)
        for watch in everyone:
            watch.arm()
            record.pump(now_us())

        def on_policy() -> None:
            clock.on_policy()
            record.record_signals(_signals_of(everyone))

        keeper = contact.Contact(manager, signals, everyone, on_policy)
        async with _pumping(keeper, everyone, record, on_events):
            try:
                async with clock.running(active):
                    await _request(session, active, clock.options, on_request, asking)
                    await asyncio.gather(*(watch.wait_for_end() for watch in active))
            except TimeoutError:
                if not clock.limit.expired():
                    raise
                await _give_up(active, clock, keeper, session.scope)
            # It takes a while, and the report does too.
            record.close()
        manager.unsubscribe()
        for watch in everyone:
            await watch.let_go()
    _hand_on(everyone, now_us(), on_events)


def _attach(record: KernelRecord, watches: Sequence[StopWatch], scope: Scope) -> None:
    """Have the kernel's record tell each watch of its processes."""
    groups = {watch.control_group: watch.name for watch in watches if watch.control_group}
    signals = _signals_of(watches)
    by_name = {watch.name: watch for watch in watches}
    record.attach(by_name, groups, signals, read_manager_pid(scope))


def _signals_of(watches: Sequence[StopWatch]) -> frozenset[str]:
    """All that may be sent to any of them."""
    return frozenset[str]().union(*(watch.signals for watch in watches))


def _hand_on(watches: Sequence[StopWatch], until_us: int, on_events: OnEvents) -> None:
    """Hand on what happened to any of the units until then, in the order it happened."""
    ready = [event for watch in watches for event in watch.take_events(until_us)]
    if ready:
        on_events(sort_events(ready))


class _Clock:
    """The end of a stop's watch: an interrupt, or a deadline.

    That is the caller's, or one by systemd's limits, which a reload can change.

    Attributes:
        options: How the units are stopped.
        limit: Passes when the watch ends.
        interrupted: It was not the deadline that ended it.
        asked_about: The unit that a person is asked about, or was when the watch ended.
    """

    def __init__(self, options: StopOptions, interrupt: asyncio.Event) -> None:
        self.options = options
        self._interrupt = interrupt
        self._watches: Sequence[StopWatch] = ()
        self._now = asyncio.get_running_loop().time
        self._goes = False
        self.limit = asyncio.timeout(None)
        self.asked_about: str | None = None

    @property
    def interrupted(self) -> bool:
        """Whether somebody wants the watch to end; a deadline has no say any more then."""
        return self._interrupt.is_set()

    @contextlib.asynccontextmanager
    async def running(self, watches: Sequence[StopWatch]) -> AsyncIterator[None]:
        """Watch until the end: count from now on, and heed the interrupt."""
        self._watches = watches
        heeding = asyncio.create_task(self._heed())
        try:
            async with self.limit:
                self._set()
                yield
        finally:
            heeding.cancel()

    async def _heed(self) -> None:
        await self._interrupt.wait()
        if not self.limit.expired():
            self.limit.reschedule(self._now())

    def _set(self) -> None:
        """Count from now on."""
        self._goes = True
        seconds = _deadline(self._watches, self.options)
        self._reschedule(None if seconds is None else self._now() + seconds)

    def _reschedule(self, when: float | None) -> None:
        if not self.interrupted and not self.limit.expired():
            self.limit.reschedule(when)

    def on_policy(self) -> None:
        """Count anew by systemd's limits, of which one has changed."""
        if self._goes and self.options.deadline_s is None:
            self._set()

    @contextlib.asynccontextmanager
    async def stopped(self, asking: Asking, unit: str) -> AsyncIterator[str | None]:
        """Ask a person; the time that takes has a deadline of its own, and is not the stop's."""
        began, when, self._goes = self._now(), self.limit.when(), False
        self.asked_about = unit
        self._reschedule(None)
        try:
            async with asking(unit) as lack:
                yield lack
            if not self.interrupted:
                self.asked_about = None
        finally:
            if self.options.deadline_s is None:
                self._set()
            elif when is not None:
                self._goes = True
                self._reschedule(when + self._now() - began)


async def _request(
    session: Session,
    watches: Sequence[StopWatch],
    options: StopOptions,
    on_request: Callable[[str], None],
    asking: Asking,
) -> None:
    """Ask for all the stops; a unit may be on its way down with the first of them."""
    for watch in _with_along(watches):
        watch.told.begin()
    for number, watch in enumerate(watches, start=1):
        if watch.failure is not None:
            continue  # the manager was lost while another unit was asked about
        on_request(watch.name)
        later = watches[number:]
        await request_stop(session, watch, later, asking, interactive=options.interactive)


def _deadline(watches: Sequence[StopWatch], options: StopOptions) -> float | None:
    """Seconds to wait: the caller's, else what systemd's own limits add up to."""
    if options.deadline_s is not None:
        return options.deadline_s
    longest = 0.0
    for watch in watches:
        policies = [each.told.policy for each in (watch, *watch.along) if each.told.policy]
        for limit in map(phases.worst_case, policies):
            if limit == INFINITY:
                return None
            longest += limit / 1_000_000
    return longest + MARGIN_S


async def _give_up(
    watches: Sequence[StopWatch], clock: _Clock, keeper: contact.Contact, scope: Scope
) -> None:
    """End the watch: a unit whose job is over is finished, which takes a moment."""
    began = asyncio.get_running_loop().time()
    until = began + contact.SILENCE_S if clock.interrupted else None
    for watch in watches:
        if watch.name == clock.asked_about and not watch.is_over:
            watch.failure = None  # that it needs a person, who was being asked
    late = [watch for watch in watches if not watch.finished and watch.failure is None]
    gap = await keeper.look()
    if gap is not None:
        until = 0.0
    with contextlib.suppress(TimeoutError):
        # One that is down can pull another along at the last moment.
        async with asyncio.timeout_at(began + (FAREWELL_S if clock.interrupted else LAST_LOOK_S)):
            await asyncio.gather(*(watch.wait_for_end(until) for watch in late if watch.is_down))
    for watch in late:
        if not watch.finished and watch.failure is None:
            watch.failure = _cut_short(watch, clock, gap, scope)


def _cut_short(
    watch: StopWatch, clock: _Clock, gap: ManagerGap | None, scope: Scope
) -> SdtoolError:
    """Why there is no report, and what is known of the job."""
    kind = Interrupted if clock.interrupted else DeadlineExceeded
    say = _interrupted if clock.interrupted else _too_late
    user = " --user" if scope is Scope.USER else ""
    hint = f"systemctl{user} list-jobs, or sdtool trace{user} {watch.name}"
    may_go_on = watch.told.queued or (gap is not None and watch.told.requested)
    return kind(say(watch, clock, gap), subject=watch.name, hint=hint if may_go_on else None)


def _interrupted(watch: StopWatch, clock: _Clock, gap: ManagerGap | None) -> str:
    name, told = watch.name, watch.told
    if watch.is_down:
        return f"Interrupted when the stop job of {name} was over: the rest was not looked at."
    if not told.requested and not told.has_job:
        return f"Interrupted before {name} was asked to stop."
    if gap is not None:
        return (
            f"No longer watching; whether {name} has stopped, or its stop job goes on, "
            f"is not known: {_away(gap)}."
        )
    if name == clock.asked_about and not told.queued:
        return f"Interrupted before {name} was authorized to stop."
    if told.requested and told.job is None:
        return f"No longer watching; {name} was asked to stop, and the answer was not waited for."
    return f"No longer watching; {_unfinished(watch)} still stopping, and the stop job goes on."


def _too_late(watch: StopWatch, clock: _Clock, gap: ManagerGap | None) -> str:
    name, deadline_s = watch.name, clock.options.deadline_s
    after = f"{deadline_s:g} s" if deadline_s else "all of systemd's own limits"
    if not watch.told.requested:
        return f"{name} was not asked to stop: {after} had passed."
    if gap is not None:
        return (
            f"Whether {name} has stopped, or its stop job goes on, is not known after {after}: "
            f"{_away(gap)}."
        )
    if not watch.told.queued:
        return f"{name} was asked to stop, and had no job after {after}."
    if watch.is_down:
        return f"The stop job of {name} was over after {after}: the rest was not looked at."
    return f"{_unfinished(watch)} still stopping after {after}; the stop job goes on."


def _away(gap: ManagerGap) -> str:
    away_s = (gap.until_us - gap.since_us) / 1_000_000
    return f"the manager has been out of reach for {away_s:.1f} s ({gap.reason})"


def _unfinished(watch: StopWatch) -> str:
    """Who is: the unit itself, or those only that go down along with it."""
    if not watch.told.over.is_set():
        return f"{watch.name} is"
    names = [w.name for w in watch.along if w.is_waiting]
    return f"{watch.name} has stopped; along with it {', '.join(names)} is"


@contextlib.asynccontextmanager
async def _pumping(
    keeper: contact.Contact,
    watches: Sequence[StopWatch],
    record: KernelRecord,
    on_events: OnEvents,
) -> AsyncIterator[None]:
    """Carry signals, observers' events and the passing of time to the watches."""

    def end_all(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            for watch in watches:
                watch.crash(error)

    loop = asyncio.get_running_loop()
    files = [(fd, watch) for watch in watches for fd in watch.filenos()]
    tasks = [
        asyncio.create_task(keeper.keep()),
        asyncio.create_task(_carry_time(watches, record, on_events)),
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


async def _carry_time(
    watches: Sequence[StopWatch], record: KernelRecord, on_events: OnEvents
) -> None:
    """The tick: the kernel's record, new processes, and events whose hold-back is over."""
    while True:
        record.pump(now_us())
        for watch in watches:
            watch.on_tick()
        _hand_on(watches, now_us() - HOLD_BACK_US, on_events)
        await asyncio.sleep(RESCAN_S)
