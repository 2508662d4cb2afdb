"""One connection: it is made in time or not at all, no call outlives it, nothing is left open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_systemd import MANAGER, PROPERTIES, ROOT, WELCOME, FakeSystemd, Wire
from private_broker import Broker

from sdtool.errors import InvalidArgument
from sdtool.sources.bus import BusSignal, Connection, NoAnswer, RemoteError, load_library

SOON_S = 5.0
LONG_S = 20.0
VERSION = (ROOT, PROPERTIES, "Get", "ss", [MANAGER, "Version"])


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Connection]:
    """A connection that is closed in the end."""
    connection = await Connection.open(address, deadline_s=LONG_S)
    try:
        yield connection
    finally:
        await connection.close()


async def read_version(connection: Connection, deadline_s: float = LONG_S) -> str:
    """Ask the manager something."""
    (version,) = await connection.call(*VERSION, deadline_s=deadline_s)
    return str(version.value)


def count_descriptors() -> int:
    """The descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("full", [False, True], ids=["backlog", "full-backlog"])
async def test_connect_to_a_deaf_socket_ends_at_its_deadline(runtime: Path, full: bool) -> None:
    """A listener that never accepts costs the deadline, at most."""
    path = str(runtime / "deaf")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        while full:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(path)
            except BlockingIOError:
                break
        async with asyncio.timeout(SOON_S):
            with pytest.raises(NoAnswer):
                await Connection.open(f"unix:path={path}", deadline_s=0.2)


async def test_connect_to_a_frozen_broker_ends_at_its_deadline(broker: Broker) -> None:
    """A stopped broker still has a socket that can be connected to."""
    broker.freeze()
    async with asyncio.timeout(SOON_S):
        with pytest.raises(NoAnswer, match="does not answer"):
            await Connection.open(broker.address, deadline_s=0.2)


@pytest.mark.parametrize(
    "said",
    [b"", b"DATA\r\n", WELCOME, b"REJECTED EXTERNAL\r\nERROR\r\n", b"x" * 100_000],
    ids=["nothing", "half", "welcome", "rejected", "babble"],
)
async def test_connect_ends_when_the_other_side_hangs_up(runtime: Path, said: bytes) -> None:
    """At whatever point the greeting breaks off, the end is at once and burns no CPU."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"BEGIN\r\n")
        writer.write(said)
        writer.close()

    path = runtime / "peer"
    async with await asyncio.start_unix_server(hang_up, path):
        before = time.process_time()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(NoAnswer):
                await Connection.open(f"unix:path={path}", deadline_s=LONG_S)
        assert time.process_time() - before < 1.0


@pytest.mark.parametrize(
    "address",
    ["nonsense", "unix:", "unix:path=", "unix:path=/" + "x" * 200, "unix:path=/a%00b", "a:b=c"],
)
async def test_connect_refuses_a_strange_address(address: str) -> None:
    """What is no address, or none that can be connected to, is nobody who answers."""
    with pytest.raises(NoAnswer):
        await Connection.open(address, deadline_s=LONG_S)


async def test_connect_takes_the_first_address_that_answers(
    fake: FakeSystemd, broker: Broker
) -> None:
    """D-Bus addresses are lists."""
    address = f"unix:path=/nowhere;{broker.address}"
    async with connected(address) as connection:
        assert "252.4-fake" == await read_version(connection)


async def test_connect_takes_an_abstract_socket(runtime: Path, fake: FakeSystemd) -> None:
    """The user bus of some desktops has an address without a file."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(runtime / "bus")
        passed = asyncio.gather(carry(reader, there[1]), carry(there[0], writer))
        passing.append(passed)
        await passed

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(4096):
            writer.write(part)
        writer.close()

    passing: list[asyncio.Future[Any]] = []
    name = str(runtime).strip("/").replace("/", "-")
    async with await asyncio.start_unix_server(pass_on, f"\0{name}"):
        async with connected(f"unix:abstract={name}") as connection:
            assert "252.4-fake" == await read_version(connection)
        await passing[0]


