"""Bad moments that fall between two steps: each was once told wrong, or waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator

import pytest
from dbus_next.signature import Variant
from fake_systemd import FakeSystemd
from private_broker import Broker

from sdtool.errors import AccessDenied, InvalidArgument, Unavailable
from sdtool.host import Host, StopOptions
from sdtool.model.answer import Answer
from sdtool.model.scope import Scope
from sdtool.model.stop import EventKind, Evidence, StopReport, Verdict
from sdtool.sources import systemd
from sdtool.sources.systemd import Manager

NEEDS_PERSON = ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "Needed.")


async def stop(*units: str, deadline_s: float = 8.0) -> Answer[StopReport]:
    """Stop units within a deadline that no test should need."""
    async with Host() as host:
        return await host.stop(units, StopOptions(deadline_s=deadline_s))


async def let_pass(seconds: float) -> None:
    """Let time pass: it is what the test is about."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


async def called_again(fake: FakeSystemd, member: str) -> None:
    """Wait until a member is called once more."""
    await fake.called_often(member, fake.members[member] + 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["cancelled", "refused"])
async def test_question_without_an_answer_costs_the_next_one_nothing(
    fake: FakeSystemd, how: str
) -> None:
    """Patience begins with what failed, not with what was cancelled or could not be sent."""
    async with await Manager.open(Scope.SYSTEM) as manager:
        fake.silent = {"ListUnits"}
        if how == "cancelled":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(manager.list_units(), 0.1)
        else:
            with pytest.raises(InvalidArgument):
                await manager.list_units(["\ud800*"])
        await let_pass(systemd.PATIENCE_S)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await manager.list_units()
    assert time.monotonic() - began > systemd.PATIENCE_S / 2


async def test_job_that_ends_between_two_looks_is_over(fake: FakeSystemd) -> None:
    """The answer to StopUnit is lost; the unit's row still has the job, its property not."""
    unit = fake.add("a.service", stop="hangs")
    unit.more = {"Job": Variant("(uo)", [0, "/"])}
    fake.dies_at, fake.deaf = "StopUnit", False
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    fake.dies_at = ""
    await asyncio.to_thread(fake.rejoin)
    await fake.called("GetAll")
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))

    answer = await stopping

    assert () == answer.errors
    assert ["inactive"] == [report.active_state for report in answer.data]


async def test_gap_begins_with_the_loss(fake: FakeSystemd) -> None:
    """The manager leaves while it is asked whether it is there: the gap is not dated later."""
    unit = fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    fake.dies_at = "ListUnitsByNames"
    await called_again(fake, "ListUnitsByNames")
    lost_us = time.monotonic_ns() // 1000
    fake.dies_at = ""
    await let_pass(1.0)
    seen = [called_again(fake, member) for member in ("Subscribe", "GetAll")]
    await asyncio.gather(*seen, asyncio.to_thread(fake.rejoin))
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))

    (report,) = (await stopping).data

    (gap,) = [event for event in report.events if event.kind is EventKind.GAP]
    assert gap.at_min_us is not None
    assert gap.at_min_us - lost_us < 300_000


async def test_end_that_is_told_during_a_look_has_its_own_time(fake: FakeSystemd) -> None:
    """The look takes its time, and the signal waits: it was observed when it came in."""
    unit = fake.add("a.service", stop="hangs")
    stopping = asyncio.create_task(stop("a"))
    await fake.called("StopUnit")
    fake.silent = {"ListUnitsByNames"}
    await called_again(fake, "ListUnitsByNames")
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))
    await let_pass(0.5)
    fake.silent = set()
    await asyncio.to_thread(fake.rejoin)

    (report,) = (await stopping).data

    (done,) = [event for event in report.events if event.kind is EventKind.JOB_DONE]
    assert ("done", Evidence.OBSERVED) == (report.job_result, done.evidence)
    assert done.at_us - unit.changed_us < 200_000


async def test_look_at_many_units_is_one_question(fake: FakeSystemd) -> None:
    """Only what has gone on without a word is read unit by unit."""
    names = [f"unit-{number}.service" for number in range(100)]
    fake.add(*names, stop="hangs")
    stopping = asyncio.create_task(stop(*names))
    await fake.called_often("StopUnit", len(names))
    await called_again(fake, "ListUnitsByNames")
    before = fake.members["GetAll"]
    for _ in range(2):
        await called_again(fake, "ListUnitsByNames")
    assert before == fake.members["GetAll"]
    lost, *told = fake.units.values()
    lost.change("inactive", "dead")
    for unit in told:
        job = unit.job
        fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))

    reports = (await stopping).data

    assert [None] + ["done"] * 99 == [report.job_result for report in reports]


@pytest.mark.usefixtures("impatient")
async def test_unit_behind_a_question_is_not_asked_for_once_the_manager_is_lost(
    fake: FakeSystemd, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a person is asked about one unit the manager goes for good: no report of the other."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(systemd, "SPENT_S", 0.3)
    fake.add("a.service", "polkit.service")
    fake.add("b.service", stop="hangs")
    fake.errors["StopUnit"] = NEEDS_PERSON

    @contextlib.asynccontextmanager
    async def asking(unit: str) -> AsyncIterator[None]:
        broker.kill()
        await let_pass(3)
        await asyncio.to_thread(broker.restart)
        await asyncio.to_thread(fake.rejoin)
        yield

    async with Host() as host:
        options = StopOptions(interactive=True, deadline_s=10)
        answer = await host.stop(["a", "b"], options, asking=asking)

    assert () == answer.data
    assert {"a.service", "b.service"} == {error.subject for error in answer.errors}
    assert "before b.service was asked" in str(answer.errors[-1])


async def test_frozen_polkit_is_not_taken_for_a_frozen_manager(
    fake: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the reference nor the job is answered, everything else is: a denial, in time."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    fake.add("a.service", "polkit.service")
    fake.silent = {"Ref", "StopUnit"}
    began = time.monotonic()

    answer = await stop("a")

    (error,) = answer.errors
    assert isinstance(error, AccessDenied)
    assert "polkit does not answer" in str(error)
    assert time.monotonic() - began < 5.5


async def test_stop_that_is_answered_is_still_clean(fake: FakeSystemd) -> None:
    """What these tests change is not what they see in a good moment."""
    fake.add("a.service")
    (report,) = (await stop("a")).data
    assert Verdict.CLEAN is report.verdict
