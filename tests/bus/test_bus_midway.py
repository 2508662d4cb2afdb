"""The bus or the manager goes midway and comes back: reads are asked again, stops watched on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dbus_next.message import Message
from dbus_next.signature import Variant
from fake_systemd import MANAGER, ROOT, FakeSystemd, FakeUnit, signal
from private_broker import Broker

from sdtool.errors import Unavailable
from sdtool.host import Host, lastword
from sdtool.model.answer import Answer
from sdtool.model.manager import ConnectionLost, ConnectionRenewed
from sdtool.model.scope import Scope
from sdtool.model.stop import Event, EventKind, Evidence, StopReport, Verdict
from sdtool.sources.systemd import Manager

SOON_S = 8.0


async def restart(broker: Broker, fake: FakeSystemd) -> None:
    """A broker that dies and is there again, and the manager that comes back to it."""
    await asyncio.to_thread(broker.restart)
    await asyncio.to_thread(fake.rejoin)


async def stop(scope: Scope = Scope.SYSTEM) -> StopReport:
    """Stop a.service, in time, to its one report."""
    async with asyncio.timeout(SOON_S), Host(scope) as host:
        answer: Answer[StopReport] = await host.stop(["a"])
    assert () == answer.errors
    (report,) = answer.data
    return report


async def begin(
    fake: FakeSystemd, scope: Scope = Scope.SYSTEM
) -> tuple[FakeUnit, asyncio.Task[StopReport]]:
    """Have a.service on its way down for as long as the test wants, and its stop watched."""
    unit = fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop(scope))
    await fake.called("StopUnit")
    return unit, stopping


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the fake, in its own thread, comes to, and has then answered."""
    met = 0
    for _ in range(500):
        met += condition()
        if met == 2:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it never came to it")


def has_looked(fake: FakeSystemd, before: int) -> bool:
    """Whether a new subscription was followed by a look at the unit."""
    return fake.members["Subscribe"] > before and fake.calls[-1].member == "GetAll"


def gaps(report: StopReport) -> list[Event]:
    """What the report says of times in which nothing was heard."""
    return [event for event in report.events if event.kind is EventKind.GAP]


def states(report: StopReport) -> list[str | None]:
    """The sub states that a report tells, in order."""
    return [event.sub_state for event in report.events if event.kind is EventKind.STATE]


def end(fake: FakeSystemd, unit: FakeUnit) -> None:
    """Let a stop be over, and tell it."""
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))


# Reads ---------------------------------------------------------------------------------------


async def test_read_after_a_restart_of_the_broker_is_answered(
    fake: FakeSystemd, broker: Broker
) -> None:
    """Over a new connection."""
    fake.add("a.service")
    async with await Manager.open(Scope.SYSTEM) as manager, asyncio.timeout(SOON_S):
        await restart(broker, fake)
        assert ["a.service"] == [unit.name for unit in await manager.list_units()]


async def test_reads_in_flight_share_one_new_connection(fake: FakeSystemd, broker: Broker) -> None:
    """Hundreds that fail at one moment make one, and all are answered."""
    names = [f"unit-{number}.service" for number in range(200)]
    fake.add(*names)
    async with await Manager.open(Scope.SYSTEM) as manager, asyncio.timeout(SOON_S):
        before = fake.members["Get"]
        fake.silent = {"Get"}
        reading = asyncio.create_task(manager.read_properties(names, [("Unit", "Id")]))
        await until(lambda: fake.members["Get"] >= before + 64)
        fake.silent = set()
        await restart(broker, fake)
        assert {name: {"Id": name} for name in names} == await reading
    assert 2 == sum(call.member == "Get" and call.body[1] == "Version" for call in fake.calls)


