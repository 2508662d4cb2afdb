"""Pages of the trace buffer, as the kernel gave them: every field, whatever names say."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.sources.tracepages import (
    TraceEvent,
    parse_event_format,
    parse_page,
    parse_page_format,
)
from tests.unit.make import captured

DATA = "linux-6.18/tracefs"
EVENTS = (
    *("signal_generate", "signal_deliver", "inet_sock_set_state"),
    *("sched_process_fork", "sched_process_exec", "sched_process_exit"),
)
FORMATS = {
    found.number: found
    for found in (
        parse_event_format(captured(f"{DATA}/{name}.format").decode()) for name in EVENTS
    )
}
LAYOUT = parse_page_format(captured(f"{DATA}/header_page").decode())
PAGE = captured(f"{DATA}/signals.page")

OURS, CHILD = 3304, 3306
NAME = b"/tmp/x\n  evil-1 [000] ..... 1.0: signal_generate: sig=9"


def found(name: str) -> list[TraceEvent]:
    """The captured events of one kind."""
    return [event for event in parse_page(PAGE, LAYOUT, FORMATS).events if event.name == name]


def test_signals_have_their_sender_and_target() -> None:
    """STOP, CONT, which a stopped process ignores and obeys, TERM, and then our own."""
    sent = [
        (event.pid, event.values["pid"], event.values["sig"], event.values["result"])
        for event in found("signal_generate")
    ]
    to_child = [(OURS, CHILD, 19, 0), (OURS, CHILD, 18, 1), (OURS, CHILD, 15, 0)]
    to_us = [(OURS, OURS, 10, 1), *[(OURS, OURS, 12, 0)] * 3]
    assert to_child + to_us == sent


def test_names_forge_nothing() -> None:
    """A file and a process are named like an event; both are but a name."""
    (done,) = found("sched_process_exec")
    (gone,) = found("sched_process_exit")
    assert (CHILD, NAME) == (done.values["pid"], done.values["filename"])
    assert (CHILD, NAME[5:20]) == (gone.values["pid"], gone.values["comm"])
    assert b"a\nb sig=9 \xff" == found("signal_generate")[-1].values["comm"]
    assert 19 == len(parse_page(PAGE, LAYOUT, FORMATS).events)


def test_states_of_sockets_are_read() -> None:
    """Both families; one listened, and then no more."""
    states = [
        (event.values["family"], event.values["sport"], event.values["newstate"])
        for event in found("inet_sock_set_state")
    ]
    assert [(2, 18080, 10), (10, 18081, 10), (2, 18080, 7), (10, 18081, 7)] == states


def test_times_are_those_of_the_clock() -> None:
    """In their order, over a pause too that is longer than one event can say."""
    times = [event.at_ns for event in parse_page(PAGE, LAYOUT, FORMATS).events]
    assert sorted(times) == times
    assert (53021552323175, 53022911087778) == (times[0], times[-1])


@pytest.mark.parametrize(("mark", "stored", "expected"), [(0, 7, 0), (2, 7, None), (3, 7, 7)])
def test_lost_events_are_counted(mark: int, stored: int, expected: int | None) -> None:
    """The kernel marks the page behind a loss, and says how much where there is room for it."""
    (commit,) = struct.unpack_from("=Q", PAGE, 8)
    data = bytearray(PAGE)
    struct.pack_into("=Q", data, 8, commit | mark << 30)
    struct.pack_into("=Q", data, 16 + commit, stored)
    page = parse_page(bytes(data), LAYOUT, FORMATS)
    assert (expected, 19) == (page.lost, len(page.events))


def test_unknown_events_are_passed_over() -> None:
    """Of another instance's formats, say; those behind it are read all the same."""
    few = {number: form for number, form in FORMATS.items() if form.name == "sched_process_exit"}
    assert [CHILD] == [event.values["pid"] for event in parse_page(PAGE, LAYOUT, few).events]


@given(st.integers(0, len(PAGE)), st.binary(max_size=64))
def test_any_page_is_read(cut: int, noise: bytes) -> None:
    """Cut anywhere, and anything behind it."""
    parse_page(PAGE[:cut] + noise, LAYOUT, FORMATS)


@pytest.mark.parametrize(
    "text", ["", "name: x\nID: 3\n", "field:int a; offset:0; size:4; signed:1;"]
)
def test_what_is_no_format_is_refused(text: str) -> None:
    """Rather than read by no fields."""
    with pytest.raises(ValueError, match="no format"):
        parse_event_format(text)
    with pytest.raises(ValueError, match="no format"):
        parse_page_format(text)
