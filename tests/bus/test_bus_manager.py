"""The manager over the bus: what it lists and tells, and what its errors become."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.signature import Variant
from fake_systemd import MANAGER, NAME, ROOT, FakeSystemd, signal
from private_broker import Broker

from sdtool.errors import (
    AccessDenied,
    BusError,
    Exit,
    InvalidArgument,
    NoSuchUnit,
    SdtoolError,
    Unavailable,
    UnitMasked,
)
from sdtool.model.manager import ConnectionLost, JobChange, ManagerReloading, UnitChange
from sdtool.model.scope import Scope
from sdtool.sources.messages import ABSENT, ERRORS
from sdtool.sources.systemd import Manager

SOON_S = 5.0
ODD_NAMES = (
    "-.slice",
    "0first.service",
    "a@b:c_d.e.service",
    r"dev-disk-by\x2did-x.device",
    r"sdtool-odd\x2dname.service",
    "x" * 247 + ".service",
)


async def next_signal(queue: asyncio.Queue[Any], kind: type) -> Any:
    """The next signal of a kind; the others are dropped."""
    async with asyncio.timeout(SOON_S):
        while True:
            if isinstance(got := await queue.get(), kind):
                return got


# Units ---------------------------------------------------------------------------------------


async def test_list_units_keeps_odd_names_and_texts(fake: FakeSystemd) -> None:
    """Nothing is lost or made pretty on the way, and the units come sorted."""
    text = "\x1b[31mred\n\u6e2c\u8a66 \U0001f9ea \u202e"
    fake.add(*reversed(ODD_NAMES), description=text, sub_state="of-tomorrow")
    async with await Manager.open(Scope.SYSTEM) as manager:
        units = await manager.list_units()
    assert sorted(ODD_NAMES) == [unit.name for unit in units]
    assert {(text, "of-tomorrow", None)} == {(u.description, u.sub_state, u.job) for u in units}


async def test_list_units_takes_thousands(fake: FakeSystemd) -> None:
    """5,000 units are one answer."""
    names = [f"unit-{number:04}.service" for number in range(5000)]
    fake.add(*names)
    async with await Manager.open(Scope.SYSTEM) as manager:
        assert names == [unit.name for unit in await manager.list_units()]


async def test_list_units_hands_patterns_to_the_manager(fake: FakeSystemd) -> None:
    """The manager matches aliases too, so it must do the matching."""
    fake.add("a.service", "b.service", "b.socket")
    async with await Manager.open(Scope.SYSTEM) as manager:
        units = await manager.list_units(["b.*", "nothing*"])
    assert ["b.service", "b.socket"] == [unit.name for unit in units]
    assert [[], ["b.*", "nothing*"]] == fake.calls[-1].body


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_read_unit_finds_the_path_of_an_odd_name(fake: FakeSystemd, name: str) -> None:
    """Its object path has every other character escaped."""
    fake.add("other.service", name)
    async with await Manager.open(Scope.SYSTEM) as manager:
        details = await manager.read_unit(name)
        assert (name, True) == (details.unit.name, await manager.ref_unit(name))
    assert fake.units[name].path == fake.calls[-1].path


async def test_read_unit_reads_the_same_with_both_libraries(fake: FakeSystemd) -> None:
    """Arrays are tuples, bytes are hexadecimal, and what stands for nothing is None."""
    more = {
        "TriggeredBy": Variant("as", ["a.socket", "a.timer"]),
        "RequiredBy": Variant("as", ["b.service"]),
        "TimeoutStopUSec": Variant("t", 2**64 - 1),
    }
    fake.add("a.service", more=more)
    async with await Manager.open(Scope.SYSTEM) as manager:
        details = await manager.read_unit("a.service")
    assert (("a.socket", "a.timer"), ("b.service",)) == (details.triggered_by, details.stops_along)
    assert ("000102030405060708090a0b0c0d0e0f", None, None) == (
        details.unit.invocation_id,
        details.unit.main_pid,
        details.unit.control_group,
    )
    assert details.policy is not None
    assert ("infinity", "SIGTERM", 0) == (
        details.policy.timeout_stop_us,
        details.policy.kill_signal,
        details.policy.exec_stop,
    )


async def test_unknown_unit_is_no_such_unit(fake: FakeSystemd) -> None:
    """Neither loaded nor on disk."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(NoSuchUnit, match=r"absent\.service") as caught:
            await manager.read_unit("absent.service")
    assert ("absent.service", Exit.NO_SUCH_UNIT) == (caught.value.subject, caught.value.exit)


