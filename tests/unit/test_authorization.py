"""Who refused a stop: polkit's own unit tells apart what the manager says in the same words."""

from __future__ import annotations

import pytest

from sdtool.analysis.authorization import explain_refusal
from sdtool.errors import AccessDenied, Refusal, Unavailable
from sdtool.model.unit import Unit
from tests.unit.make import unit

ACTION = "org.freedesktop.systemd1.manage-units"


def polkit(load_state: str = "loaded", active_state: str = "active") -> Unit:
    """The unit of polkit itself."""
    return unit("polkit.service", load_state=load_state, active_state=active_state)


@pytest.mark.parametrize(
    ("asked", "lack", "why", "advice"),
    [
        (False, None, ", and nobody was asked for it", "--no-ask-password"),
        (True, None, ", and no polkit agent could ask for it", "in a login session"),
        (
            True,
            "pkttyagent is not installed",
            ", and no polkit agent could ask for it: pkttyagent is not installed",
            "on a terminal where pkttyagent, a part of polkit, can ask",
        ),
    ],
)
def test_need_of_a_person_says_why_nobody_was_asked(
    asked: bool, lack: str | None, why: str, advice: str
) -> None:
    """What kept our own agent away, where we know; a session that it cannot ask in, else."""
    refusal = AccessDenied("Denied.", subject="a.service", reason=Refusal.NEEDS_PERSON)
    sentence, hint = explain_refusal("a.service", polkit(), refusal, asked=asked, lack=lack)
    assert f"Stopping a.service needs authorization for {ACTION}{why}." == sentence
    assert {"root", advice} == {word for word in ("root", advice) if word in hint}


@pytest.mark.parametrize(
    ("guard", "asked", "why"),
    [
        (polkit(), False, ", and polkit does not answer within 4 s"),
        (polkit(), True, ": nobody gave it within 4 s"),
        (polkit(active_state="inactive"), False, ", and polkit does not answer within 4 s"),
        (
            polkit(active_state="failed"),
            False,
            ", and polkit does not run: polkit.service is failed",
        ),
        (
            polkit(active_state="failed"),
            True,
            ", and polkit does not run: polkit.service is failed",
        ),
        (polkit("masked", "failed"), False, ", and polkit is masked"),
    ],
)
def test_silence_names_a_polkit_that_failed(guard: Unit, asked: bool, why: str) -> None:
    """dbus-daemon waits on for one that could not be started: nobody was too slow."""
    silence = Unavailable("No answer.", subject="a.service", silent_s=4.0)
    sentence, hint = explain_refusal("a.service", guard, silence, asked=asked)
    assert f"Stopping a.service needs authorization for {ACTION}{why}." == sentence
    assert "root" in hint
