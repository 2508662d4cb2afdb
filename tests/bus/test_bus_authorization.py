"""Stops that polkit decides about: who is asked, when, and what a refusal says."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.signature import Variant
from fake_systemd import MANAGER, ROOT, FakeSystemd, signal

from sdtool.errors import AccessDenied, DeadlineExceeded, Exit, Interrupted, UnitMasked
from sdtool.host import Host, StopOptions, stopping
from sdtool.model.answer import Answer
from sdtool.model.stop import EventKind, StopReport, Verdict
from sdtool.sources import bus

SOON_S = 8.0
NEEDS_PERSON = (
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    "Interactive authentication required.",
)
MASKED = "org.freedesktop.systemd1.UnitMasked"
DENIED = ("org.freedesktop.DBus.Error.AccessDenied", "Permission denied")


class Person:
    """Answers polkit's questions: after a moment the manager lets the stop happen, or not."""

    def __init__(
        self,
        fake: FakeSystemd,
        *,
        after_s: float = 0.0,
        error: tuple[str, str] | None = None,
        lack: str | None = None,
    ) -> None:
        self.asked: list[str] = []
        self._fake, self._after_s, self._error, self._lack = fake, after_s, error, lack

    @contextlib.asynccontextmanager
    async def asking(self, unit: str) -> AsyncIterator[str | None]:
        """What the command line does with an agent."""
        self.asked.append(unit)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._after_s):
                await asyncio.Event().wait()  # they type
        if self._error is None:
            del self._fake.errors["StopUnit"]
        else:
            self._fake.errors["StopUnit"] = self._error
        yield self._lack


@pytest.fixture(autouse=True)
def _unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


async def stop(
    person: Person | None = None, options: StopOptions | None = None, *, more: tuple[str, ...] = ()
) -> Answer[StopReport]:
    """Stop a.service, and more, with a person who can be asked or without."""
    options = options or StopOptions(interactive=person is not None)
    async with asyncio.timeout(SOON_S), Host() as host:
        return await host.stop(["a", *more], options, asking=person.asking if person else None)


def refusal(answer: Answer[StopReport]) -> tuple[str, str]:
    """The sentence and the hint of a refusal, which names the unit and the action."""
    (error,) = answer.errors
    assert isinstance(error, AccessDenied)
    assert (Exit.DENIED, "AccessDenied", "a.service") == (error.exit, error.code, error.subject)
    assert {"a.service", "org.freedesktop.systemd1.manage-units"} <= set(
        str(error).replace(",", " ").replace(":", " ").rstrip(".").split()
    )
    return str(error), error.hint or ""


async def test_nobody_is_asked_where_a_rule_allows_it(fake: FakeSystemd) -> None:
    """One call, without the flag: no agent is started for nothing."""
    fake.add("a.service")
    person = Person(fake)
    (report,) = (await stop(person)).data
    assert (Verdict.CLEAN, []) == (report.verdict, person.asked)
    assert [False] == flags(fake)


async def test_nobody_is_asked_where_a_rule_forbids_it(fake: FakeSystemd) -> None:
    """A password would not help."""
    fake.add("a.service", "polkit.service")
    fake.errors["StopUnit"] = DENIED
    person = Person(fake)
    sentence, hint = refusal(await stop(person))
    assert ([], True, True) == (person.asked, "rules" in sentence, "rules.d" in hint)


async def test_person_is_asked_where_the_manager_needs_one(fake: FakeSystemd) -> None:
    """A second call, with the flag, while an agent is there."""
    fake.add("a.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    person = Person(fake)
    (report,) = (await stop(person)).data
    assert (Verdict.CLEAN, ["a.service"]) == (report.verdict, person.asked)
    assert [False, True] == flags(fake)


def flags(fake: FakeSystemd) -> list[bool]:
    """Whether polkit could ask, for each StopUnit."""
    calls = [call for call in fake.calls if call.member == "StopUnit"]
    return [bool(call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION) for call in calls]


async def test_time_of_the_question_is_not_the_stops(fake: FakeSystemd) -> None:
    """Neither its duration nor its deadline, and nothing happened before the request."""
    fake.add("a.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    options = StopOptions(interactive=True, deadline_s=0.5)
    answer = await stop(Person(fake, after_s=0.8), options)
    (report,) = answer.data
    assert ((), True) == (answer.errors, report.duration_us < 400_000)
    times = [e.at_us for e in report.events if e.kind is EventKind.STATE]
    assert report.requested_us <= min(times)


async def test_time_of_the_question_is_no_other_units_either(fake: FakeSystemd) -> None:
    """One that is asked for after it, and what goes down along with that, begins afterwards."""
    fake.add("a.service")
    unit = fake.add("b.service", stop="hangs")
    along = fake.add("c.service")
    unit.more = {"RequiredBy": Variant("as", ["c.service"])}
    fake.errors["StopUnit"] = NEEDS_PERSON
    stopping = asyncio.create_task(stop(Person(fake, after_s=0.8), more=("b",)))
    await fake.called_often("StopUnit", 3)
    queued = signal(ROOT, MANAGER, "JobNew", "uos", 9, f"{ROOT}/job/9", "c.service")
    done = fake.job_removed(f"{ROOT}/job/9", "c.service", "done")
    fake.emit(queued, *along.change("inactive", "dead"), done)
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, "b.service", "done"))
    reports = (await stopping).data
    reports += reports[1].along
    assert ["a.service", "b.service", "c.service"] == [report.unit for report in reports]
    assert [True] * 3 == [report.duration_us < 400_000 for report in reports]
    for report in reports:
        times = [e.at_us for e in report.events if e.kind in (EventKind.STATE, EventKind.JOB_NEW)]
        assert report.requested_us <= min(times)