async def test_unit_that_goes_midway_is_no_such_unit(fake: FakeSystemd) -> None:
    """It was listed, and is garbage-collected before its properties are read."""
    fake.add("gone.service")
    fake.errors["GetAll"] = ("org.freedesktop.DBus.Error.UnknownObject", "Unknown object '/x'.")
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(NoSuchUnit, match=r"gone\.service"):
            await manager.read_unit("gone.service")


async def test_socket_units_have_their_addresses(fake: FakeSystemd) -> None:
    """Structs are lists in one library and tuples in the other."""
    listen = Variant("a(ss)", [["Stream", "[::]:80"], ["Datagram", "/run/x"]])
    starts = {"Triggers": Variant("as", ["a.service"]), "BindToDevice": Variant("s", "eth0")}
    fake.add("a.socket", more={"Listen": listen, **starts})
    fake.add("b.socket", "c.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        found = await manager.list_socket_units()
    assert [(("a.service",), "eth0"), ((), None)] == [(one.triggers, one.device) for one in found]
    listens = [[(listen.type, listen.address) for listen in unit.listens] for unit in found]
    assert [[("Stream", "[::]:80"), ("Datagram", "/run/x")], []] == listens


# Calls ---------------------------------------------------------------------------------------


async def test_calls_in_flight_are_never_more_than_64(fake: FakeSystemd) -> None:
    """Over 128 the broker refuses; the fake answers only when 64 wait and no more came."""
    names = [f"unit-{number}.service" for number in range(320)]
    fake.add(*names)
    async with await Manager.open(Scope.SYSTEM) as manager:
        fake.batch = 64
        values = await manager.read_properties(names, [("Unit", "Id")])
    assert ({name: {"Id": name} for name in names}, 64) == (values, fake.peak)


async def test_read_properties_leaves_out_what_is_gone(fake: FakeSystemd) -> None:
    """A unit that is gone has none, one without the property lacks it."""
    fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        values = await manager.read_properties(
            ["a.service", "gone.service"], [("Unit", "Id"), ("Service", "Absent")]
        )
    assert {"a.service": {"Id": "a.service"}, "gone.service": {}} == values


async def test_read_properties_ends_at_once_when_the_manager_freezes(
    fake: FakeSystemd, impatient: None
) -> None:
    """Hundreds of calls cost one deadline, and the error is one of ours."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        fake.silent = {"*"}
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Unavailable, match="Get was not answered"):
                await manager.read_properties([f"{n}.service" for n in range(500)], [("a", "b")])


async def test_no_call_starts_a_service(fake: FakeSystemd) -> None:
    """NO_AUTOSTART is on every call: to look must not change what is looked at."""
    fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        await manager.list_units()
        await manager.list_units(["*"])
        await manager.read_unit("a.service")
        await manager.subscribe()
        await manager.ref_unit("a.service")
        await manager.queue_job("stop", "a.service")
        await manager.queue_job("stop", "a.service", interactive=True)
    flags = [call.flags for call in fake.calls]
    interactive = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
    assert {MessageFlag.NO_AUTOSTART} == {flag & ~interactive for flag in flags}
    assert 1 == sum(bool(flag & interactive) for flag in flags)


# Errors --------------------------------------------------------------------------------------


async def test_every_error_name_becomes_the_class_of_the_table(fake: FakeSystemd) -> None:
    """Chosen by the name alone, with the unit in the sentence."""
    actual: dict[str, type[SdtoolError]] = {}
    fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        for name in ERRORS.keys() - ABSENT:
            fake.errors["StopUnit"] = (name, "Something in other words.")
            with pytest.raises(SdtoolError, match=r"a\.service") as caught:
                await manager.queue_job("stop", "a.service")
            actual[name] = type(caught.value)
        for name in ABSENT:
            # Nobody knows whether the job was queued: it is not asked for again.
            fake.errors["StopUnit"] = (name, "Something in other words.")
            assert await manager.queue_job("stop", "a.service") is None
            actual[name] = Unavailable
    assert ERRORS == actual


async def test_error_name_without_a_class_is_kept(fake: FakeSystemd) -> None:
    """A name of tomorrow survives, in the sentence too."""
    fake.errors["ListUnits"] = ("org.example.Odd", "")
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(BusError, match=r"org\.example\.Odd") as caught:
            await manager.list_units()
    assert ("org.example.Odd", Exit.UNAVAILABLE) == (caught.value.name, caught.value.exit)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("org.freedesktop.DBus.Error.AccessDenied", "Access denied"),
        (
            "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
            "Interactive authentication required.",
        ),
    ],
)
@pytest.mark.parametrize("unit", ["a.service", "kit.service"])
async def test_denied_stop_names_what_would_permit_it(
    fake: FakeSystemd, name: str, text: str, unit: str
) -> None:
    """Exit 4 with polkit's action."""
    fake.errors["StopUnit"] = (name, text)
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(AccessDenied) as caught:
            await manager.queue_job("stop", unit)
    assert (Exit.DENIED, unit) == (caught.value.exit, caught.value.subject)
    assert "org.freedesktop.systemd1.manage-units" in str(caught.value.hint)


@pytest.mark.parametrize("unit", ["a.service", "polkit.service"])
async def test_masked_unit_is_masked(fake: FakeSystemd, unit: str) -> None:
    """Exit 6, also where it is polkit's own unit that the manager names."""
    fake.errors["StartUnit"] = (f"{NAME}.UnitMasked", f"Unit {unit} is masked.")
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(UnitMasked, match=unit) as caught:
            await manager.queue_job("start", "a.service")
    assert Exit.NOT_CONFIGURED == caught.value.exit


async def test_pattern_that_dbus_cannot_carry_is_refused(fake: FakeSystemd) -> None:
    """An argument need not be Unicode, a D-Bus string must."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(InvalidArgument):
            await manager.list_units(["\udcff*"])


# Reaching it ---------------------------------------------------------------------------------


async def test_open_says_how_the_manager_was_reached(fake: FakeSystemd, library: str) -> None:
    """Over the bus there is no reason to give."""
    async with await Manager.open(Scope.USER) as manager:
        info = manager.info
    assert (Scope.USER, "252.4-fake", "/fake") == (info.scope, info.version, info.control_group)
    assert ("bus", None, f"dbus-{library}") == (
        info.transport,
        info.transport_reason,
        info.library,
    )


async def test_open_without_a_manager_on_the_bus_is_unavailable(broker: Broker) -> None:
    """The broker says that nobody has the name."""
    with pytest.raises(Unavailable, match=r"NameHasNoOwner|ServiceUnknown"):
        await Manager.open(Scope.USER)


async def test_open_of_a_frozen_manager_is_unavailable(fake: FakeSystemd, hurry: float) -> None:
    """The broker lives and the manager does not answer."""
    fake.silent = {"*"}
    async with asyncio.timeout(hurry):
        with pytest.raises(Unavailable, match="Get was not answered"):
            await Manager.open(Scope.USER)


async def test_open_that_the_bus_forbids_is_denied(fake: FakeSystemd) -> None:
    """A policy that refuses is another thing than nobody there."""
    fake.errors["Get"] = ("org.freedesktop.DBus.Error.AccessDenied", "Rejected send message")
    with pytest.raises(AccessDenied, match="Rejected send message"):
        await Manager.open(Scope.USER)


async def test_call_that_is_not_answered_is_unavailable(
    fake: FakeSystemd, impatient: None
) -> None:
    """With a word about what may be going on."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        fake.silent = {"ListUnits"}
        with pytest.raises(Unavailable, match="ListUnits was not answered") as caught:
            await manager.list_units()
    assert "try again" in str(caught.value.hint)


@pytest.mark.usefixtures("impatient")
async def test_manager_that_dies_under_a_call_is_unavailable(fake: FakeSystemd) -> None:
    """The broker answers in its place."""
    fake.dies_at = "ListUnits"
    async with await Manager.open(Scope.SYSTEM) as manager:
        async with asyncio.timeout(SOON_S):
            with pytest.raises(Unavailable):
                await manager.list_units()


# Signals -------------------------------------------------------------------------------------


async def test_signals_come_in_their_order(fake: FakeSystemd) -> None:
    """Each kind as what it is, what nobody asks about left out, duplicates left in."""
    unit = fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        queue = await manager.subscribe()
        fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
        fake.emit(signal(ROOT, MANAGER, "StartupFinished", "tttttt", 1, 2, 3, 4, 5, 6))
        fake.emit(unit.change("deactivating", "stop-sigterm")[1], count=2)
        fake.emit(fake.job_removed(f"{ROOT}/job/7", "a.service", "done"))
        change = UnitChange(
            unit_path=unit.path,
            active_state="deactivating",
            sub_state="stop-sigterm",
            changed_us=unit.changed_us,
        )
        async with asyncio.timeout(SOON_S):
            assert [
                ManagerReloading(active=True),
                change,
                change,
                JobChange(job=f"{ROOT}/job/7", unit="a.service", result="done"),
            ] == [await queue.get() for _ in range(4)]


async def test_flood_of_signals_does_not_drown_the_answers(fake: FakeSystemd) -> None:
    """20,000 signals come in full while calls are answered."""
    unit = fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager:
        queue = await manager.subscribe()
        message = unit.change("active", "running")[1]
        for _ in range(4):
            fake.emit(message, count=5000)
            assert ["a.service"] == [u.name for u in await manager.list_units()]
        changes = [await queue.get() for _ in range(20_000)]
    assert {unit.path} == {change.unit_path for change in changes}


async def test_second_subscription_is_the_first_one(fake: FakeSystemd) -> None:
    """The manager calls it an error; two stops through one Host must both be watched."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        await manager.subscribe()
        queue = await manager.subscribe()
        fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
        assert "done" == (await next_signal(queue, JobChange)).result
    assert 2 == fake.members["Subscribe"]


async def test_refused_subscription_is_an_error(fake: FakeSystemd) -> None:
    """Without signals nothing can be watched."""
    fake.errors["Subscribe"] = ("org.freedesktop.DBus.Error.AccessDenied", "No.")
    async with await Manager.open(Scope.SYSTEM) as manager:
        with pytest.raises(AccessDenied):
            await manager.subscribe()


@pytest.mark.usefixtures("impatient")
async def test_end_of_the_connection_is_the_last_signal(fake: FakeSystemd, broker: Broker) -> None:
    """Once, with the reason; calls then say the same."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        queue = await manager.subscribe()
        broker.kill()
        lost = await next_signal(queue, ConnectionLost)
        assert queue.empty()
        assert "the connection to the bus ended: it hung up" == lost.reason
        with pytest.raises(Unavailable, match=lost.reason):
            await manager.list_units()


@pytest.mark.usefixtures("impatient")
async def test_reexecuted_manager_is_heard_again(fake: FakeSystemd) -> None:
    """It comes back under another unique name; its signals count at once."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        queue = await manager.subscribe()
        fake.silent = {"ListUnits"}
        pending = asyncio.create_task(manager.list_units())
        await fake.called("ListUnits")
        fake.rejoin()
        with pytest.raises(Unavailable):
            await pending
        fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
        assert "done" == (await next_signal(queue, JobChange)).result