async def test_call_that_is_never_answered_ends_at_its_deadline(
    fake: FakeSystemd, broker: Broker
) -> None:
    """The connection stands, and answers the next call."""
    async with connected(broker.address) as connection:
        fake.silent = {"Get"}
        async with asyncio.timeout(SOON_S):
            with pytest.raises(NoAnswer, match="Get was not answered"):
                await read_version(connection, 0.1)
        fake.silent = set()
        assert (None, "252.4-fake") == (connection.lost, await read_version(connection))


@pytest.mark.parametrize("member", ["Get", "*"])
async def test_unanswered_calls_give_their_slots_back(
    fake: FakeSystemd, broker: Broker, member: str
) -> None:
    """Hundreds of calls that time out do not keep later ones from being sent."""
    async with connected(broker.address) as connection:
        fake.silent = {member}
        async with asyncio.timeout(SOON_S):
            calls = [read_version(connection, 0.1) for _ in range(65)]
            failures = await asyncio.gather(*calls, return_exceptions=True)
        assert {NoAnswer} == {type(failure) for failure in failures}
        fake.silent = set()
        assert "252.4-fake" == await read_version(connection)


async def test_loss_ends_the_calls_that_wait_and_those_that_come(
    fake: FakeSystemd, broker: Broker
) -> None:
    """Both in-flight calls and later ones end at once, not at their deadline."""
    async with connected(broker.address) as connection:
        heard: list[BusSignal | None] = []
        connection.deliver_signals(heard.append)
        fake.silent = {"Get"}
        calls = [asyncio.create_task(read_version(connection)) for _ in range(100)]
        await fake.called("Get")
        broker.kill()
        async with asyncio.timeout(SOON_S):
            failures = await asyncio.gather(*calls, return_exceptions=True)
            assert {NoAnswer} == {type(failure) for failure in failures}
            with pytest.raises(NoAnswer):
                await read_version(connection)
        assert (True, [None]) == (bool(connection.lost), heard)


async def test_call_in_the_moment_of_the_loss_ends_at_once(
    fake: FakeSystemd, broker: Broker
) -> None:
    """The library knows of the end and we do not yet: its call would never return."""
    fake.silent = {"Get"}
    async with connected(broker.address) as connection, asyncio.timeout(SOON_S):
        connection._bus._finalize(EOFError())
        with pytest.raises(NoAnswer):
            await read_version(connection)


async def test_close_ends_the_calls_that_wait_and_those_that_come(
    fake: FakeSystemd, broker: Broker
) -> None:
    """Whoever closes a connection under a call does not leave it hanging."""
    connection = await Connection.open(broker.address, deadline_s=LONG_S)
    fake.silent = {"Get"}
    call = asyncio.create_task(read_version(connection))
    await fake.called("Get")
    async with asyncio.timeout(SOON_S):
        await connection.close()
        with pytest.raises(NoAnswer):
            await call
        with pytest.raises(NoAnswer):
            await read_version(connection)
        await connection.close()


async def test_cancelled_call_leaves_the_connection_usable(
    fake: FakeSystemd, broker: Broker
) -> None:
    """A late answer to a call that was given up disturbs nobody."""
    async with connected(broker.address) as connection:
        fake.batch = 2
        fake.add("a.service")
        call = ("Get", "ss", ["org.freedesktop.systemd1.Unit", "Id"])
        path = fake.units["a.service"].path
        first = asyncio.create_task(connection.call(path, PROPERTIES, *call))
        await fake.called("Get")
        first.cancel()
        (name,) = await connection.call(path, PROPERTIES, *call)
        assert "a.service" == name.value


async def test_connections_leave_no_descriptor_behind(
    fake: FakeSystemd, broker: Broker, runtime: Path
) -> None:
    """Made, refused, lost or closed: a hundred connections later all descriptors are back."""
    before = count_descriptors()
    for number in range(100):
        connection = await Connection.open(broker.address, deadline_s=LONG_S)
        if number % 2:
            await read_version(connection)
        await connection.close()
        with pytest.raises(NoAnswer):
            await Connection.open(f"unix:path={runtime}/nowhere", deadline_s=LONG_S)
    lost = [await Connection.open(broker.address, deadline_s=LONG_S) for _ in range(10)]
    broker.kill()
    for connection in lost:
        with pytest.raises(NoAnswer):
            await read_version(connection)
        await connection.close()
    gc.collect()
    # One less where the fake has noticed the end of its own connection.
    assert count_descriptors() in (before, before - 1)


