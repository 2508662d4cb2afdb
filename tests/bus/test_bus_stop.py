"""Host.stop against a manager that is early, loud, slow, dying or gone."""

from __future__ import annotations

import asyncio

import pytest
from fake_systemd import NAME, ROOT, FakeSystemd
from private_broker import Broker

from sdtool.errors import (
    CriticalUnit,
    DeadlineExceeded,
    Exit,
    Interrupted,
    SdtoolError,
    Unavailable,
)
from sdtool.host import Host, StopOptions
from sdtool.model.answer import Answer
from sdtool.model.stop import EventKind, StopReport, Verdict

SOON_S = 6.0


async def stop(*units: str, options: StopOptions | None = None) -> Answer[StopReport]:
    """Stop units through a host of their own, in time."""
    async with asyncio.timeout(SOON_S), Host() as host:
        return await host.stop(units, options)


def states(report: StopReport) -> list[str | None]:
    """The sub states that a report tells, in order."""
    return [event.sub_state for event in report.events if event.kind is EventKind.STATE]


def only_error(answer: Answer[StopReport]) -> SdtoolError:
    """The one error of an answer without data."""
    (error,) = answer.errors
    assert () == answer.data
    return error


@pytest.mark.parametrize("style", ["plain", "early", "noisy"])
async def test_stop_tells_each_state_once(fake: FakeSystemd, style: str) -> None:
    """Also when JobRemoved comes before StopUnit's reply, and with dozens of duplicates."""
    fake.add("a.service", stop=style)
    answer = await stop("a")
    (report,) = answer.data
    assert ((), Verdict.CLEAN) == (answer.errors, report.verdict)
    assert ("done", "inactive") == (report.job_result, report.active_state)
    assert ["stop-sigterm", "dead"] == states(report)


async def test_stop_arms_before_it_asks(fake: FakeSystemd) -> None:
    """Signals and reference are asked for before the call whose effect is watched."""
    fake.add("a.service")
    await stop("a")
    order = [call.member for call in fake.calls if call.member in ("Subscribe", "Ref", "StopUnit")]
    assert ["Subscribe", "Ref", "StopUnit"] == order


async def test_stop_that_fails_says_so(fake: FakeSystemd) -> None:
    """The job is done all the same."""
    fake.add("a.service", stop="fails")
    (report,) = (await stop("a")).data
    assert ("done", "failed", "timeout") == (
        report.job_result,
        report.active_state,
        report.result,
    )
    assert Verdict.CLEAN != report.verdict


async def test_stop_that_somebody_cancels_is_not_clean(fake: FakeSystemd) -> None:
    """The job ends as canceled, with the unit still on its way down."""
    fake.add("a.service", stop="canceled")
    (report,) = (await stop("a")).data
    assert ("canceled", "deactivating") == (report.job_result, report.active_state)
    assert Verdict.CLEAN != report.verdict


async def test_stop_ignores_another_job_of_the_unit(fake: FakeSystemd) -> None:
    """A start job's JobRemoved looks the same but for its path."""
    fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    fake.emit(fake.job_removed(f"{ROOT}/job/999", "a.service", "canceled"))
    fake.emit(fake.job_removed(f"{ROOT}/job/1", "b.service", "failed"))
    fake.emit(*fake.units["a.service"].change("inactive", "dead"))
    fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
    (report,) = (await stopping).data
    assert ("done", Verdict.CLEAN) == (report.job_result, report.verdict)


async def test_stop_of_several_units_reports_on_each(fake: FakeSystemd) -> None:
    """In the order asked; what cannot be stopped is an error beside them."""
    fake.add("a.service", "b.service", stop="early")
    fake.add("c.service", stop="fails")
    answer = await stop("c", "absent", "a", "b")
    assert ["c.service", "a.service", "b.service"] == [report.unit for report in answer.data]
    assert ["absent.service"] == [error.subject for error in answer.errors]


async def test_second_stop_through_one_host_is_watched_too(fake: FakeSystemd) -> None:
    """The connection, and with it the subscription, is the first one's."""
    fake.add("a.service", "b.service")
    async with Host() as host:
        answers = [await host.stop([name]) for name in ("a", "b")]
    assert [()] * 2 == [answer.errors for answer in answers]
    assert [["stop-sigterm", "dead"]] * 2 == [states(answer.data[0]) for answer in answers]


