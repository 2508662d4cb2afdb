"""What doctor concludes of what it was told."""

from __future__ import annotations

import pytest

from sdtool.sources.probes import probe_polkit
from tests.unit.make import unit


@pytest.mark.parametrize(
    ("load_state", "active_state", "answers", "available", "reason"),
    [
        ("loaded", "active", True, True, "asked for every stop"),
        ("loaded", "inactive", None, True, "asked for every stop"),
        ("loaded", "failed", True, True, "asked for every stop"),
        ("masked", "active", True, True, "asked for every stop"),
        ("loaded", "active", False, False, "polkit.service is active and does not answer"),
        ("loaded", "failed", None, False, "polkit.service is failed, and each stop tries"),
        ("masked", "inactive", None, False, "polkit.service is masked: only root"),
        ("not-found", "inactive", None, False, "polkit.service is not-found: only root"),
    ],
)
def test_polkit_is_available_where_a_stop_can_be_asked_for(
    load_state: str, active_state: str, answers: bool | None, available: bool, reason: str
) -> None:
    """It runs only while it is needed: nobody on its bus name is no fault, a failed unit is."""
    polkit = unit("polkit.service", load_state=load_state, active_state=active_state)
    found, why = probe_polkit(polkit, answers)
    assert (available, reason) == (found, why[: len(reason)])
