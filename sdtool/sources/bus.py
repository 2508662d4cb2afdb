"""One D-Bus connection: SASL, calls with a deadline, signals in a queue, and its end noticed.

The only module that knows a D-Bus library. It speaks low-level messages, with dbus-next or, when
installed, dbus-fast (``SDTOOL_DBUS=next|fast`` forces one). What the messages mean is
``sources.systemd``'s business.

Every rule here was paid for: a call after a disconnect never returns, an end of file during SASL
spins, a frozen broker hangs the connect, over 128 pending calls are refused by the broker, and a
broker passes on a signal that anybody sends straight to us in the manager's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtool.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from dbus_next.aio.message_bus import MessageBus
    from dbus_next.message import Message

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 64
CALL_TIMEOUT_S = 3.5
INTERACTIVE_TIMEOUT_S = 120.0

STOOD_STILL_S = 0.25
"""A deadline that passes so late was not watched: this process was stopped meanwhile."""

READ_S = 0.25
"""How long an answer that came meanwhile may take to be read."""

MAX_GREETING = 4096

BROKER = "org.freedesktop.DBus"
SYSTEMD = "org.freedesktop.systemd1"


class RemoteError(Exception):
    """The other side answered with a D-Bus error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


class NoAnswer(Exception):
    """The connection could not be made, ended, or a call passed its deadline.

    Attributes:
        may_pass: A bus that starts, or a manager that does, can be the reason: ask again.
        silent_s: The deadline that passed while the connection stood: whoever was asked thinks
            about it. None where it was something else.
    """

    def __init__(
        self, reason: str, *, may_pass: bool = True, silent_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.may_pass = may_pass
        self.silent_s = silent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BusSignal:
    """One signal message; ``body`` holds variants already unwrapped one level."""

    path: str
    interface: str
    member: str
    body: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """The D-Bus library in use: its name and the four things that we take from it."""

    name: str
    message: Any
    message_type: Any
    message_flag: Any
    message_bus: Any


def load_library(environ: Mapping[str, str] = os.environ) -> Library:
    """Import dbus-fast where it is installed, else dbus-next.

    Raises:
        InvalidArgument: ``SDTOOL_DBUS`` is neither next nor fast.
        Unavailable: dbus-fast is forced and not installed.
    """
    wanted = environ.get("SDTOOL_DBUS") or None
    if wanted not in (None, "next", "fast"):
        raise InvalidArgument(f"SDTOOL_DBUS={wanted} is neither next nor fast.")
    if wanted != "next":
        try:
            return _import_library("dbus_fast")
        except ImportError as error:
            if wanted == "fast":
                raise Unavailable(
                    "SDTOOL_DBUS=fast, but dbus-fast cannot be imported.",
                    hint="pip install 'sdtool[fast]'",
                ) from error
    return _import_library("dbus_next")


def _import_library(package: str) -> Library:
    constants = importlib.import_module(f"{package}.constants")
    return Library(
        package.replace("_", "-"),
        importlib.import_module(f"{package}.message").Message,
        constants.MessageType,
        constants.MessageFlag,
        _bus_class(importlib.import_module(f"{package}.aio.message_bus").MessageBus),
    )


def _bus_class(base: Any) -> Any:
    """The library's MessageBus with a SASL exchange of our own and a connect that cannot hang."""

    class Bus(base):  # type: ignore[misc]
        async def _authenticate(self) -> None:
            # Everything in one write, as sd-bus does. When the first message lands in the same
            # read as BEGIN, PID 1's private socket ignores it until more bytes come: so wait for
            # both reply lines before anything else is sent. Read them byte by byte: on a private
            # socket a signal can follow in the same moment, and it is the message reader's.
            hello = b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"
            await self._loop.sock_sendall(self._sock, hello)
            reply = b""
            while reply.count(b"\r\n") < 2:
                part = await self._loop.sock_recv(self._sock, 1)
                if not part or len(reply) > MAX_GREETING:
                    raise EOFError("the bus hung up during authentication")
                reply += part
            if b"\r\nOK " not in reply:
                raise ConnectionError("the bus refused the authentication")

        def send(self, message: Any) -> Any:
            try:
                sent = super().send(message)
            except OSError:
                # dbus-fast: the write has failed, all who wait were told, and then the dead
                # descriptor was to be watched; that second failure is nobody's business.
                sent = self._writer.fut
            # For a call nobody awaits this future: its exception would be logged as never seen.
            sent.add_done_callback(lambda done: done.cancelled() or done.exception())
            return sent

    if base.__module__.startswith("dbus_next"):
        Bus._setup_socket = _setup_socket
    return Bus


def _setup_socket(bus: Any) -> None:
    """Connect without blocking: dbus-next's own connect(2) waits for a full backlog for ever."""
    failure: Exception = ConnectionError("the bus address names no unix socket")
    for transport, options in bus._bus_address:
        name = options.get("path") or "\0" + options.get("abstract", "")
        if transport != "unix" or name == "\0":
            continue
        bus._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            bus._sock.connect(name)
        except (OSError, ValueError) as error:
            bus._sock.close()
            failure = error
            continue
        bus._stream = bus._sock.makefile("rwb")
        bus._fd = bus._sock.fileno()
        return
    raise failure


class Connection:
    """An authenticated connection to a message bus, or straight to a manager's private socket.

    Not to be shared between event loops. Close it: the libraries leak descriptors otherwise.
    """

    def __init__(self, library: Library, bus: MessageBus) -> None:
        self.library = library
        self._bus = bus
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._deadlines: set[asyncio.Timeout] = set()
        self._sink: Callable[[BusSignal | None], None] | None = None
        self._lost: str | None = None
        self._manager: str | None = None
        bus.add_message_handler(self._on_message)
        self._watch = asyncio.create_task(self._watch_for_loss())

    @classmethod
    async def open(cls, address: str, *, deadline_s: float) -> Connection:
        """Connect to ``address`` (D-Bus syntax) within ``deadline_s`` seconds.

        Raises:
            NoAnswer: Nobody listens, or the other side does not answer in time.
        """
        library = load_library()
        bus = None
        try:
            async with asyncio.timeout(deadline_s):
                bus = library.message_bus(bus_address=address)
                await bus.connect()
        except TimeoutError as error:
            _release(bus)
            raise NoAnswer(f"{address} does not answer") from error
        except Exception as error:
            # The libraries let any exception through: OSError, EOFError, AuthError, even
            # AttributeError when the address is strange. For us all mean the same.
            _release(bus)
            raise NoAnswer(f"{address}: {_reason(error)}", may_pass=_passes(error)) from error
        except BaseException:
            _release(bus)
            raise
        return cls(library, bus)

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        destination: str = SYSTEMD,
        deadline_s: float = CALL_TIMEOUT_S,
        interactive: bool = False,
    ) -> tuple[Any, ...]:
        """Call a method and return the body of its reply.

        Args:
            deadline_s: Seconds until the call is given up.
            interactive: Let the other side ask the user through polkit; the deadline is then
                the time a person needs.

        Raises:
            InvalidArgument: A string that D-Bus cannot carry; nothing was sent.
            RemoteError: The other side answered with an error.
            NoAnswer: No answer in time, or the connection ended.
        """
        require_text(body)
        flags = self.library.message_flag.NO_AUTOSTART
        if interactive:
            flags |= self.library.message_flag.ALLOW_INTERACTIVE_AUTHORIZATION
            deadline_s = INTERACTIVE_TIMEOUT_S
        message = self.library.message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=flags,
        )
        async with self._slots:
            reply = await self._exchange(message, deadline_s)
        if reply.message_type == self.library.message_type.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise RemoteError(reply.error_name or "", text)
        return tuple(reply.body)

    async def _exchange(self, message: Message, deadline_s: float) -> Message:
        if self._lost is not None:
            raise NoAnswer(self._lost)
        deadline = asyncio.timeout(None)
        timer = _Timer(deadline)
        try:
            async with deadline:
                timer.start(deadline_s)
                self._deadlines.add(deadline)
                reply = await self._bus.call(message)
        except TimeoutError as error:
            reason = self._lost or f"{message.member} was not answered"
            silent_s = deadline_s if self._lost is None else None
            raise NoAnswer(reason, silent_s=silent_s) from error
        except Exception as error:
            raise NoAnswer(
                self._lost or f"the connection to the bus ended: {_reason(error)}"
            ) from error
        finally:
            timer.cancel()
            self._deadlines.discard(deadline)
        if reply is None:
            raise NoAnswer(self._lost or "the connection ended")
        return reply

    def deliver_signals(self, sink: Callable[[BusSignal | None], None]) -> None:
        """Hand signals from now on to ``sink``, and None when the connection ends.

        Those of the manager, and the broker's word on who has the manager's name.

        ``sink`` runs inside the library's read loop: it may only put the signal away.
        """
        self._sink = sink

    def _on_message(self, message: Message) -> None:
        # A truthy return would swallow replies; an exception would only be logged.
        if message.message_type == self.library.message_type.METHOD_RETURN:
            self._note_manager(message.sender)
        if message.message_type != self.library.message_type.SIGNAL:
            return
        if message.sender == BROKER:
            if message.member != "NameOwnerChanged" or message.body[0] != SYSTEMD:
                return
            self._note_manager(message.body[2])
        elif not self._is_managers(message):
            return
        if self._sink is not None:
            self._sink(
                BusSignal(
                    path=message.path or "",
                    interface=message.interface or "",
                    member=message.member or "",
                    body=tuple(unwrap(value) for value in message.body),
                )
            )

    def _note_manager(self, sender: str | None) -> None:
        """Whose signals count: who answers, who takes the name; unique names are for ever."""
        if sender and sender.startswith(":"):
            self._manager = sender

    def _is_managers(self, message: Message) -> bool:
        """Whether a signal is the manager's own; a private socket knows no unique names."""
        return self._manager is None or message.sender == self._manager

    async def _watch_for_loss(self) -> None:
        try:
            await self._bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
            reason = "the connection to the bus was closed"
        except Exception as error:
            reason = f"the connection to the bus ended: {_reason(error)}"
        self._end(reason)
        if self._sink is not None:
            self._sink(None)

    def _end(self, reason: str) -> None:
        self._lost = self._lost or reason
        now = asyncio.get_running_loop().time()
        for deadline in tuple(self._deadlines):
            with contextlib.suppress(RuntimeError):
                deadline.reschedule(now)

    @property
    def lost(self) -> str | None:
        """Why the connection has ended, None while it stands."""
        return self._lost

    async def close(self) -> None:
        """End the connection and close its descriptors; safe to call twice."""
        self._sink = None
        self._watch.cancel()
        try:
            await asyncio.gather(self._watch, return_exceptions=True)
        finally:
            # A deadline can end this wait too.
            self._end("the connection was closed")
            _release(self._bus)