async def test_read_that_dies_with_the_manager_is_asked_again(fake: FakeSystemd) -> None:
    """The broker says NoReply, then that nobody has the name, and then it is back."""
    fake.add("a.service")
    fake.dies_at = "ListUnits"
    async with await Manager.open(Scope.SYSTEM) as manager, asyncio.timeout(SOON_S):
        reading = asyncio.create_task(manager.list_units())
        await fake.called("ListUnits")
        fake.dies_at = ""
        await asyncio.to_thread(fake.rejoin)
        assert ["a.service"] == [unit.name for unit in await reading]


async def test_read_survives_the_end_of_the_private_socket(private: FakeSystemd) -> None:
    """daemon-reexec closes it, and listens again."""
    private.add("a.service")
    private.silent = {"ListUnits"}
    async with await Manager.open(Scope.USER) as manager, asyncio.timeout(SOON_S):
        reading = asyncio.create_task(manager.list_units())
        await private.called("ListUnits")
        private.silent = set()
        await asyncio.to_thread(private.hang_up)
        assert ["a.service"] == [unit.name for unit in await reading]


async def test_patience_with_a_bus_that_stays_away_is_spent_once(
    fake: FakeSystemd, broker: Broker
) -> None:
    """Within five seconds, whatever else is asked; and the reason is that of the loss."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        broker.kill()
        began = time.monotonic()
        for _ in range(5):
            with pytest.raises(Unavailable, match="the connection to the bus ended"):
                await manager.list_units()
    assert 3 < time.monotonic() - began < 5


async def test_first_question_waits_for_a_manager_that_is_expected(
    runtime: Path, broker: Broker
) -> None:
    """It has left the bus for a moment: daemon-reexec."""
    (runtime / "systemd").mkdir()
    opening = asyncio.create_task(Manager.open(Scope.USER))
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert not opening.done()
    with FakeSystemd(address=broker.address):
        async with asyncio.timeout(SOON_S), await opening as manager:
            assert "252.4-fake" == manager.info.version


async def test_signals_come_again_after_a_loss(fake: FakeSystemd, broker: Broker) -> None:
    """The queue says when they ended and from when on they come."""
    async with await Manager.open(Scope.SYSTEM) as manager, asyncio.timeout(SOON_S):
        queue = await manager.subscribe()
        await restart(broker, fake)
        await manager.find_again()
        fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
        kinds = [type(await queue.get()) for _ in range(2)]
        while kinds[-1] is ConnectionLost:
            kinds.append(type(await queue.get()))
        assert (ConnectionLost, ConnectionRenewed) == (kinds[0], kinds[-1])
        assert "a.service" == getattr(await queue.get(), "unit", None)


# Stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["broker", "manager"])
async def test_stop_is_watched_on_after_a_loss(
    fake: FakeSystemd, broker: Broker, what: str
) -> None:
    """To its true end, with the gap and its bounds, and asked for only once."""
    unit, stopping = await begin(fake)
    before = fake.members["Subscribe"]
    await (restart(broker, fake) if what == "broker" else asyncio.to_thread(fake.rejoin))
    await until(lambda: has_looked(fake, before))
    end(fake, unit)
    report = await stopping
    (gap,) = gaps(report)
    assert (Verdict.CLEAN, "done", None) == (
        report.verdict,
        report.job_result,
        report.job_result_reason,
    )
    assert ["stop-sigterm", "dead"] == states(report)
    assert (gap.at_min_us or 0) < (gap.at_max_us or 0) == gap.at_us
    assert 1 == fake.members["StopUnit"]


async def test_stop_over_the_private_socket_is_watched_on(private: FakeSystemd) -> None:
    """It hangs up where it executes itself anew."""
    unit, stopping = await begin(private, Scope.USER)
    private.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
    before = private.members["Subscribe"]
    await asyncio.to_thread(private.hang_up)
    await until(lambda: has_looked(private, before))
    end(private, unit)
    report = await stopping
    assert (["daemon-reexec"], Verdict.CLEAN) == ([e.text for e in gaps(report)], report.verdict)


async def test_end_within_the_gap_has_the_managers_time(fake: FakeSystemd, broker: Broker) -> None:
    """Observed at its StateChangeTimestamp; what became of the job is not known."""
    unit, stopping = await begin(fake)
    broker.kill()
    unit.change("inactive", "dead")
    await restart(broker, fake)
    report = await stopping
    dead = [event for event in report.events if event.sub_state == "dead"]
    over = [event for event in report.events if event.kind is EventKind.JOB_DONE]
    assert [(unit.changed_us, Evidence.OBSERVED)] == [(e.at_us, e.evidence) for e in dead]
    assert [Evidence.INFERRED] == [event.evidence for event in over]
    assert (None, Verdict.CLEAN) == (report.job_result, report.verdict)
    assert "out of reach" in str(report.job_result_reason)
    assert unit.changed_us == report.requested_us + report.duration_us


@pytest.mark.parametrize("what", ["daemon-reload", "daemon-reexec"])
async def test_end_that_is_told_right_after_the_gap_has_it(fake: FakeSystemd, what: str) -> None:
    """The job's end is heard before anything could be asked, and what was told stands."""
    unit, stopping = await begin(fake)
    job = unit.job
    fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
    if what == "daemon-reexec":
        await asyncio.to_thread(fake.rejoin)
    else:
        fake.emit(signal(ROOT, MANAGER, "Reloading", "b", False))
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))
    report = await stopping
    (gap,) = gaps(report)
    (over,) = (event for event in report.events if event.kind is EventKind.JOB_DONE)
    assert (what, "done", Verdict.CLEAN) == (gap.text, report.job_result, report.verdict)
    assert Evidence.OBSERVED is over.evidence
    assert (gap.at_min_us or 0) <= gap.at_us <= over.at_us
    assert report.events.index(gap) < report.events.index(over)
    assert unit.changed_us == report.requested_us + report.duration_us