async def test_stop_whose_end_was_not_told_ends(fake: FakeSystemd) -> None:
    """A lost JobRemoved (daemon-reexec) is noticed by asking now and then."""
    unit = fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    unit.change("inactive", "dead")
    (report,) = (await stopping).data
    assert (None, "inactive") == (report.job_result, report.active_state)


async def test_stop_of_a_unit_that_is_forgotten_is_reported(fake: FakeSystemd) -> None:
    """A transient unit is gone with its job, where no reference may be held."""
    fake.add("run-1.service", stop="vanishes")
    fake.errors["Ref"] = ("org.freedesktop.DBus.Error.AccessDenied", "No.")
    answer = await stop("run-1")
    assert ((), ["run-1.service"]) == (answer.errors, [report.unit for report in answer.data])


async def test_stop_gives_up_at_its_deadline(fake: FakeSystemd) -> None:
    """Exit 75, and the job goes on."""
    fake.add("a.service", stop="hangs")
    error = only_error(await stop("a", options=StopOptions(deadline_s=0.2)))
    assert (DeadlineExceeded, Exit.DEADLINE) == (type(error), error.exit)
    assert ("a.service", True) == (error.subject, "the stop job goes on" in str(error))


def put_out_of_reach(fake: FakeSystemd, broker: Broker, end: str) -> None:
    """Kill the broker, have the manager leave it, or have the manager fall silent."""
    if end == "kill":
        broker.kill()
    elif end == "manager":
        fake.hang_up()
    else:
        fake.silent = {"*"}


@pytest.mark.parametrize("end", ["kill", "manager", "freeze"])
@pytest.mark.parametrize("after_s", [0.2, 2])
async def test_deadline_says_so_where_the_manager_is_out_of_reach(
    fake: FakeSystemd, broker: Broker, end: str, after_s: float
) -> None:
    """Whether the job goes on nobody can see: here it does not."""
    unit = fake.add("a.service", stop="hangs")
    options = StopOptions(deadline_s=after_s)
    async with asyncio.timeout(SOON_S), Host() as host:
        stopping = asyncio.create_task(host.stop(["a"], options))
        await fake.called("StopUnit")
        put_out_of_reach(fake, broker, end)
        unit.change("inactive", "dead")
        error = only_error(await stopping)
    assert (DeadlineExceeded, "a.service") == (type(error), error.subject)
    assert "Whether a.service has stopped, or its stop job goes on, is not known" in str(error)
    assert f"after {after_s:g} s: the manager has been out of reach for" in str(error)


async def test_deadline_during_the_last_look_does_not_cost_the_report(fake: FakeSystemd) -> None:
    """The job is over: nothing goes on any more."""
    unit = fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a", options=StopOptions(deadline_s=0.6)))
    await fake.called("StopUnit")
    fake.silent = {"ListUnitsByNames"}
    fake.emit(*unit.change("inactive", "dead"))
    fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
    await asyncio.wait({stopping}, timeout=0.5)
    assert not stopping.done()
    fake.silent = set()
    (report,) = (await stopping).data
    assert ("done", Verdict.CLEAN) == (report.job_result, report.verdict)


async def test_interrupt_leaves_an_answer(fake: FakeSystemd) -> None:
    """A report where the job is over; else what is known of it."""
    fake.add("a.service", "d.service", stop="early")
    fake.add("b.service", "c.service", stop="hangs")
    interrupt, asked = asyncio.Event(), list[str]()

    def on_request(unit: str) -> None:
        asked.append(unit)
        if unit == "c.service":
            fake.silent = {"StopUnit"}
            asyncio.get_running_loop().call_later(0.2, interrupt.set)

    async with asyncio.timeout(SOON_S), Host() as host:
        answer = await host.stop("abcd", on_request=on_request, interrupt=interrupt)
    assert ["a.service", "b.service", "c.service"] == asked
    assert [("a.service", Verdict.CLEAN)] == [(r.unit, r.verdict) for r in answer.data]
    assert [
        (
            Interrupted,
            "No longer watching; b.service is still stopping, and the stop job goes on.",
        ),
        (
            Interrupted,
            "No longer watching; c.service was asked to stop, and the answer was not waited for.",
        ),
        (Interrupted, "Interrupted before d.service was asked to stop."),
    ] == [(type(error), str(error)) for error in answer.errors]


