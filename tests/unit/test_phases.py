"""What a stop policy means, phase by phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.phases import (
    after_limit,
    is_kill_phase,
    is_stopping,
    limit_of,
    roles_signalled,
    signal_of,
    worst_case,
)
from sdtool.model.process import Role
from tests.unit.make import LIMIT_US, policy

MAIN_AND_CONTROL = {Role.MAIN, Role.CONTROL}

STOPPING = (
    *("stop", "stop-sigterm", "stop-watchdog", "stop-sigkill", "stop-post"),
    *("final-sigterm", "final-watchdog", "final-sigkill"),
    *("stop-pre", "stop-pre-sigterm", "stop-pre-sigkill"),
    *("unmounting", "unmounting-sigterm", "unmounting-sigkill"),
    *("deactivating", "deactivating-sigterm", "deactivating-sigkill"),
)

RUNNING = ("running", "exited", "dead", "failed", "listening", "mounted", "auto-restart", "start")


@pytest.mark.parametrize("sub_state", STOPPING)
def test_every_phase_of_a_stop_is_known_as_one(sub_state: str) -> None:
    """Services, sockets, mounts, swaps and scopes name their phases differently."""
    assert is_stopping(sub_state)
    assert LIMIT_US == limit_of(policy(), sub_state)


@pytest.mark.parametrize("sub_state", RUNNING)
def test_other_states_are_no_phase_of_a_stop(sub_state: str) -> None:
    """A state that waits for nothing has no limit and sends no signal."""
    assert not is_stopping(sub_state)
    assert limit_of(policy(), sub_state) is None
    assert signal_of(policy(), sub_state) is None


@pytest.mark.parametrize(
    ("sub_state", "expected"),
    [
        ("stop", None),
        ("stop-sigterm", "SIGQUIT"),
        ("stop-watchdog", "SIGABRT"),
        ("stop-sigkill", "SIGKILL"),
        ("stop-post", None),
        ("final-sigterm", "SIGQUIT"),
        ("final-sigkill", "SIGKILL"),
        ("unmounting-sigterm", "SIGQUIT"),
    ],
)
def test_signal_of_a_phase_is_the_policys(sub_state: str, expected: str | None) -> None:
    """The phase named after SIGTERM sends KillSignal=, whatever that is."""
    assert expected == signal_of(policy(kill_signal="SIGQUIT"), sub_state)


def test_first_round_of_a_restart_has_its_own_signal() -> None:
    """RestartKillSignal= replaces KillSignal= in stop-sigterm, not in final-sigterm."""
    kill = policy(restart_kill_signal="SIGINT")
    assert "SIGINT" == signal_of(kill, "stop-sigterm", restart=True)
    assert "SIGTERM" == signal_of(kill, "final-sigterm", restart=True)
    assert "SIGTERM" == signal_of(kill, "stop-sigterm")


@pytest.mark.parametrize(
    ("kill_mode", "first", "last"),
    [
        ("control-group", set(Role), set(Role)),
        ("mixed", MAIN_AND_CONTROL, set(Role)),
        ("process", MAIN_AND_CONTROL, MAIN_AND_CONTROL),
        ("none", set(), set()),
    ],
)
def test_kill_mode_says_whom_a_signal_reaches(
    kill_mode: str, first: set[Role], last: set[Role]
) -> None:
    """KillMode=mixed asks main alone and kills all."""
    assert first == roles_signalled(policy(kill_mode=kill_mode), "stop-sigterm")
    assert last == roles_signalled(policy(kill_mode=kill_mode), "stop-sigkill")


@pytest.mark.parametrize(
    ("fields", "sub_state", "expected"),
    [
        ({}, "stop", "SIGTERM"),
        ({}, "stop-post", "SIGTERM"),
        ({}, "stop-sigterm", "SIGKILL"),
        ({}, "stop-sigkill", "giving up"),
        ({"send_sigkill": False}, "stop-sigterm", "giving up"),
        ({"send_sigkill": False}, "stop-watchdog", "giving up"),
        ({"timeout_stop_failure_mode": "abort"}, "stop", "SIGABRT"),
        ({"timeout_stop_failure_mode": "abort"}, "stop-sigterm", "SIGABRT"),
        ({"timeout_stop_failure_mode": "abort"}, "stop-watchdog", "SIGKILL"),
        ({"timeout_stop_failure_mode": "kill"}, "stop", "SIGKILL"),
        ({"timeout_stop_failure_mode": "kill", "send_sigkill": False}, "stop", "giving up"),
        ({"final_kill_signal": "SIGQUIT"}, "stop-sigterm", "SIGQUIT"),
    ],
)
def test_limit_leads_to_what_the_policy_says(
    fields: dict[str, object], sub_state: str, expected: str
) -> None:
    """What the manager does when a phase runs out of time (service.c, service_dispatch_timer)."""
    assert expected == after_limit(policy(**fields), sub_state)


def test_watchdog_phase_has_its_own_limit() -> None:
    """TimeoutAbortSec= limits the phases of SIGABRT."""
    kill = policy(timeout_abort_us=5)
    assert (5, LIMIT_US) == (limit_of(kill, "stop-watchdog"), limit_of(kill, "stop-sigterm"))


def test_worst_case_counts_every_command_and_round() -> None:
    """Two commands and four rounds of signals, each with its own limit."""
    assert 6 * LIMIT_US == worst_case(policy(exec_stop=1, exec_stop_post=1))
    assert 4 * LIMIT_US + 10 == worst_case(
        policy(timeout_stop_failure_mode="abort", timeout_abort_us=5)
    )


@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["terminate", "abort", "kill"]))
def test_worst_case_is_infinite_with_any_infinite_limit(
    commands: int, after: int, mode: str
) -> None:
    """No limit, no worst case."""
    kill = policy(
        timeout_stop_us="infinity",
        timeout_stop_failure_mode=mode,
        exec_stop=commands,
        exec_stop_post=after,
    )
    assert "infinity" == worst_case(kill)


def test_kill_phases_are_those_of_the_final_signal() -> None:
    """Only the -sigkill states are."""
    kills = {"stop-sigkill", "final-sigkill", "stop-pre-sigkill"}
    kills |= {"unmounting-sigkill", "deactivating-sigkill"}
    assert kills == {sub_state for sub_state in STOPPING if is_kill_phase(sub_state)}