async def test_end_that_is_told_within_a_reload_has_the_gap(fake: FakeSystemd) -> None:
    """It is over, and reported on, before the manager says that it has reloaded."""
    unit, stopping = await begin(fake)
    job = unit.job
    fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))
    report = await stopping
    assert ["daemon-reload"] == [gap.text for gap in gaps(report)]
    assert ("done", Verdict.CLEAN) == (report.job_result, report.verdict)


async def test_end_that_was_told_before_the_loss_has_no_gap(fake: FakeSystemd) -> None:
    """The manager goes right after it."""
    unit, stopping = await begin(fake)
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))
    fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
    await asyncio.to_thread(fake.rejoin)
    report = await stopping
    assert ([], "done") == (gaps(report), report.job_result)


async def test_unit_forgotten_within_the_gap_is_inactive(
    fake: FakeSystemd, broker: Broker
) -> None:
    """When it became so is inferred; that it had not failed its CollectMode= says."""
    _, stopping = await begin(fake)
    broker.kill()
    del fake.units["a.service"]
    await restart(broker, fake)
    report = await stopping
    (dead,) = (event for event in report.events if event.sub_state == "dead")
    assert (Evidence.INFERRED, Verdict.CLEAN) == (dead.evidence, report.verdict)
    assert ("inactive", "success") == (report.active_state, report.result)


async def test_job_cancelled_within_the_gap_is_not_clean(
    fake: FakeSystemd, broker: Broker
) -> None:
    """The job is gone, the unit is not down, and nothing waits for ever."""
    unit, stopping = await begin(fake)
    # It is looked at once its job is known: else the stop would be asked for again.
    before = fake.members["ListUnitsByNames"]
    await until(lambda: fake.members["ListUnitsByNames"] > before)
    broker.kill()
    unit.job = ""
    await restart(broker, fake)
    report = await stopping
    assert (Verdict.FAILED, None) == (report.verdict, report.job_result)
    assert report.verdict_reason.startswith("The stop job is gone and the unit is deactivating")


