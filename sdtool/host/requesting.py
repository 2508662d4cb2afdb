"""How a stop job is got: asked for once, decided by a person where polkit wants one, explained.

The manager is asked without a person first, and only where it says that one is needed is there a
question: nothing is started for a rule that says yes or no. Where the answer was lost with the
connection the unit says whether there is a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from sdtool.analysis.authorization import (
    explain_refusal,
    is_polkits,
    may_be_polkits,
    needs_person,
)
from sdtool.analysis.phases import ENDED
from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.host.session import Session
from sdtool.host.stopwatch import StopWatch
from sdtool.host.told import State
from sdtool.model.names import POLKIT
from sdtool.model.scope import Scope
from sdtool.sources.systemd import Manager

ASK_AGAIN = 3
"""How often a stop is asked for anew when the manager was lost before it had answered."""

Asking = Callable[[str], AbstractAsyncContextManager[str | None]]
"""Entered with a unit's name while polkit may ask a person about it.

It says why no agent of ours can ask, for the case that no other does; None where one can.
"""


async def request_stop(
    session: Session,
    watch: StopWatch,
    later: Sequence[StopWatch],
    asking: Asking,
    *,
    interactive: bool,
) -> None:
    """Queue the stop job; a refusal becomes the watch's ``failure``, with what would lift it.

    Args:
        later: Those that are asked for after this one: a question holds them up too.
        interactive: A person may be asked.
    """
    await _request(session, watch, interactive=False)
    refusal = watch.failure
    if refusal is None or not (_asks_polkit(session) and may_be_polkits(refusal)):
        return
    asked = interactive and needs_person(refusal)
    lack = None
    if asked:
        for waiting in (watch, *later):
            for each in (waiting, *waiting.along):
                each.told.begin_after_question()
        async with asking(watch.name) as lack:
            await _request(session, watch, interactive=True)
    if watch.failure is not None and may_be_polkits(watch.failure):
        watch.failure = await _explain(session, watch.name, watch.failure, asked=asked, lack=lack)


async def _request(session: Session, watch: StopWatch, *, interactive: bool) -> None:
    """Ask for the job, and hand the watch the answer."""
    watch.told.expect_job()
    try:
        manager = await session.manager()
        answer = await _queue_job(manager, watch, interactive=interactive)
    except SdtoolError as error:
        watch.refuse(error)
        return
    if isinstance(answer, str):
        watch.take_job(answer)
    else:
        watch.take_lost_job(answer.state)


@dataclass(frozen=True, slots=True)
class _Lost:
    """There was a job perhaps, and there is none any more: what the unit is now."""

    state: State | None


async def _queue_job(manager: Manager, watch: StopWatch, *, interactive: bool) -> str | _Lost:
    """Queue the job; where the answer was lost look first, and ask again only if need be."""
    ask = partial(manager.queue_job, "stop", watch.name, interactive=interactive)
    job = await ask()
    for _ in range(ASK_AGAIN):
        if job is not None:
            return job
        state = await _look(watch)
        if state is None:
            return _Lost(None)
        unit, path = state[0].unit, state[0].job_path
        if unit.job == "stop" and path is not None:
            return path
        if unit.job is not None or unit.active_state in ENDED:
            return _Lost(state)
        if interactive:
            # The agent's question went with the connection: it could not be answered any more.
            sentence = f"The manager was lost while {watch.name} was to be authorized to stop."
            raise Unavailable(sentence, subject=watch.name, hint="nothing was stopped: try again")
        # No job of ours: the unit may be going down all the same, and a job then joins in.
        job = await ask()
    if job is None:
        sentence = f"The manager was lost each time that {watch.name} was to be stopped."
        raise Unavailable(sentence, subject=watch.name)
    return job


async def _look(watch: StopWatch) -> State | None:
    """The unit after an answer that was lost."""
    try:
        return await watch.read_state()
    except Unavailable as error:
        raise Unavailable(
            f"The manager was lost when {watch.name} was to be stopped.",
            subject=watch.name,
            hint=f"whether the job was queued is not known: {error}",
        ) from error


def _asks_polkit(session: Session) -> bool:
    """Whether polkit has a say: it has none for root, nor with a user's own manager."""
    return session.scope is Scope.SYSTEM and os.geteuid() != 0


async def _explain(
    session: Session, unit: str, error: SdtoolError, *, asked: bool, lack: str | None
) -> SdtoolError:
    """Say who refused, and what would lift it; an error that is not polkit's stays as it is."""
    try:
        manager = await session.manager()
        (polkit,) = await manager.list_named([POLKIT])
    except SdtoolError:
        return error  # it is the manager that does not answer
    if not is_polkits(error, polkit):
        return error
    sentence, hint = explain_refusal(unit, polkit, error, asked=asked, lack=lack)
    reason = error.reason if isinstance(error, AccessDenied) else None
    return AccessDenied(sentence, subject=unit, hint=hint, reason=reason)