class _Timer:
    """Lets a deadline pass in time, but not while its answer waits to be read.

    Who was stopped meanwhile (Ctrl-Z, a frozen cgroup) finds both at once, and the answer takes
    a moment.
    """

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Count from now on."""
        due = self._loop.time() + seconds
        self._handle = self._loop.call_at(due, self._pass, due)

    def _pass(self, due: float) -> None:
        if self._loop.time() - due > STOOD_STILL_S:
            self.start(READ_S)
        else:
            self._deadline.reschedule(self._loop.time())

    def cancel(self) -> None:
        """The answer is there, or nobody waits for it any more."""
        if self._handle is not None:
            self._handle.cancel()


def _reason(error: Exception) -> str:
    """What an exception says; the libraries' end of file says nothing."""
    if isinstance(error, EOFError):
        return str(error) or "it hung up"
    return str(error) or type(error).__name__


def _passes(error: Exception) -> bool:
    """Whether a connect that failed so can succeed in a moment: somebody has been there."""
    # BlockingIOError: so many wait to be accepted that no more fit in.
    hung_up = (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, EOFError)
    return isinstance(error, (*hung_up, BlockingIOError))


def _release(bus: Any) -> None:
    """Close what the libraries leave open after a disconnect."""
    if bus is None:
        return
    # Once it is disconnected, its descriptor's number may be another connection's.
    if getattr(bus, "_fd", None) is not None and not bus._disconnected:
        bus._user_disconnect = True
        if bus.unique_name is None:
            # Nobody waits for the answer to Hello any more.
            bus._method_return_handlers.clear()
        with contextlib.suppress(Exception):
            bus._finalize(None)
    for name in ("_stream", "_sock"):
        with contextlib.suppress(Exception):
            getattr(bus, name).close()


def require_text(values: Sequence[Any]) -> None:
    """Refuse what no D-Bus string can hold: the broker hangs up on it.

    Raises:
        InvalidArgument: A string, at any depth, has a NUL or is not Unicode.
    """
    for value in values:
        if isinstance(value, str):
            if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
                raise InvalidArgument(f"{value[:40]!r} is no text that D-Bus can carry.")
        elif isinstance(value, list | tuple):
            require_text(value)


def unwrap(value: Any) -> Any:
    """A variant's value, or for a dictionary of variants the dictionary of their values."""
    if isinstance(value, dict):
        return {key: getattr(item, "value", item) for key, item in value.items()}
    return getattr(value, "value", value)