@pytest.mark.parametrize(("deaf", "asked"), [(True, 2), (False, 1)])
async def test_stop_whose_answer_is_lost_is_asked_for_again_only_if_need_be(
    fake: FakeSystemd, deaf: bool, asked: int
) -> None:
    """After a look at the unit: it stops already where the call had arrived."""
    unit = fake.add("a.service", stop="hangs")
    fake.dies_at, fake.deaf = "StopUnit", deaf
    stopping = asyncio.create_task(stop())
    await fake.called("StopUnit")
    fake.dies_at = ""
    before = fake.members["GetAll"]
    await asyncio.to_thread(fake.rejoin)
    # The keeper of the contact looks, and so does who has asked.
    await until(lambda: fake.members["StopUnit"] >= asked and fake.members["GetAll"] > before + 1)
    end(fake, unit)
    report = await stopping
    assert (asked, "done", "inactive") == (
        fake.members["StopUnit"],
        report.job_result,
        report.active_state,
    )


async def test_stop_that_was_over_before_its_answer_was_lost_is_told(fake: FakeSystemd) -> None:
    """It is neither asked for again nor waited for."""
    fake.add("a.service", stop="plain")
    fake.dies_at, fake.deaf = "StopUnit", False
    stopping = asyncio.create_task(stop())
    await fake.called("StopUnit")
    fake.dies_at = ""
    await asyncio.to_thread(fake.rejoin)
    report = await stopping
    assert (1, None, "inactive") == (
        fake.members["StopUnit"],
        report.job_result,
        report.active_state,
    )


async def test_reload_moves_the_limit_of_the_phase_it_comes_upon(fake: FakeSystemd) -> None:
    """The manager counts the new TimeoutStopSec= from the beginning of the phase."""
    unit, stopping = await begin(fake)
    fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
    unit.more = {"TimeoutStopUSec": Variant("t", 5_000_000)}
    before = fake.members["GetAll"]
    fake.emit(signal(ROOT, MANAGER, "Reloading", "b", False))
    await until(lambda: fake.members["GetAll"] > before)
    end(fake, unit)
    report = await stopping
    (gap,) = gaps(report)
    assert (5_000_000, "SIGKILL", "stop-sigterm") == (gap.limit_us, gap.then, gap.sub_state)
    assert gap.text == "daemon-reload; the stop policy changed"
    assert report.policy is not None
    assert (5_000_000, Verdict.CLEAN) == (report.policy.timeout_stop_us, report.verdict)