async def test_close_after_loss_leaves_the_next_connection_alone(
    fake: FakeSystemd, broker: Broker, runtime: Path
) -> None:
    """The descriptor of a lost connection may be another's by the time it is closed."""
    (runtime / "other").mkdir()
    dying = Broker(runtime / "other")
    first = await Connection.open(dying.address, deadline_s=LONG_S)
    ended = asyncio.Event()
    first.deliver_signals(lambda _: ended.set())
    dying.kill()
    await ended.wait()
    others = [await Connection.open(broker.address, deadline_s=LONG_S) for _ in range(3)]
    await first.close()
    for other in others:
        assert "252.4-fake" == await read_version(other, SOON_S)
        await other.close()


async def test_error_comes_with_its_name_and_text(fake: FakeSystemd, broker: Broker) -> None:
    """What an error means is for somebody else to say."""
    fake.errors["Get"] = ("org.example.Odd", "an odd\nthing")
    async with connected(broker.address) as connection:
        with pytest.raises(RemoteError) as caught:
            await read_version(connection)
    assert ("org.example.Odd", "an odd\nthing") == (caught.value.name, caught.value.text)


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"], ids=["NUL", "surrogate"])
async def test_text_that_dbus_cannot_carry_is_refused(
    fake: FakeSystemd, broker: Broker, text: str
) -> None:
    """The broker would hang up on it; so it is not sent, and the connection stays."""
    async with connected(broker.address) as connection:
        with pytest.raises(InvalidArgument):
            await connection.call(ROOT, MANAGER, "ListUnitsByNames", "as", [[text]])
        assert (None, "252.4-fake") == (connection.lost, await read_version(connection))


async def test_forged_signals_are_dropped(fake: FakeSystemd, broker: Broker) -> None:
    """A broker lets anybody send a signal straight to us; only the manager's own count."""
    async with connected(broker.address) as connection:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        connection.deliver_signals(heard.put_nowait)
        await read_version(connection)
        forger = await Wire.join(broker.address)
        for result, send in (("forged", forger.send), ("done", fake.emit)):
            message = fake.job_removed(f"{ROOT}/job/1", "a.service", result)
            message.destination = fake.calls[-1].sender
            send(message)
            if result == "forged":
                await forger.ask_broker("GetId")
        got = await heard.get()
        while got.member != "JobRemoved":
            got = await heard.get()
        assert (1, f"{ROOT}/job/1", "a.service", "done") == got.body
        await forger.close()


def test_library_is_the_one_asked_for(library: str) -> None:
    """SDTOOL_DBUS chooses."""
    assert f"dbus-{library}" == load_library().name


def test_library_prefers_the_fast_one() -> None:
    """Where nothing is said, dbus-fast is used if it is there."""
    assert "dbus-fast" == load_library({}).name


def test_library_with_another_name_is_refused() -> None:
    """A slip of the pen does not silently choose."""
    with pytest.raises(InvalidArgument, match="SDTOOL_DBUS=bad is neither next nor fast"):
        load_library({"SDTOOL_DBUS": "bad"})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("fast", "SDTOOL_DBUS=fast, but dbus-fast cannot be imported."), ("", "dbus-next")],
)
def test_library_that_is_not_installed(wanted: str, expected: str) -> None:
    """Without dbus-fast dbus-next does; who insists is told what to install."""
    script = (
        "import sys; sys.modules['dbus_fast'] = None\n"
        "from sdtool.errors import Unavailable\n"
        "from sdtool.sources.bus import load_library\n"
        "try: print(load_library().name)\n"
        "except Unavailable as error: print(error, error.hint)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    ran = subprocess.run(
        command, env={"SDTOOL_DBUS": wanted}, capture_output=True, text=True, check=True
    )
    assert (True, "") == (ran.stdout.startswith(expected), ran.stderr)
