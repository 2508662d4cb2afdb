"""Who refused a stop: polkit's own unit tells apart what the manager says in the same words."""

from __future__ import annotations

import pytest

from sdtool.analysis.authorization import explain_refusal
from sdtool.errors import Unavailable
from sdtool.model.unit import Unit
from tests.unit.make import unit


def polkit(load_state: str = "loaded", active_state: str = "active") -> Unit:
    """The unit of polkit itself."""
    return unit("polkit.service", load_state=load_state, active_state=active_state)


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
    """The bus waits on for one that could not be started: nobody was too slow."""
    silence = Unavailable("No answer.", subject="a.service", silent_s=4.0)
    sentence, hint = explain_refusal("a.service", guard, silence, asked=asked)
    action = "org.freedesktop.systemd1.manage-units"
    assert f"Stopping a.service needs authorization for {action}{why}." == sentence
    assert "root" in hint