@pytest.mark.parametrize("after", ["runs", "failed"])
async def test_what_is_told_of_a_new_run_is_not_the_stops(fake: FakeSystemd, after: str) -> None:
    """Its job, its state and its result, all in one burst with the end of the old one."""
    unit, stopping = await begin(fake)
    job = unit.job
    told = [*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done")]
    ended_us = unit.changed_us
    told.append(signal(ROOT, MANAGER, "JobNew", "uos", 9, f"{ROOT}/job/9", unit.name))
    told += unit.change("active", "running")
    told.append(fake.job_removed(f"{ROOT}/job/9", unit.name, "done"))
    unit.more["InvocationID"] = Variant("ay", bytes(range(1, 17)))
    if after == "failed":
        told += unit.change("failed", "failed", "signal")
    fake.emit(*told)
    report = await stopping
    state = "failed" if after == "failed" else "active"
    assert (Verdict.CLEAN, "done", "success", state) == (
        report.verdict,
        report.job_result,
        report.result,
        report.active_state,
    )
    assert ["stop-sigterm", "dead", "running"] == states(report)
    jobs = [e.kind for e in report.events if e.kind in (EventKind.JOB_NEW, EventKind.JOB_DONE)]
    assert [EventKind.JOB_NEW, EventKind.JOB_DONE] == jobs
    assert ended_us == report.requested_us + report.duration_us


async def test_failure_of_the_stop_outlives_a_new_run(fake: FakeSystemd) -> None:
    """The result of the new run comes ahead of its state, and is not taken for the stop's."""
    unit, stopping = await begin(fake)
    job = unit.job
    told = [*unit.change("failed", "failed", "exit-code")]
    told.append(fake.job_removed(job, unit.name, "done"))
    fake.emit(*told, *unit.change("active", "running"))
    report = await stopping
    assert (Verdict.FAILED, "exit-code", "active") == (
        report.verdict,
        report.result,
        report.active_state,
    )


async def stop_until_job_done(
    fake: FakeSystemd, tell: Callable[[], list[Message]]
) -> asyncio.Task[StopReport]:
    """Stop a.service until what is told last has been heard; nothing is answered after that."""
    heard = asyncio.Event()

    def on_events(events: tuple[Event, ...]) -> None:
        if any(event.kind is EventKind.JOB_DONE for event in events):
            heard.set()

    async def stop_it() -> StopReport:
        async with Host() as host:
            answer = await host.stop(["a"], on_events=on_events)
        assert () == answer.errors
        return answer.data[0]

    stopping = asyncio.create_task(stop_it())
    await fake.called("StopUnit")
    fake.silent = {"*"}
    fake.emit(*tell())
    await heard.wait()
    return stopping


@pytest.mark.parametrize("end", ["kill", "freeze"])
async def test_manager_lost_after_the_end_does_not_cost_the_report(
    fake: FakeSystemd, broker: Broker, end: str
) -> None:
    """What was told and seen stands, soon, and what could not be read is said."""
    unit = fake.add("a.service", stop="hangs")
    done = fake.job_removed(f"{ROOT}/job/1", "a.service", "done")
    stopping = await stop_until_job_done(fake, lambda: [*unit.change("inactive", "dead"), done])
    began = time.monotonic()
    if end == "kill":
        broker.kill()
    report = await stopping
    assert time.monotonic() - began < 5
    assert ("done", "inactive", "success", Verdict.CLEAN) == (
        report.job_result,
        report.active_state,
        report.result,
        report.verdict,
    )
    assert "whether it is in another state by now is not known" in str(report.unread_reason)


async def test_end_whose_state_nobody_told_is_unknown(
    fake: FakeSystemd, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is done, and the manager was lost before it said what the unit is."""
    monkeypatch.setattr(lastword, "LAST_WORD_S", 0.5)
    fake.add("a.service", stop="hangs")
    done = fake.job_removed(f"{ROOT}/job/1", "a.service", "done")
    stopping = await stop_until_job_done(fake, lambda: [done])
    broker.kill()
    report = await stopping
    assert ("done", Verdict.UNKNOWN) == (report.job_result, report.verdict)
    assert report.unread_reason is not None


@pytest.mark.usefixtures("impatient")
async def test_unit_that_was_lost_on_its_way_down_along_is_unknown(
    fake: FakeSystemd, broker: Broker
) -> None:
    """The one that was stopped has ended; what became of the other nobody knows."""
    unit = fake.add("a.service", stop="hangs")
    fake.add("b.service")
    unit.more = {"RequiredBy": Variant("as", ["b.service"])}
    queued = signal(ROOT, MANAGER, "JobNew", "uos", 2, f"{ROOT}/job/2", "b.service")
    done = fake.job_removed(f"{ROOT}/job/1", "a.service", "done")
    stopping = await stop_until_job_done(
        fake, lambda: [queued, *unit.change("inactive", "dead"), done]
    )
    broker.kill()
    report = await stopping
    assert ("done", Verdict.UNKNOWN, ()) == (
        report.job_result,
        report.verdict,
        report.also_stopped,
    )
    assert "what became of b.service is not known" in str(report.unread_reason)


async def test_watch_can_be_ended_while_the_manager_is_away(
    fake: FakeSystemd, broker: Broker
) -> None:
    """Ctrl-C does not wait for it."""
    _, stopping = await begin(fake)
    broker.kill()
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert not stopping.done()
    began = time.monotonic()
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert time.monotonic() - began < 0.5