async def test_unit_that_is_down_with_the_first_keeps_its_time(fake: FakeSystemd) -> None:
    """Whoever is asked about it later: it went with the job that it had by then."""
    fake.add("a.service")
    pulled = fake.add("b.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    person = Person(fake, after_s=0.8)
    stopping = asyncio.create_task(stop(person, more=("b",)))
    await fake.called_often("StopUnit", 1)
    queued = signal(ROOT, MANAGER, "JobNew", "uos", 9, f"{ROOT}/job/9", "b.service")
    done = fake.job_removed(f"{ROOT}/job/9", "b.service", "done")
    fake.emit(queued, *pulled.change("inactive", "dead"), done)
    went_us = pulled.changed_us
    report = (await stopping).data[1]
    assert ("b.service", "done") == (report.unit, report.job_result)
    assert abs(report.requested_us - went_us) < 200_000


async def test_deadline_counts_from_the_job(fake: FakeSystemd) -> None:
    """It passes all the same once the person has answered."""
    fake.add("a.service", stop="hangs")
    fake.errors["StopUnit"] = NEEDS_PERSON
    options = StopOptions(interactive=True, deadline_s=0.4)
    (error,) = (await stop(Person(fake, after_s=0.6), options)).errors
    assert isinstance(error, DeadlineExceeded)
    assert "is still stopping after 0.4 s" in str(error)


async def test_reload_during_the_question_moves_the_deadline(
    fake: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What systemd's limits are is asked when the clock goes on."""
    monkeypatch.setattr(stopping, "MARGIN_S", 0.1)
    unit = fake.add("a.service", stop="hangs")
    unit.more = {"TimeoutStopUSec": Variant("t", 100_000)}
    fake.errors["StopUnit"] = NEEDS_PERSON
    person = Person(fake)
    answer_it = person.asking

    @contextlib.asynccontextmanager
    async def asking(name: str) -> AsyncIterator[None]:
        fake.emit(signal(ROOT, MANAGER, "Reloading", "b", True))
        unit.more = {"TimeoutStopUSec": Variant("t", 20_000_000)}
        before = fake.members["GetAll"]
        fake.emit(signal(ROOT, MANAGER, "Reloading", "b", False))
        await fake.called_often("GetAll", before + 1)
        async with answer_it(name):
            yield

    person.asking = asking  # type: ignore[method-assign]
    stopped = asyncio.create_task(stop(person))
    await fake.called_often("StopUnit", 2)
    # Longer than the old limits together.
    await asyncio.wait({stopped}, timeout=1.0)
    job = unit.job
    fake.emit(*unit.change("inactive", "dead"), fake.job_removed(job, unit.name, "done"))
    answer = await stopped
    assert () == answer.errors
    (report,) = answer.data
    assert (Verdict.CLEAN, "done") == (report.verdict, report.job_result)
    assert report.policy is not None
    assert 20_000_000 == report.policy.timeout_stop_us


async def test_interrupt_at_the_question_leaves_what_has_stopped(fake: FakeSystemd) -> None:
    """A rule allows one unit: its report is there, and of the other no job is told."""
    fake.add("a.service", "b.service", "c.service")
    interrupt = asyncio.Event()

    def on_request(unit: str) -> None:
        if unit == "b.service":
            fake.errors["StopUnit"] = NEEDS_PERSON

    @contextlib.asynccontextmanager
    async def asking(unit: str) -> AsyncIterator[None]:
        interrupt.set()
        await asyncio.Event().wait()  # they type
        yield

    async with asyncio.timeout(SOON_S), Host() as host:
        answer = await host.stop(
            "abc",
            StopOptions(interactive=True),
            on_request=on_request,
            asking=asking,
            interrupt=interrupt,
        )
    assert [("a.service", Verdict.CLEAN)] == [(r.unit, r.verdict) for r in answer.data]
    assert [
        (Interrupted, "Interrupted before b.service was authorized to stop."),
        (Interrupted, "Interrupted before c.service was asked to stop."),
    ] == [(type(error), str(error)) for error in answer.errors]


@pytest.mark.parametrize("how", ["allowed", "refused"])
async def test_interrupt_after_the_question_tells_the_answer(fake: FakeSystemd, how: str) -> None:
    """The question is over: what it led to counts."""
    fake.add("a.service", stop="hangs")
    fake.add("b.service", stop="hangs")
    fake.errors["StopUnit"] = NEEDS_PERSON
    person, interrupt = Person(fake, error=DENIED if how == "refused" else None), asyncio.Event()

    def on_request(unit: str) -> None:
        if unit == "b.service":
            fake.errors.clear()
            asyncio.get_running_loop().call_later(0.2, interrupt.set)

    async with asyncio.timeout(SOON_S), Host() as host:
        options = StopOptions(interactive=True)
        answer = await host.stop(
            "ab", options, on_request=on_request, asking=person.asking, interrupt=interrupt
        )
    kinds = [Interrupted if how == "allowed" else AccessDenied, Interrupted]
    assert kinds == [type(error) for error in answer.errors]
    assert () == answer.data


async def test_question_that_nobody_answers_ends(
    fake: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a deadline of its own, and says so."""
    monkeypatch.setattr(bus, "INTERACTIVE_TIMEOUT_S", 0.3)
    fake.add("a.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    person = Person(fake)

    @contextlib.asynccontextmanager
    async def asking(unit: str) -> AsyncIterator[None]:
        fake.silent.add("StopUnit")
        yield

    person.asking = asking  # type: ignore[method-assign]
    assert "nobody gave it within" in refusal(await stop(person))[0]


@pytest.mark.parametrize(
    ("state", "sentence", "hint"),
    [
        (("masked", "inactive", "dead"), "masked", "unmask"),
        (("not-found", "inactive", "dead"), "not installed", "install"),
        (("loaded", "failed", "failed"), "polkit.service is failed", "systemctl status"),
        (("loaded", "active", "running"), "rules do not give it", "rules.d"),
    ],
)
async def test_refusal_says_who_refused(
    fake: FakeSystemd, state: tuple[str, str, str], sentence: str, hint: str
) -> None:
    """The manager's word is the same for all of them; polkit's unit tells them apart."""
    fake.add("a.service")
    load_state, active_state, sub_state = state
    fake.add(
        "polkit.service", load_state=load_state, active_state=active_state, sub_state=sub_state
    )
    fake.errors["StopUnit"] = DENIED
    said, advice = refusal(await stop())
    assert (True, True, True) == (sentence in said, hint in advice, "root" in advice)


@pytest.mark.parametrize("name", ["polkit.service", "another.service"])
async def test_masked_unit_is_polkit_where_polkit_is_masked(fake: FakeSystemd, name: str) -> None:
    """A masked unit can itself be stopped; polkit's unit decides, not the words."""
    fake.add("a.service")
    fake.add("polkit.service", load_state="masked", active_state="inactive", sub_state="dead")
    fake.errors["StopUnit"] = (MASKED, f"Unit {name} is masked.")
    said, advice = refusal(await stop())
    assert (True, True) == ("polkit is masked" in said, "unmask" in advice)


async def test_masked_unit_is_not_polkit_where_polkit_runs(fake: FakeSystemd) -> None:
    """Exit 6 then, whatever the words are."""
    fake.add("a.service", "polkit.service")
    fake.errors["StopUnit"] = (MASKED, "Unit polkit.service is masked.")
    (error,) = (await stop()).errors
    assert (UnitMasked, "a.service") == (type(error), error.subject)


async def test_refusal_after_a_question_says_what_became_of_it(fake: FakeSystemd) -> None:
    """No agent at all is another thing than a wrong password."""
    fake.add("a.service", "polkit.service")
    said = []
    for error in (DENIED, NEEDS_PERSON):
        fake.errors["StopUnit"] = NEEDS_PERSON
        said.append(refusal(await stop(Person(fake, error=error)))[0])
    assert ["authentication failed" in said[0], "no polkit agent" in said[1]] == [True, True]


async def test_refusal_says_what_kept_the_agent_away(fake: FakeSystemd) -> None:
    """Whoever sees to it that somebody is asked knows why that cannot be."""
    fake.add("a.service", "polkit.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    person = Person(fake, error=NEEDS_PERSON, lack="pkttyagent is not installed")
    sentence, hint = refusal(await stop(person))
    assert sentence.endswith("no polkit agent could ask for it: pkttyagent is not installed.")
    assert "pkttyagent" in hint


async def test_refusal_without_a_question_says_how_to_be_asked(fake: FakeSystemd) -> None:
    """In a script, and with --no-ask-password."""
    fake.add("a.service", "polkit.service")
    fake.errors["StopUnit"] = NEEDS_PERSON
    sentence, hint = refusal(await stop())
    assert (True, True) == ("nobody was asked" in sentence, "on a terminal" in hint)


async def test_frozen_polkit_does_not_hold_the_stop_up(fake: FakeSystemd) -> None:
    """The manager answers everything but the stop."""
    fake.add("a.service", "polkit.service")
    fake.silent.add("StopUnit")
    assert "polkit does not answer within 3.5 s" in refusal(await stop())[0]
