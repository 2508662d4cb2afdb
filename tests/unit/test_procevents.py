"""Messages of the process connector, as the kernel sent them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.kernel import KernelEvent, TaskBorn, TaskEnded, TaskExecuted
from sdtool.model.stop import EventSource, ExitCode
from sdtool.sources.procevents import parse_proc_messages
from tests.unit.make import captured

PARENT, CHILD = 6326, 6394
SOURCE = EventSource.PROCEVENTS
BORN = TaskBorn(
    at_us=53474787261,
    source=SOURCE,
    pid=CHILD,
    maker=PARENT,
    comm=None,
    is_thread=False,
    is_elsewhere=False,
)
NAMES = ("fork", "exec", "exit", "acknowledged")


def recorded(name: str) -> bytes:
    """One datagram."""
    return captured(f"linux-6.18/cn_proc/{name}.bin")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fork", BORN),
        (
            "exec",
            TaskExecuted(at_us=53474789338, source=SOURCE, pid=CHILD, before=CHILD, path=None),
        ),
        ("exit", TaskEnded(at_us=53474790263, source=SOURCE, pid=CHILD, status=ExitCode(code=7))),
    ],
)
def test_event_has_who_and_when(name: str, expected: KernelEvent) -> None:
    """The maker of a child, and the wait status of an exit."""
    (message,) = parse_proc_messages(recorded(name))
    assert (expected, None) == (message.event, message.refusal)


def test_acknowledgement_is_no_event() -> None:
    """It says that the request was taken, with an errno when it was not."""
    (message,) = parse_proc_messages(recorded("acknowledged"))
    assert (None, 0) == (message.event, message.refusal)


def test_event_that_is_not_read_is_counted() -> None:
    """A change of a uid, say: its number is one of the row, in which none may be missing."""
    data = bytearray(recorded("exec"))
    struct.pack_into("=I", data, 36, 4)
    (message,) = parse_proc_messages(bytes(data))
    (other,) = parse_proc_messages(recorded("exec"))
    assert (None, None, other.number) == (message.event, message.refusal, message.number)


@given(st.sampled_from(NAMES), st.integers(0, 76), st.binary(max_size=80))
def test_any_datagram_is_read(name: str, cut: int, noise: bytes) -> None:
    """Cut anywhere, with anything behind it."""
    list(parse_proc_messages(recorded(name)[:cut] + noise))
