"""The manager's own socket: taken when the bus is of no use, greeted as PID 1 needs it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from fake_systemd import HELLO, MANAGER, ROOT, FakeSystemd, signal
from private_broker import Broker

from sdtool.errors import Unavailable
from sdtool.host import Host
from sdtool.model.manager import ConnectionLost, JobChange, UnitChange
from sdtool.model.scope import Scope
from sdtool.model.stop import Verdict
from sdtool.sources import reach
from sdtool.sources.systemd import Manager

SOON_S = 5.0


async def test_dead_bus_is_replaced_by_the_private_socket(private: FakeSystemd) -> None:
    """The answers are the same, and the reason is told."""
    private.add("a.service")
    async with await Manager.open(Scope.USER) as manager:
        assert ["a.service"] == [unit.name for unit in await manager.list_units()]
        assert "a.service" == (await manager.read_unit("a.service")).unit.name
        info = manager.info
    assert ("private", True) == (info.transport, "/nowhere" in str(info.transport_reason))


async def test_frozen_bus_is_replaced_by_the_private_socket(
    private: FakeSystemd, broker: Broker, hurry: float
) -> None:
    """After the time that a connect may take."""
    broker.freeze()
    async with asyncio.timeout(hurry), await Manager.open(Scope.USER) as manager:
        info = manager.info
    assert ("private", True) == (info.transport, "not answer" in str(info.transport_reason))


async def test_bus_without_a_manager_is_replaced_by_the_private_socket(
    private: FakeSystemd, broker: Broker
) -> None:
    """The broker lives, and the manager is not on it."""
    async with await Manager.open(Scope.USER) as manager:
        assert "private" == manager.info.transport


async def test_bus_is_preferred_to_the_private_socket(
    private: FakeSystemd, fake: FakeSystemd
) -> None:
    """While it works nobody knocks at the other door."""
    async with await Manager.open(Scope.USER) as manager:
        assert "bus" == manager.info.transport
    assert [] == private.greetings


async def test_frozen_private_socket_is_unavailable(private: FakeSystemd, hurry: float) -> None:
    """A manager that is frozen is so at every door."""
    private.silent = {"*"}
    async with asyncio.timeout(hurry):
        with pytest.raises(Unavailable, match="does not answer"):
            await Manager.open(Scope.USER)


async def test_file_in_the_place_of_the_private_socket_is_ignored(runtime: Path) -> None:
    """Only a socket is knocked at."""
    (runtime / "systemd").mkdir()
    (runtime / "systemd/private").write_text("")
    with pytest.raises(Unavailable, match="No user manager") as caught:
        await Manager.open(Scope.USER)
    assert "systemd/private" not in str(caught.value)


@pytest.mark.parametrize(("uid", "expected"), [(0, ["bus", "private"]), (1000, ["bus"])])
def test_private_socket_of_the_system_is_for_root(
    monkeypatch: pytest.MonkeyPatch, uid: int, expected: list[str]
) -> None:
    """Others may not connect to it."""
    monkeypatch.setattr(reach, "_is_socket", lambda path: True)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert expected == [transport for transport, _ in reach._addresses(Scope.SYSTEM)]


async def test_greeting_waits_for_its_answer(private: FakeSystemd) -> None:
    """PID 1 ignores a message that comes in one piece with BEGIN."""
    for _ in range(20):
        async with await Manager.open(Scope.USER):
            pass
    assert [HELLO] * 20 == private.greetings


async def test_signal_right_behind_the_welcome_is_no_part_of_it(private: FakeSystemd) -> None:
    """PID 1 sends signals from the moment it has taken BEGIN."""
    private.eager = signal(ROOT, MANAGER, "UnitNew", "so", "x" * 5000, ROOT)
    async with asyncio.timeout(SOON_S), await Manager.open(Scope.USER) as manager:
        assert "252.4-fake" == manager.info.version


async def test_signals_come_without_a_match(private: FakeSystemd) -> None:
    """There is no broker to filter them, and nobody who knows AddMatch."""
    unit = private.add("a.service")
    async with await Manager.open(Scope.USER) as manager:
        queue = await manager.subscribe()
        private.emit(unit.change("active", "reloading")[1], count=5000)
        private.emit(private.job_removed(f"{ROOT}/job/1", "a.service", "done"))
        await manager.list_units()
        got = [await queue.get() for _ in range(5001)]
    assert ({UnitChange}, JobChange) == ({type(change) for change in got[:-1]}, type(got[-1]))
    assert 0 == private.members["AddMatch"]


@pytest.mark.usefixtures("impatient")
async def test_manager_that_hangs_up_ends_everything(private: FakeSystemd) -> None:
    """daemon-reexec closes its private connections: the queue says so, and calls end."""
    private.silent = {"ListUnits"}
    async with await Manager.open(Scope.USER) as manager:
        queue = await manager.subscribe()
        pending = asyncio.create_task(manager.list_units())
        await private.called("ListUnits")
        private.hang_up()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Unavailable):
                await pending
            assert isinstance(await queue.get(), ConnectionLost)


async def test_stop_works_over_the_private_socket(private: FakeSystemd) -> None:
    """The same report, with the way it was reached."""
    private.add("a.service", stop="early")
    async with Host(Scope.USER) as host:
        (report,) = (await host.stop(["a"])).data
    assert (Verdict.CLEAN, "inactive") == (report.verdict, report.active_state)
    assert "private" == next(o.reason for o in report.observers if o.name == "dbus")
