"""How a stop job is got: asked for once, decided by a person where polkit wants one, explained.

The manager is asked without a person first, and only where it says that one is needed is there a
question: nothing is started for a rule that says yes or no. Where the answer was lost with the
connection the unit says whether there is a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from sdtool.analysis.phases import ENDED
from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.host.session import Session
from sdtool.host.stopwatch import StopWatch
from sdtool.host.told import State
from sdtool.model.scope import Scope
from sdtool.model.unit import Unit
from sdtool.sources.bus import CALL_TIMEOUT_S, INTERACTIVE_TIMEOUT_S, NoAnswer
from sdtool.sources.messages import (
    AUTHORIZATION_REQUIRED,
    MANAGE_UNITS,
    ONLY_BY_DEPENDENCY,
    POLKIT,
)
from sdtool.sources.systemd import Manager

ASK_AGAIN = 3
"""How often a stop is asked for anew when the manager was lost before it had answered."""


Asking = Callable[[str], AbstractAsyncContextManager[None]]
"""Entered with a unit's name while polkit may ask a person about it."""


async def request_stop(
    session: Session, watch: StopWatch, asking: Asking, *, interactive: bool
) -> None:
    """Queue the stop job; a refusal becomes the watch's ``failure``, with what would lift it.

    Args:
        interactive: A person may be asked.
    """
    await _request(session, watch, interactive=False)
    refusal = watch.failure
    if refusal is None or not _is_polkits(session, refusal):
        return
    asked = interactive and _needs_person(refusal)
    if asked:
        for each in (watch, *watch.along):
            each.told.begin(after_question=True)
        async with asking(watch.name):
            await _request(session, watch, interactive=True)
    if watch.failure is not None:
        watch.failure = await _explain(session, watch.name, watch.failure, asked=asked)


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


def _is_polkits(session: Session, error: SdtoolError) -> bool:
    """Whether polkit had a say: it has none for root, nor with a user's own manager."""
    if session.scope is not Scope.SYSTEM or os.geteuid() == 0:
        return False
    if isinstance(error, AccessDenied):
        return error.name != ONLY_BY_DEPENDENCY
    return _is_silence(error)


def _is_silence(error: SdtoolError) -> bool:
    cause = error.__cause__
    return isinstance(error, Unavailable) and isinstance(cause, NoAnswer) and cause.silent


def _needs_person(error: SdtoolError) -> bool:
    return isinstance(error, AccessDenied) and error.name == AUTHORIZATION_REQUIRED


async def _explain(session: Session, unit: str, error: SdtoolError, *, asked: bool) -> SdtoolError:
    """Say who refused, and what would lift it.

    The manager says "Permission denied" for a rule that says no, for a person who could not
    prove who they are, and for a polkit that is not there: only its unit tells them apart.
    """
    try:
        manager = await session.manager()
        (polkit,) = await manager.list_named([POLKIT])
    except SdtoolError:
        return error  # it is the manager that does not answer
    sentence, hint = _words(unit, polkit, error, asked)
    name = error.name if isinstance(error, AccessDenied) else None
    return AccessDenied(sentence, subject=unit, hint=f"{hint}, or run as root", name=name)


def _words(unit: str, polkit: Unit, error: SdtoolError, asked: bool) -> tuple[str, str]:
    needs = f"Stopping {unit} needs authorization for {MANAGE_UNITS}"
    if _is_silence(error) and asked:
        return f"{needs}: nobody gave it within {INTERACTIVE_TIMEOUT_S:g} s.", "try again"
    if _is_silence(error):
        sentence = f"{needs}, and polkit does not answer within {CALL_TIMEOUT_S:g} s."
        return sentence, f"systemctl status {POLKIT} may say why"
    if _needs_person(error) and asked:
        return f"{needs}, and no polkit agent could ask for it.", (
            "pkttyagent, which comes with polkit, asks in a login session"
        )
    if _needs_person(error):
        return f"{needs}, and nobody was asked for it.", (
            "without --no-ask-password polkit asks for a password on a terminal"
        )
    if polkit.active_state != "active" and polkit.load_state == "masked":
        return f"{needs}, and polkit is masked.", f"systemctl unmask {POLKIT}"
    if polkit.active_state != "active" and polkit.load_state == "not-found":
        return f"{needs}, and polkit is not installed.", "install polkit"
    if polkit.active_state != "active":
        return f"{needs}, and polkit does not run.", f"see systemctl status {POLKIT}"
    if asked:
        return f"{needs}: it was dismissed, or the authentication failed.", "try again"
    return f"{needs}, and polkit's rules do not give it to this user.", (
        "have a rule in /etc/polkit-1/rules.d allow it"
    )
