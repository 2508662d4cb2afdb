"""What a signal would do, from captured and from made-up masks; and the names of signals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.signals import predict
from sdtool.model.process import Disposition, signal_name, signal_number
from sdtool.sources.processes import parse_masks
from tests.unit.make import captured, facts, masks

TERM = 1 << 14


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", Disposition.DIES),
        ("ignores", Disposition.IGNORES),
        ("handles", Disposition.HANDLES),
        ("namespace-init", Disposition.IGNORES),
    ],
)
def test_captured_process_is_predicted(name: str, expected: Disposition) -> None:
    """The masks of real processes that do what their names say."""
    status = captured(f"linux-6.18/proc/{name}.status")
    found = parse_masks(status, (), signalfd=0, waiting=False)
    assert expected == predict(facts(masks=found), "SIGTERM")[0]


@pytest.mark.parametrize(
    ("fields", "expected", "word"),
    [
        ({}, Disposition.DIES, "default action"),
        ({"caught": TERM}, Disposition.HANDLES, "handler"),
        ({"ignored": TERM}, Disposition.IGNORES, "SIG_IGN"),
        ({"blocked": TERM, "ignored": TERM}, Disposition.UNKNOWN, "stays pending"),
        ({"blocked": TERM, "signalfd": TERM}, Disposition.HANDLES, "signalfd"),
        ({"blocked": TERM, "signalfd": None}, Disposition.UNKNOWN, "hidden"),
        ({"blocked": TERM, "waiting": True}, Disposition.UNKNOWN, "unless it waits"),
        ({"namespace_init": True}, Disposition.IGNORES, "PID 1 of its namespace"),
        ({"namespace_init": True, "caught": TERM}, Disposition.HANDLES, "handler"),
        ({"waiting": True}, Disposition.UNKNOWN, "sigwait"),
        ({"waiting": None}, Disposition.UNKNOWN, "hidden from this user"),
    ],
)
def test_masks_say_only_what_is_certain(
    fields: dict[str, Any], expected: Disposition, word: str
) -> None:
    """What the bits leave open is unknown, with the reason."""
    disposition, reason = predict(facts(masks=masks(**fields)), "SIGTERM")
    assert expected == disposition
    assert word in reason


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("SIGWINCH", Disposition.IGNORES),
        ("SIGCHLD", Disposition.IGNORES),
        ("SIGTSTP", Disposition.UNKNOWN),
        ("SIGQUIT", Disposition.DIES),
        ("SIGRTMIN+3", Disposition.DIES),
        ("SIGKILL", Disposition.DIES),
    ],
)
def test_default_action_is_that_of_the_units_own_signal(
    signal: str, expected: Disposition
) -> None:
    """KillSignal= need not be SIGTERM."""
    assert expected == predict(facts(), signal)[0]


def test_sigkill_ends_what_ignores_everything() -> None:
    """No mask stands against SIGKILL, not even for PID 1 of a container."""
    stubborn = masks(ignored=2**64 - 1, blocked=2**64 - 1, namespace_init=True)
    assert Disposition.DIES == predict(facts(masks=stubborn), "SIGKILL")[0]


@pytest.mark.parametrize("state", ["T", "D", "t"])
def test_stopped_process_waits_for_the_cont(state: str) -> None:
    """The manager sends SIGCONT after the stop signal."""
    assert Disposition.DIES == predict(facts(state=state), "SIGTERM")[0]


def test_debugger_decides_for_itself() -> None:
    """A traced process gets the signal only when its tracer passes it on, running or not."""
    assert Disposition.UNKNOWN == predict(facts(masks=masks(traced=True)), "SIGTERM")[0]


@pytest.mark.parametrize("state", ["Z", "S"])
def test_process_without_masks_is_unknown(state: str) -> None:
    """A zombie has none, and those of a process that just went could not be read."""
    disposition, reason = predict(facts(state=state, masks=None), "SIGTERM")
    assert Disposition.UNKNOWN == disposition
    assert ("reaped" in reason) == (state == "Z")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 64))
def test_every_mask_and_signal_has_an_answer(caught: int, blocked: int, number: int) -> None:
    """No combination is without a word, and each has its reason."""
    process = facts(masks=masks(caught=caught, blocked=blocked))
    disposition, reason = predict(process, signal_name(number))
    assert disposition in Disposition
    assert reason


@pytest.mark.parametrize("number", range(1, 65))
def test_signal_name_and_number_are_inverse(number: int) -> None:
    """All 64 signals, the two that libc keeps for itself included."""
    assert number == signal_number(signal_name(number))


@pytest.mark.parametrize(
    ("number", "name"),
    [
        *((6, "SIGABRT"), (9, "SIGKILL"), (15, "SIGTERM"), (17, "SIGCHLD"), (32, "32")),
        *((34, "SIGRTMIN"), (37, "SIGRTMIN+3"), (48, "SIGRTMIN+14"), (64, "SIGRTMAX")),
    ],
)
def test_signal_names_are_systemds(number: int, name: str) -> None:
    """As signal(7) and KillSignal= write them."""
    assert name == signal_name(number)
