"""One machine, or one service manager of it, observed: the library's API.

``Host`` is the only place where sources meet analysis: it gathers, hands over, returns. Its
methods live in modules by verb: ``units`` (list, trace, pid), ``census`` (list of all managers),
``ports`` (port, ports), ``binding`` (port --bind), ``stopping`` (stop), ``facilities`` (doctor).
A stop stands on ``requesting`` (its job), ``record`` (the kernel's, for all units), ``stopwatch``
(one unit) with ``told``, ``members``, ``lives``, ``ends``, ``observers``, ``lastword`` and
``eventlog``, and ``contact`` (the manager, lost and found). All share a
``session``; ``asking`` keeps several answers in order. What a verb needs is imported when it is
asked for: start-up time is a feature.

    async with Host() as host:
        for report in (await host.stop(["nginx"])).data:
            print(report.verdict, report.verdict_reason)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

from sdtool.model.scope import Scope
from sdtool.model.stop import StopOptions
from sdtool.model.unit import ListFilter

if TYPE_CHECKING:
    import asyncio

    from sdtool.host.eventlog import OnEvents
    from sdtool.host.record import KernelRecord
    from sdtool.host.requesting import Asking
    from sdtool.model.answer import Answer
    from sdtool.model.binding import BindAnswer, BindSpec
    from sdtool.model.facility import Facility
    from sdtool.model.ports import ListeningSocket, PortOwnership, PortSpec
    from sdtool.model.process import ProcessOwner
    from sdtool.model.stop import StopReport
    from sdtool.model.unit import ListedUnit, Trace, UnitDetails

__all__ = ["Host", "ListFilter", "Scope", "StopOptions"]


class Host:
    """This machine through one service manager; use as an async context manager.

    The manager is connected to when a question needs it: ports of system units are answered
    without it, and so also while it is dead.

    Args:
        scope: The system manager, or the calling user's own.
    """

    def __init__(self, scope: Scope = Scope.SYSTEM) -> None:
        from sdtool.host.session import Session

        self._session = Session(scope)

    async def __aenter__(self) -> Host:
        from sdtool.sources.processes import require_proc

        require_proc()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def list(
        self, patterns: Sequence[str] = (), filters: ListFilter | None = None
    ) -> Answer[ListedUnit]:
        """The active and failed units, or those that the filters ask for, by name.

        The notes say of which sockets it is not known whose they are.

        Args:
            patterns: Names and globs as systemctl takes them; none for all units.
            filters: Which of them; the active and failed ones if None.

        Raises:
            InvalidArgument: A pattern is no unit name, or a filter names an unknown unit type.
            AccessDenied: The bus does not let us talk to the manager.
            NoSuchUnit: No loaded unit matches the patterns.
            Unavailable: The manager cannot be reached.
        """
        from sdtool.host.units import list_units

        return await list_units(self._session, patterns, filters or ListFilter())

    async def list_all_managers(
        self, patterns: Sequence[str] = (), filters: ListFilter | None = None
    ) -> Answer[ListedUnit]:
        """The same for the system's manager and every user manager that runs, as root.

        The system's units come first, then those of each user by uid. A user manager that does
        not answer within about 4 seconds is an error beside the others.

        Args:
            patterns: Names and globs as systemctl takes them; none for all units.
            filters: Which of them; the active and failed ones if None.

        Raises:
            InvalidArgument: A pattern is no unit name, a filter names an unknown unit type, or
                this host is about a user manager.
            AccessDenied: We are not root.
            NoSuchUnit: No loaded unit of any manager matches the patterns.
            Unavailable: The system's manager cannot be reached.
        """
        from sdtool.host.census import list_all_managers

        return await list_all_managers(self._session, patterns, filters or ListFilter())

    async def trace(self, units: Sequence[str]) -> Answer[Trace]:
        """Units with their processes and sockets; names and globs as systemctl takes them."""
        from sdtool.host.asking import ask_each, resolve
        from sdtool.host.units import trace_unit

        names = await resolve(self._session, units)
        return await ask_each(names, lambda name: trace_unit(self._session, name))

    async def port(
        self, specs: Sequence[PortSpec], *, all_holders: bool = False
    ) -> Answer[PortOwnership]:
        """Which unit owns each port; two entries where tcp and udp both have something.

        Args:
            all_holders: Look at every process, also where those of the creator hold the socket:
                who else has a descriptor of it keeps the port too. And for what is merely bound
                where somebody listens. It costs 50 us a process.
        """
        from sdtool.host.ports import own_ports

        return await own_ports(self._session, specs, all_holders=all_holders)

    async def bindable(self, specs: Sequence[BindSpec]) -> Answer[BindAnswer]:
        """Whether we could bind each, and listen, now and in our own network namespace."""
        from sdtool.host.asking import ask_each
        from sdtool.host.binding import try_bind

        return await ask_each(specs, lambda spec: try_bind(self._session, spec))

    async def ports(
        self, units: Sequence[str] = (), *, unix: bool = False
    ) -> Answer[ListeningSocket]:
        """Every listening socket by unit, or those of the units.

        A unit of which none is found, and that may have one whose owner is unknown, is an error.

        Args:
            unix: AF_UNIX sockets instead of those with a port.
        """
        from sdtool.host.asking import ask_each, resolve
        from sdtool.host.ports import own_listeners, own_listeners_of
        from sdtool.model.answer import Answer

        if not units:
            return await own_listeners(self._session, unix=unix)
        names = await resolve(self._session, units)
        known = await ask_each(names, self._read_unit)
        if not known.data:
            return Answer(errors=known.errors)
        found = await own_listeners_of(self._session, known.data, unix=unix)
        return Answer(data=found.data, errors=known.errors + found.errors, notes=found.notes)

    async def _read_unit(self, name: str) -> UnitDetails:
        """A unit that exists, under its Id; aliases are other names."""
        return await (await self._session.manager()).read_unit(name)

    async def pid(self, pids: Sequence[int]) -> Answer[ProcessOwner]:
        """Who manages each process."""
        from sdtool.host.asking import ask_each
        from sdtool.host.units import explain_pid

        return await ask_each(pids, lambda pid: explain_pid(self._session, pid))

    async def resolve(self, units: Sequence[str]) -> Answer[str]:
        """The names that arguments stand for: globs expanded, ``.service`` implied."""
        from sdtool.host.asking import resolve, split

        return split(await resolve(self._session, units))

    async def complete(self, prefix: str) -> tuple[str, ...]:
        """The loaded units whose names begin so."""
        manager = await self._session.manager()
        return tuple(unit.name for unit in await manager.list_units([f"{prefix}*"]))

    async def stop(
        self,
        units: Sequence[str],
        options: StopOptions | None = None,
        *,
        on_events: OnEvents | None = None,
        on_request: Callable[[str], None] | None = None,
        asking: Asking | None = None,
        interrupt: asyncio.Event | None = None,
        record: KernelRecord | None = None,
    ) -> Answer[StopReport]:
        """Stop units, all at once, and observe them until their jobs are done.

        As root, outside of containers, a SIGCONT to ourselves tries out what the kernel records.
        Cancelling stops the watch, not the jobs, and leaves no answer: ``interrupt`` does. One
        stop at a time: a second one on the same host would take the first one's signals. A unit
        that could not be stopped, or not watched to its end, is an error of the answer, beside
        the reports of the others.

        Args:
            units: Names and globs as systemctl takes them.
            options: How to stop; the defaults of ``StopOptions`` if None.
            on_events: Called with events about 50 ms after they happened, in the order of
                their times; what is learnt only later, after a gap say, comes later.
            on_request: Called with the name of each unit just before its stop is asked for.
            asking: Entered with a unit's name while polkit may ask a person about it, so that
                an agent can be there and the screen free; see ``StopOptions.interactive``.
                It says why there is no agent, for the refusal; None where there is one.
            record: Opened already, by who had something else to do meanwhile; closed by whoever
                opened it. None to have it opened here.
            interrupt: Set it, after the first ``on_request``, to end the watch within about half
                a second: units whose jobs are over by then have their reports, each other is an
                ``Interrupted`` error, which says what is known of its job.

        Raises:
            AccessDenied: We may not ask what a glob stands for, or have the manager's signals.
            Unavailable: The manager does not answer to those, before any stop is asked for.
        """
        from sdtool.host.record import KernelRecord

        options = options or StopOptions()
        # The kernel takes its time to begin, and we have enough to do meanwhile.
        opening = nullcontext(record) if record else KernelRecord(options.observers)
        with opening as record:
            import asyncio

            from sdtool.host.asking import resolve
            from sdtool.host.stopping import stop_units

            return await stop_units(
                self._session,
                await resolve(self._session, units),
                options,
                on_events or (lambda _: None),
                on_request or (lambda _: None),
                asking or (lambda _: nullcontext()),
                interrupt or asyncio.Event(),
                record,
            )

    async def doctor(self) -> tuple[Facility, ...]:
        """What can be seen here, and why not; never raises for what is missing."""
        from sdtool.host.facilities import read_facilities

        return await read_facilities(self._session)
