"""The one module that speaks systemd's D-Bus API: a ``Manager`` is the way to one of them.

Source: org.freedesktop.systemd1(5). The system's manager or the user's, over the bus or over the
manager's own private socket. It reads, asks for jobs and hands on signals; it draws no
conclusion. What was lost on the way it asks again: to read changes nothing. A job it asks for
once only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from sdtool.errors import (
    BusError,
    NoSuchUnit,
    NotApplicable,
    Unavailable,
)
from sdtool.model.manager import (
    ConnectionLost,
    ConnectionRenewed,
    JobChange,
    ManagerInfo,
    ManagerSignal,
    UnitChange,
)
from sdtool.model.names import unit_path
from sdtool.model.scope import Scope
from sdtool.model.sockets import FdStore, SocketUnit
from sdtool.model.unit import Unit, UnitDetails
from sdtool.sources.bus import (
    BROKER,
    CALL_TIMEOUT_S,
    SYSTEMD,
    BusSignal,
    Connection,
    NoAnswer,
    RemoteError,
    unwrap,
)
from sdtool.sources.messages import (
    ABSENT,
    ALREADY_SUBSCRIBED,
    MANAGER,
    MANAGER_PATH,
    PROPERTIES,
    UNIT,
    parse_details,
    parse_fd_store,
    parse_listens,
    parse_properties_changed,
    parse_signal,
    parse_unit_row,
    translate_error,
)
from sdtool.sources.reach import PAUSE_S, Doors, doors_of, doors_of_user, reach

log = logging.getLogger(__name__)

PATIENCE_S = 3.5
"""How long a question may go unanswered, over however many connections: with the start of
Python, whoever asks is told within five seconds, also where the machine is busy."""

ABSENCE_S = 2.0
"""How long a manager that has left the bus is waited for before another way is tried."""

REFERENCE_S = 0.5
"""How long a reference on a unit is waited for, which is nothing but a help."""

SPENT_S = 5.0
"""How long nothing is asked of a manager that did not answer: patience is spent once."""


class Manager:
    """The way to one service manager; use as an async context manager.

    Attributes:
        info: The manager as it was reached last; the transport can change.
    """

    def __init__(self, doors: Doors, connection: Connection, info: ManagerInfo) -> None:
        self._doors = doors
        self._connection = connection
        self.info = info
        self._gives_references = True
        self._patience_s = PATIENCE_S
        self._renewing = asyncio.Lock()
        self._queue: asyncio.Queue[ManagerSignal] | None = None
        self._unheard_since: float | None = None
        self._failure: NoAnswer | RemoteError | None = None
        self._spent: tuple[float, str] | None = None

    @classmethod
    async def open(cls, scope: Scope) -> Manager:
        """Connect over the bus, or over the manager's private socket where the bus is dead.

        Raises:
            NotBooted: This machine was not booted with systemd.
            AccessDenied: The bus does not let us talk to the manager.
            Unavailable: Nobody answers within about 4 seconds.
        """
        doors = doors_of(scope)
        return cls(doors, *await reach(doors, patience_s=PATIENCE_S))

    @classmethod
    async def open_user(cls, uid: int) -> Manager:
        """Connect as root to the manager of any user, over its private socket.

        Raises:
            Unavailable: Nobody answers within about 4 seconds.
        """
        doors = doors_of_user(uid)
        return cls(doors, *await reach(doors, patience_s=PATIENCE_S))

    async def __aenter__(self) -> Manager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection."""
        await self._connection.close()

    @contextlib.contextmanager
    def patient(self, patience_s: float) -> Iterator[None]:
        """Wait longer, or shorter, for a manager that is out of reach."""
        before, self._patience_s = self._patience_s, patience_s
        try:
            yield
        finally:
            self._patience_s = before

    async def find_again(self) -> None:
        """Wait until the manager answers, over a new connection where the old one has ended.

        Raises:
            Unavailable: It did not come back while patience lasted.
        """
        await self._ask("Get", "ss", [MANAGER, "Version"], interface=PROPERTIES)

    async def _ask(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
        subject: str | None = None,
    ) -> tuple[Any, ...]:
        """Call what only reads, again where the answer was lost, until patience ends."""
        clock = asyncio.get_running_loop().time
        began = clock()
        until = self._until(began, subject)
        while True:
            connection = self._connection
            left_s = min(CALL_TIMEOUT_S, max(until - clock(), PAUSE_S))
            try:
                reply = await connection.call(
                    path, interface, member, signature, body, deadline_s=left_s
                )
            except RemoteError as error:
                if error.name not in ABSENT:
                    self._note_heard()
                    raise translate_error(error.name, error.text, subject) from error
                failure: NoAnswer | RemoteError = error
            except NoAnswer as error:
                failure = error
            else:
                self._note_heard()
                return reply
            log.debug("%s: %s", member, failure)
            # Of many calls that fail for one reason the first to fail tells it best.
            self._failure = self._failure or failure
            self._unheard_since = self._unheard_since or began
            until = self._unheard_since + self._patience_s
            if clock() + PAUSE_S >= until:
                raise self._give_up(subject) from failure
            if isinstance(failure, RemoteError) and clock() < began + ABSENCE_S:
                await asyncio.sleep(PAUSE_S)
            else:
                await self._renew(connection, until, subject)

    def _until(self, now: float, subject: str | None) -> float:
        """When patience ends: it is one for all that is asked while nothing is heard."""
        if self._spent is not None and now < self._spent[0] + SPENT_S:
            raise self._unanswered(self._spent[1], subject)
        if self._spent is not None:
            self._unheard_since = self._spent = None
        return (self._unheard_since or now) + self._patience_s

    def _note_heard(self) -> None:
        self._unheard_since = self._failure = self._spent = None

    def _give_up(self, subject: str | None) -> Unavailable:
        reason = str(self._failure)
        self._spent = (asyncio.get_running_loop().time(), reason)
        return self._unanswered(reason, subject)

    def _unanswered(
        self, reason: str, subject: str | None, silent_s: float | None = None
    ) -> Unavailable:
        return Unavailable(
            f"The {self.info.scope} manager does not answer: {reason}.",
            subject=subject,
            hint="it may be reloading, or the bus was restarted: try again",
            silent_s=silent_s,
        )

    async def _renew(self, broken: Connection, until: float, subject: str | None = None) -> None:
        """Replace a connection that is of no use, with its signals; the first to come does it."""
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout_at(until), self._renewing:
                if self._connection is not broken:
                    return
                reason = str(self._failure)
                await broken.close()
                silent = isinstance(self._failure, NoAnswer) and self._failure.silent_s is not None
                self._tell(ConnectionLost(reason=reason, silent=silent))
                while self._connection.lost is not None:
                    self._connection, self.info = await reach(
                        self._doors, patience_s=until - clock(), was_there=True
                    )
                    if self._queue is not None:
                        with contextlib.suppress(NoAnswer, RemoteError):
                            await self._listen()
                log.info("connected to the %s manager again", self.info.scope)
                self._tell(ConnectionRenewed(reason=reason))
        except (TimeoutError, Unavailable) as error:
            raise self._give_up(subject) from error

    def _tell(self, signal: ManagerSignal) -> None:
        if self._queue is not None:
            self._queue.put_nowait(signal)

    async def list_units(self, patterns: Sequence[str] = ()) -> tuple[Unit, ...]:
        """All loaded units, or those whose name or alias matches one of the globs, by name."""
        if patterns:
            (rows,) = await self._ask("ListUnitsByPatterns", "asas", [[], list(patterns)])
        else:
            (rows,) = await self._ask("ListUnits")
        return tuple(sorted((parse_unit_row(row) for row in rows), key=lambda unit: unit.name))

    async def list_named(self, names: Sequence[str]) -> tuple[Unit, ...]:
        """The units of these very names, loaded or not; one that does not exist is not-found."""
        return tuple(unit for unit, _ in await self.list_with_jobs(names))

    async def list_with_jobs(self, names: Sequence[str]) -> tuple[tuple[Unit, str | None], ...]:
        """The units of these very names, each with the object path of its job."""
        if not names:
            return ()
        (rows,) = await self._ask("ListUnitsByNames", "as", [list(names)])
        return tuple((parse_unit_row(row), row[9] if row[7] else None) for row in rows)

    async def read_unit(self, name: str) -> UnitDetails:
        """One unit with all that a trace or a stop needs.

        Raises:
            NoSuchUnit: There is no such unit file and nothing of that name is active.
        """
        return (await self.read_state(name))[0]

    async def read_state(self, name: str) -> tuple[UnitDetails, UnitChange]:
        """One unit, with its state as if it had just changed to it.

        Raises:
            NoSuchUnit: There is no such unit file and nothing of that name is active.
        """
        # ListUnitsByNames and not LoadUnit: it resolves aliases and loads from disk too, but
        # does not keep the unit loaded.
        (rows,) = await self._ask("ListUnitsByNames", "as", [[name]], subject=name)
        if not rows or (rows[0][2] == "not-found" and rows[0][3] in ("inactive", "")):
            raise NoSuchUnit(
                f"Unit {name} could not be found.",
                subject=name,
                hint="sdtool list --all shows the loaded units",
            )
        unit, path = parse_unit_row(rows[0]), rows[0][6]
        # The empty interface means all of them, in one call.
        (properties,) = await self._ask(
            "GetAll", "s", [""], path=path, interface=PROPERTIES, subject=name
        )
        found = unwrap(properties)
        return parse_details(unit, found), parse_properties_changed(path, found)

    async def read_properties(
        self, units: Sequence[str], properties: Sequence[tuple[str, str]]
    ) -> dict[str, dict[str, Any]]:
        """A few properties of many units, pipelined; a unit that is gone has none.

        Args:
            properties: (interface without its prefix, property): ("Service", "MainPID").
        """
        values: dict[str, dict[str, Any]] = {name: {} for name in units}

        async def read_one(name: str, interface: str, member: str) -> None:
            try:
                (value,) = await self._ask(
                    "Get",
                    "ss",
                    [f"org.freedesktop.systemd1.{interface}", member],
                    path=unit_path(name),
                    interface=PROPERTIES,
                    subject=name,
                )
            except (NoSuchUnit, NotApplicable, BusError):
                return
            values[name][member] = unwrap(value)

        try:
            async with asyncio.TaskGroup() as group:
                for name in units:
                    for interface, member in properties:
                        group.create_task(read_one(name, interface, member))
        except ExceptionGroup as failures:
            # They share one reason, the connection's; a caller expects an error of ours.
            raise failures.exceptions[0] from None
        return values

    async def subscribe(self) -> asyncio.Queue[ManagerSignal]:
        """Ask for the manager's signals; they arrive in the queue in the order they were sent.

        A connection that is lost is renewed by the next question, and the signals with it; the
        queue says both.
        """
        self._queue = asyncio.Queue()
        connection = self._connection
        until = asyncio.get_running_loop().time() + self._patience_s
        try:
            await self._listen()
        except RemoteError as error:
            if error.name not in ABSENT:
                raise translate_error(error.name, error.text, None) from error
            self._failure = error
            await self._renew(connection, until)
        except NoAnswer as error:
            self._failure = error
            await self._renew(connection, until)
        return self._queue

    def unsubscribe(self) -> None:
        """Take no signals any more: nobody reads the queue."""
        self._queue = None

    async def _listen(self) -> None:
        """Have the manager's signals brought over the present connection."""
        connection = self._connection

        def put_away(signal: BusSignal | None) -> None:
            if signal is None:
                self._tell(ConnectionLost(reason=connection.lost or "closed"))
            elif (parsed := parse_signal(signal)) is not None:
                if isinstance(parsed, UnitChange | JobChange):
                    # Whoever takes it from the queue may be busy.
                    parsed = replace(parsed, heard_us=time.monotonic_ns() // 1000)
                self._tell(parsed)

        connection.deliver_signals(put_away)
        if self.info.transport == "bus":
            # The private socket has no broker to filter: everything arrives there.
            sender = f"type='signal',sender='{SYSTEMD}'"
            for rule in (
                f"{sender},path_namespace='{MANAGER_PATH}/unit'",
                f"{sender},interface='{MANAGER}'",
                f"type='signal',sender='{BROKER}',member='NameOwnerChanged',arg0='{SYSTEMD}'",
            ):
                await connection.call(
                    "/org/freedesktop/DBus", BROKER, "AddMatch", "s", [rule], destination=BROKER
                )
        try:
            await connection.call(MANAGER_PATH, MANAGER, "Subscribe")
        except RemoteError as error:
            if error.name != ALREADY_SUBSCRIBED:
                raise

    async def subscribe_again(self) -> None:
        """Have the manager send its signals to us; after a daemon-reexec it has to be told anew.

        Where it has us on its list already, that is what was wanted.
        """
        try:
            await self._ask("Subscribe")
        except BusError as error:
            if error.name != ALREADY_SUBSCRIBED:
                raise

    async def list_socket_units(self) -> tuple[SocketUnit, ...]:
        """Every .socket unit that is loaded, with the addresses that it listens on."""
        units = await self.list_units(["*.socket"])
        idle = {unit.name for unit in units if unit.active_state in ("inactive", "failed")}
        asked = [("Socket", "Listen"), ("Socket", "NetworkNamespacePath")]
        asked += [("Socket", "BindToDevice"), ("Unit", "Triggers")]
        values = await self.read_properties([unit.name for unit in units], asked)
        return tuple(
            SocketUnit(
                name=name,
                listens=parse_listens(found.get("Listen") or ()),
                namespace_path=found.get("NetworkNamespacePath") or None,
                device=found.get("BindToDevice") or None,
                triggers=tuple(found.get("Triggers") or ()),
                is_inactive=name in idle,
            )
            for name, found in values.items()
        )

    async def list_fd_stores(self) -> tuple[FdStore, ...]:
        """Every service for which the manager keeps descriptors, with the sockets among them."""
        names = [unit.name for unit in await self.list_units(["*.service"])]
        values = await self.read_properties(names, [("Service", "NFileDescriptorStore")])
        filled = [name for name, found in values.items() if found.get("NFileDescriptorStore")]
        stores = []
        for name in filled:
            with contextlib.suppress(NoSuchUnit):
                stores.append(FdStore(unit=name, inodes=await self._read_fd_store(name)))
        return tuple(stores)

    async def _read_fd_store(self, name: str) -> frozenset[int] | None:
        """The inodes in a fd store; None where the manager cannot tell (before systemd 254).

        Raises:
            NoSuchUnit: The unit has gone meanwhile.
        """
        try:
            (rows,) = await self._ask("DumpUnitFileDescriptorStore", "s", [name], subject=name)
        except (NotApplicable, BusError) as error:
            log.debug("the fd store of %s: %s", name, error)
            return None
        return parse_fd_store(rows)

    async def ref_unit(self, name: str) -> bool:
        """Keep a unit from being garbage-collected while we look; False when not permitted."""
        if not self._gives_references:
            return False
        try:
            await self._connection.call(unit_path(name), UNIT, "Ref", deadline_s=REFERENCE_S)
        except NoAnswer as error:
            # Polkit decides about it too: one that is frozen costs its deadline once.
            self._gives_references = error.silent_s is None
            log.debug("no reference on %s: %s", name, error)
            return False
        except RemoteError as error:
            log.debug("no reference on %s: %s", name, error)
            return False
        return True

    async def unref_unit(self, name: str) -> None:
        """Let go of a unit that ``ref_unit`` has kept; the end of the connection does so too."""
        try:
            await self._connection.call(unit_path(name), UNIT, "Unref", deadline_s=REFERENCE_S)
        except (RemoteError, NoAnswer) as error:
            log.debug("the reference on %s stays: %s", name, error)

    async def queue_job(
        self, verb: Literal["stop", "start", "restart"], name: str, *, interactive: bool = False
    ) -> str | None:
        """Queue a job (mode replace) and return its object path.

        It is asked for once only. None when the answer was lost with the connection: whether the
        job is queued can be seen by looking at the unit.

        Args:
            interactive: Let polkit ask the user for a password.

        Raises:
            AccessDenied: The manager refused; the ``reason`` says whether a person could help.
            Unavailable: No answer in time (``silent_s``): the manager is frozen, or polkit is, or
                a person who should have entered a password has not.
        """
        connection = self._connection
        try:
            (path,) = await connection.call(
                MANAGER_PATH,
                MANAGER,
                f"{verb.title()}Unit",
                "ss",
                [name, "replace"],
                interactive=interactive,
            )
            return str(path)
        except NoAnswer as error:
            if error.silent_s is not None:
                raise self._unanswered(str(error), name, error.silent_s) from error
            log.debug("%s of %s: %s", verb, name, error)
        except RemoteError as error:
            if error.name not in ABSENT:
                raise translate_error(error.name, error.text, name) from error
            log.debug("%s of %s: %s", verb, name, error)
        return None