@pytest.mark.parametrize("end", ["kill", "manager", "freeze"])
async def test_interrupt_says_so_where_the_manager_is_out_of_reach(
    fake: FakeSystemd, broker: Broker, end: str
) -> None:
    """Half a second later at most: what happened meanwhile nobody can see."""
    unit = fake.add("a.service", stop="hangs")
    interrupt, now = asyncio.Event(), asyncio.get_running_loop().time
    async with asyncio.timeout(SOON_S), Host() as host:
        stopping = asyncio.create_task(host.stop(["a"], interrupt=interrupt))
        await fake.called("StopUnit")
        await asyncio.wait({stopping}, timeout=0.3)
        put_out_of_reach(fake, broker, end)
        unit.change("inactive", "dead")
        interrupt.set()
        began = now()
        error = only_error(await stopping)
        assert now() - began < 1.0
    assert (Interrupted, "a.service") == (type(error), error.subject)
    assert "whether a.service has stopped, or its stop job goes on, is not known" in str(error)


async def test_interrupt_after_the_job_does_not_cost_the_report(fake: FakeSystemd) -> None:
    """Nothing goes on any more: what the manager does not tell in half a second is not known."""
    unit = fake.add("a.service", stop="hangs")
    interrupt = asyncio.Event()
    async with asyncio.timeout(SOON_S), Host() as host:
        stopping = asyncio.create_task(host.stop(["a"], interrupt=interrupt))
        await fake.called("StopUnit")
        await asyncio.wait({stopping}, timeout=0.3)
        fake.silent = {"GetAll"}
        fake.emit(*unit.change("inactive", "dead"))
        fake.emit(fake.job_removed(f"{ROOT}/job/1", "a.service", "done"))
        await asyncio.wait({stopping}, timeout=0.2)
        interrupt.set()
        done, _ = await asyncio.wait({stopping}, timeout=1.5)
        assert {stopping} == done
        answer = await stopping
    assert () == answer.errors
    assert [("done", "inactive")] == [(r.job_result, r.active_state) for r in answer.data]


@pytest.mark.parametrize("end", ["kill", "manager", "freeze"])
async def test_stop_ends_when_the_manager_is_out_of_reach(
    fake: FakeSystemd, broker: Broker, impatient: None, end: str
) -> None:
    """Exit 69 whether the broker dies, the manager leaves the bus or it just falls silent."""
    fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    put_out_of_reach(fake, broker, end)
    error = only_error(await stopping)
    assert (True, Exit.UNAVAILABLE) == (isinstance(error, Unavailable), error.exit)
    assert "a.service" == error.subject


async def test_stop_whose_request_dies_with_the_manager_is_unavailable(
    fake: FakeSystemd, impatient: None
) -> None:
    """Nobody knows whether the job was queued."""
    fake.add("a.service")
    fake.dies_at = "StopUnit"
    error = only_error(await stop("a"))
    assert (True, "a.service") == (isinstance(error, Unavailable), error.subject)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", Exit.DENIED),
        (f"{NAME}.OnlyByDependency", Exit.DENIED),
        (f"{NAME}.NoSuchUnit", Exit.NO_SUCH_UNIT),
        (f"{NAME}.JobTypeNotApplicable", Exit.NOT_APPLICABLE),
        (f"{NAME}.ShuttingDown", Exit.UNAVAILABLE),
    ],
)
async def test_stop_that_is_refused_is_an_error(
    fake: FakeSystemd, name: str, expected: Exit
) -> None:
    """The error's own exit status, and nothing is waited for."""
    fake.add("a.service")
    fake.errors["StopUnit"] = (name, "No.")
    assert expected == only_error(await stop("a")).exit


async def test_stop_needs_no_reference_and_no_other_unit(fake: FakeSystemd) -> None:
    """What is refused beside it, a reference or a critical unit, does not keep it from ending."""
    fake.add("a.service", "init.scope")
    fake.errors["Ref"] = ("org.freedesktop.DBus.Error.AccessDenied", "No.")
    answer = await stop("init.scope", "a")
    assert ["a.service"] == [report.unit for report in answer.data]
    assert [(CriticalUnit, "init.scope")] == [(type(e), e.subject) for e in answer.errors]
    assert [["a.service", "replace"]] == [c.body for c in fake.calls if c.member == "StopUnit"]
