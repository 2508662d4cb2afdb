"""A fake org.freedesktop.systemd1: it answers as systemd does, and misbehaves on demand.

It speaks D-Bus on a stream socket, as a client of a broker or as the peer behind a manager's
private socket, from a thread and an event loop of its own. Its messages are marshalled by
dbus-next, whichever library sdtool uses. What a test sets on it holds from the next call on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import io
import itertools
import re
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

NAME = "org.freedesktop.systemd1"
ROOT = "/org/freedesktop/systemd1"
MANAGER = f"{NAME}.Manager"
UNIT = f"{NAME}.Unit"
SERVICE = f"{NAME}.Service"
PROPERTIES = "org.freedesktop.DBus.Properties"

HELLO = b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"
WELCOME = b"DATA\r\nOK 0123456789abcdef0123456789abcdef\r\n"
PATIENCE_S = 10.0

Answer = list[Message]


def encode_path(name: str) -> str:
    """The object path of a unit, after sd_bus_path_encode(3)."""
    encoded = re.sub(rb"^[0-9]|[^A-Za-z0-9]", lambda m: b"_%02x" % ord(m[0]), name.encode())
    return f"{ROOT}/unit/{encoded.decode()}"


def signal(path: str, interface: str, member: str, signature: str, *body: Any) -> Message:
    """A signal that is sent to everybody."""
    return Message.new_signal(path, interface, member, signature, list(body))


def broker_call(member: str, signature: str = "", *body: Any) -> Message:
    """A call of the broker itself."""
    broker, path = "org.freedesktop.DBus", "/org/freedesktop/DBus"
    return Message(broker, path, broker, member, signature=signature, body=list(body))


@dataclass
class FakeUnit:
    """A unit and the way it stops: plain, early, noisy, hangs, canceled, fails or vanishes."""

    name: str
    active_state: str = "active"
    sub_state: str = "running"
    load_state: str = "loaded"
    description: str = "a fake"
    stop: str = "plain"
    result: str = "success"
    changed_us: int = 1
    job: str = ""
    more: dict[str, Variant] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its object path."""
        return encode_path(self.name)

    @property
    def row(self) -> list[Any]:
        """Its row in ListUnits."""
        states = [self.load_state, self.active_state, self.sub_state]
        job = [1, "stop", self.job] if self.job else [0, "", "/"]
        return [self.name, self.description, *states, "", self.path, *job]

    @property
    def properties(self) -> dict[str, Variant]:
        """All its properties, of all its interfaces."""
        return {
            "Id": Variant("s", self.name),
            "Description": Variant("s", self.description),
            "LoadState": Variant("s", self.load_state),
            "ActiveState": Variant("s", self.active_state),
            "SubState": Variant("s", self.sub_state),
            "StateChangeTimestampMonotonic": Variant("t", self.changed_us),
            "InvocationID": Variant("ay", bytes(range(16))),
            "TriggeredBy": Variant("as", []),
            "Result": Variant("s", self.result),
            "MainPID": Variant("u", 0),
            "ControlPID": Variant("u", 0),
            "ControlGroup": Variant("s", ""),
            "KillMode": Variant("s", "control-group"),
            "KillSignal": Variant("i", 15),
            "TimeoutStopUSec": Variant("t", 90_000_000),
            "ExecStop": Variant("a(sasbttttuii)", []),
            "CollectMode": Variant("s", "inactive"),
            "Job": Variant("(uo)", [1, self.job] if self.job else [0, "/"]),
        } | self.more

    def change(self, active_state: str, sub_state: str, result: str = "success") -> Answer:
        """Enter a state and tell it: the Service part comes first, the Unit part second."""
        self.active_state, self.sub_state, self.result = active_state, sub_state, result
        self.changed_us = time.monotonic_ns() // 1000
        if active_state in ("inactive", "failed"):
            self.job = ""
        unit = ("ActiveState", "SubState", "StateChangeTimestampMonotonic")
        return [
            signal(
                self.path,
                PROPERTIES,
                "PropertiesChanged",
                "sa{sv}as",
                interface,
                {name: self.properties[name] for name in names},
                [],
            )
            for interface, names in ((SERVICE, ("Result", "MainPID", "ControlPID")), (UNIT, unit))
        ]


class Wire:
    """D-Bus messages over one stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._serials = itertools.count(1)

    @classmethod
    async def join(cls, address: str) -> Wire:
        """Become a client of a broker."""
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:path="))
        writer.write(HELLO)
        assert b"OK" in await reader.readline() + await reader.readline()
        wire = cls(reader, writer)
        await wire.ask_broker("Hello")
        return wire

    async def ask_broker(self, member: str, signature: str = "", *body: Any) -> Message:
        """Call the broker and take its answer; other messages that come before are dropped."""
        call = broker_call(member, signature, *body)
        self.send(call)
        while True:
            answer = await self.receive()
            if answer.reply_serial == call.serial:
                return answer

    async def receive(self) -> Message:
        """The next message."""
        head = await self._reader.readexactly(16)
        body, _, fields = struct.unpack("<4xIII", head)
        rest = await self._reader.readexactly(fields + -fields % 8 + body)
        return Unmarshaller(io.BytesIO(head + rest)).unmarshall()

    def send(self, *messages: Message) -> None:
        """Send messages in one go."""
        for message in messages:
            message.serial = next(self._serials)
        self._writer.write(b"".join(bytes(message._marshall()) for message in messages))

    def repeat(self, message: Message, count: int) -> None:
        """Send one message many times, marshalled once."""
        message.serial = next(self._serials)
        self._writer.write(bytes(message._marshall()) * count)

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class FakeSystemd:
    """The fake manager; use as a context manager.

    Attributes:
        calls: Every method call it got.
        errors: Member -> (error name, text) that it is answered with.
        silent: Members that are never answered; "*" for all.
        batch: Answer calls of ``Get`` on units only when so many wait; 0 at once.
        peak: The most calls of ``Get`` that waited at a time.
        dies_at: The member at whose call the connection is dropped instead of answered.
        deaf: Whether such a call is not even carried out.
        greetings: What each client of the private socket sent before it was welcomed.
        eager: A signal sent in one write with the welcome.
    """

    def __init__(self, *, address: str | None = None, private: Path | None = None) -> None:
        self._address, self._private = address, private
        self.units: dict[str, FakeUnit] = {}
        self.calls: list[Message] = []
        self.errors: dict[str, tuple[str, str]] = {}
        self.silent: set[str] = set()
        self.batch = self.peak = 0
        self.dies_at = ""
        self.deaf = True
        self.greetings: list[bytes] = []
        self.eager: Message | None = None
        self._held: list[tuple[Wire, Message]] = []
        self._wires: list[Wire] = []
        self._subscribers: set[str | None] = set()
        self._jobs = itertools.count(1)
        self._called: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()))

    # For the tests ---------------------------------------------------------------------------

    def __enter__(self) -> FakeSystemd:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def add(self, *names: str, **settings: Any) -> FakeUnit:
        """Load units; returns the last of them."""
        self.units |= {name: FakeUnit(name, **settings) for name in names}
        return self.units[names[-1]]

    @property
    def members(self) -> Counter[str | None]:
        """How often each member was called."""
        return Counter(call.member for call in self.calls)

    def wait_for(self, member: str) -> None:
        """Wait until a member was called."""
        assert self._called[member].wait(PATIENCE_S)

    async def called(self, member: str) -> None:
        """Wait until a member was called."""
        await asyncio.to_thread(self.wait_for, member)

    async def called_often(self, member: str, times: int) -> None:
        """Wait until a member has been called so often."""
        for _ in range(1000):
            if self.members[member] >= times:
                return
            await asyncio.sleep(0.005)
        raise TimeoutError(f"{member} was called {self.members[member]} times")

    def emit(self, *messages: Message, count: int = 1) -> None:
        """Send signals, from now on in the order of these calls."""
        self._loop.call_soon_threadsafe(
            lambda: [wire.repeat(message, count) for wire in self._wires for message in messages]
        )

    def rejoin(self) -> None:
        """Drop every connection and come back to the broker, as daemon-reexec does."""

        async def rejoin() -> None:
            await self._hang_up()
            await self._join()

        asyncio.run_coroutine_threadsafe(rejoin(), self._loop).result(PATIENCE_S)

    def hang_up(self) -> None:
        """Drop every connection."""
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(PATIENCE_S)

    def job_removed(self, job: str, unit: str, result: str) -> Message:
        """The signal that a job has ended."""
        return signal(ROOT, MANAGER, "JobRemoved", "uoss", 1, job, unit, result)

    # Its life --------------------------------------------------------------------------------

    async def _live(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = None
        if self._private is not None:
            self._private.parent.mkdir(parents=True, exist_ok=True)
            server = await asyncio.start_unix_server(self._welcome, self._private)
        if self._address is not None:
            await self._join()
        self._ready.set()
        await self._over.wait()
        if server is not None:
            server.close()
        await self._hang_up()
        await asyncio.gather(*self._tasks)

    async def _join(self) -> None:
        wire = await Wire.join(self._address or "")
        await wire.ask_broker("RequestName", "su", NAME, 4)
        self._tasks.add(asyncio.create_task(self._serve(wire)))

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = b""
        while not said.endswith(b"BEGIN\r\n") and (part := await reader.read(4096)):
            said += part
        self.greetings.append(said)
        if self.eager is not None:
            self.eager.serial = 1
        writer.write(WELCOME + (bytes(self.eager._marshall()) if self.eager else b""))
        await self._serve(Wire(reader, writer))

    async def _hang_up(self) -> None:
        for wire in self._wires.copy():
            await wire.close()

    async def _serve(self, wire: Wire) -> None:
        self._wires.append(wire)
        try:
            while True:
                message = await wire.receive()
                if message.message_type is MessageType.METHOD_CALL:
                    await self._take(wire, message)
                elif message.message_type is MessageType.METHOD_RETURN:
                    self._answer_held()
        except (asyncio.IncompleteReadError, OSError):
            self._wires.remove(wire)
            await wire.close()

    async def _take(self, wire: Wire, call: Message) -> None:
        self.calls.append(call)
        if call.member == self.dies_at:
            if not self.deaf:
                self._answer(call)
            await wire.close()
        elif self.batch and call.member == "Get" and call.path != ROOT:
            self._held.append((wire, call))
            self.peak = max(self.peak, len(self._held))
            if len(self._held) == self.batch:
                # The broker's answer comes behind every call that it has taken until now.
                wire.send(broker_call("GetId"))
        elif not self.silent & {call.member, "*"}:
            wire.send(*self._answer(call))
        self._called[call.member or ""].set()

    def _answer_held(self) -> None:
        held, self._held = self._held, []
        for wire, call in held:
            wire.send(*self._answer(call))

    # Its answers -----------------------------------------------------------------------------

    def _answer(self, call: Message) -> Answer:
        if call.member in self.errors:
            return [Message.new_error(call, *self.errors[call.member])]
        answers: dict[str, Callable[[Message], Answer]] = {
            "ListUnits": self._list_units,
            "ListUnitsByPatterns": self._list_units,
            "ListUnitsByNames": self._list_by_names,
            "GetAll": self._get_all,
            "Get": self._get,
            "Subscribe": self._subscribe,
            "Ref": lambda call: [Message.new_method_return(call)],
            "Unref": lambda call: [Message.new_method_return(call)],
            "StopUnit": self._stop_unit,
        }
        if call.member not in answers:
            return self._refuse(call, "UnknownMethod", f"Unknown method {call.member}.")
        return answers[call.member](call)

    def _refuse(self, call: Message, error: str, text: str) -> Answer:
        name = error if "." in error else f"org.freedesktop.DBus.Error.{error}"
        return [Message.new_error(call, name, text)]

    def _list_units(self, call: Message) -> Answer:
        patterns = call.body[1] if call.body else ["*"]
        rows = [
            unit.row
            for unit in self.units.values()
            if any(fnmatch.fnmatchcase(unit.name, pattern) for pattern in patterns)
        ]
        return [Message.new_method_return(call, "a(ssssssouso)", [rows])]

    def _list_by_names(self, call: Message) -> Answer:
        absent = {"active_state": "inactive", "sub_state": "dead", "load_state": "not-found"}
        rows = [(self.units.get(name) or FakeUnit(name, **absent)).row for name in call.body[0]]
        return [Message.new_method_return(call, "a(ssssssouso)", [rows])]

    def _find(self, path: str | None) -> FakeUnit | None:
        return next((unit for unit in self.units.values() if unit.path == path), None)

    def _get_all(self, call: Message) -> Answer:
        unit = self._find(call.path)
        if unit is None:
            return self._refuse(call, "UnknownObject", f"Unknown object '{call.path}'.")
        return [Message.new_method_return(call, "a{sv}", [unit.properties])]

    def _get(self, call: Message) -> Answer:
        own = {"Version": Variant("s", "252.4-fake"), "ControlGroup": Variant("s", "/fake")}
        unit = self._find(call.path)
        if unit is None and call.path != ROOT:
            return self._refuse(call, "UnknownObject", f"Unknown object '{call.path}'.")
        value = (unit.properties if unit else own).get(call.body[1])
        if value is None:
            return self._refuse(call, "UnknownProperty", f"Unknown property {call.body[1]}.")
        return [Message.new_method_return(call, "v", [value])]

    def _subscribe(self, call: Message) -> Answer:
        if call.sender and call.sender in self._subscribers:
            text = "Client is already subscribed."
            return self._refuse(call, f"{NAME}.AlreadySubscribed", text)
        self._subscribers.add(call.sender)
        return [Message.new_method_return(call)]

    def _stop_unit(self, call: Message) -> Answer:
        unit = self.units.get(call.body[0])
        if unit is None:
            return self._refuse(call, f"{NAME}.NoSuchUnit", f"Unit {call.body[0]} not loaded.")
        job = unit.job = unit.job or f"{ROOT}/job/{next(self._jobs)}"
        reply = Message.new_method_return(call, "o", [job])
        begin = [
            signal(ROOT, MANAGER, "JobNew", "uos", 1, job, unit.name),
            *unit.change("deactivating", "stop-sigterm"),
        ]
        if unit.stop == "hangs":
            return [*begin, reply]
        if unit.stop == "canceled":
            unit.job = ""
            return [*begin, reply, self.job_removed(job, unit.name, "canceled")]
        failed = unit.stop == "fails"
        states = ("failed", "failed", "timeout") if failed else ("inactive", "dead")
        end = [*unit.change(*states), self.job_removed(job, unit.name, "done")]
        if unit.stop == "early":
            return [*begin, *end, reply]
        if unit.stop == "noisy":
            return [*(begin[1:] * 5), *begin, *(begin[1:] * 5), reply, *(end[:-1] * 10), end[-1]]
        if unit.stop == "vanishes":
            del self.units[unit.name]
            end.append(signal(ROOT, MANAGER, "UnitRemoved", "so", unit.name, unit.path))
        return [*begin, reply, *end]
