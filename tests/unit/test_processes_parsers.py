"""Files of /proc captured from processes that do what the file names say."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.process import ProcessFacts, ProcessId
from sdtool.sources.processes import parse_masks, parse_signalfd, parse_stat, parse_status
from tests.unit.make import captured, masks

TERM, HUP, INT = 1 << 14, 1 << 0, 1 << 1


def stat(name: str) -> bytes:
    """/proc/PID/stat of a captured process."""
    return captured(f"linux-6.18/proc/{name}.stat")


def status(name: str) -> bytes:
    """/proc/PID/status of a captured process."""
    return captured(f"linux-6.18/proc/{name}.status")


# stat ----------------------------------------------------------------------------------------


def test_stat_is_read() -> None:
    """The identity is pid and start time; the cgroup comes from elsewhere."""
    assert ProcessFacts(
        id=ProcessId(pid=23673, start_ticks=315555),
        ppid=23668,
        comm="sleep",
        state="S",
        control_group="/x",
    ) == parse_stat(stat("plain"), "/x")


def test_zombie_keeps_its_identity() -> None:
    """The same process after its end: other state, same (pid, start_ticks)."""
    before, after = parse_stat(stat("plain"), None), parse_stat(stat("zombie"), None)
    assert ("S", "Z") == (before.state, after.state)
    assert before.id == after.id


def test_name_that_looks_like_the_fields_is_only_a_name() -> None:
    """A process may call itself ") S 1 (" with a newline and a byte that is not UTF-8."""
    odd = parse_stat(stat("odd"), None)
    assert b") S 1 (\xff\n x" == os.fsencode(odd.comm)
    assert ("S", 23668, 23669) == (odd.state, odd.ppid, odd.id.pid)


def test_kernel_thread_is_a_process() -> None:
    """It has no parent."""
    thread = parse_stat(stat("kthreadd"), "/")
    assert ("kthreadd", 0, 2) == (thread.comm, thread.ppid, thread.id.pid)


@given(st.binary(max_size=15).filter(lambda name: b"\0" not in name))
def test_any_name_survives_stat(name: bytes) -> None:
    """A name is 15 bytes of anything."""
    before, _, after = stat("plain").partition(b"(sleep)")
    found = parse_stat(before + b"(" + name + b")" + after, None)
    assert name == os.fsencode(found.comm)
    assert ("S", 315555) == (found.state, found.id.start_ticks)


@given(st.binary(max_size=200))
def test_stat_of_other_bytes_is_a_value_or_index_error(data: bytes) -> None:
    """The kernel writes it in one piece; what is no stat at all is told by these two."""
    try:
        parse_stat(data, None)
    except (ValueError, IndexError):
        return


# status --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caught", "ignored", "blocked"),
    [
        ("plain", 0, 0, 0),
        ("ignores", INT, TERM | HUP, 0),
        ("handles", TERM | INT, 0, 0),
        ("blocks", INT, 0, TERM),
    ],
)
def test_masks_are_read(name: str, caught: int, ignored: int, blocked: int) -> None:
    """Signal n is bit n-1; the interpreter itself ignores SIGPIPE and SIGXFSZ."""
    found = parse_masks(status(name), (), signalfd=0, waiting=False)
    asked = TERM | HUP | INT
    assert (caught, ignored) == (found.caught & asked, found.ignored & asked)
    assert blocked == found.blocked


def test_signal_is_blocked_when_every_thread_blocks_it() -> None:
    """One thread that lets it through is enough for the process to get it."""
    found = parse_masks(status("plain"), (TERM | HUP, TERM | INT), signalfd=None, waiting=None)
    assert TERM == found.blocked
    assert (None, None) == (found.signalfd, found.waiting)


@pytest.mark.parametrize(("name", "expected"), [("plain", False), ("namespace-init", True)])
def test_init_of_a_namespace_is_told_by_its_pids(name: str, expected: bool) -> None:
    """NSpid lists its pid in each namespace; the innermost is the last."""
    assert expected is parse_masks(status(name), (), 0, False).namespace_init


def test_init_of_our_own_namespace_is_no_namespace_init() -> None:
    """PID 1 itself has one pid only: the kernel's rule there is the manager's business."""
    text = status("plain").replace(b"NSpid:\t23673", b"NSpid:\t1")
    assert not parse_masks(text, (), 0, False).namespace_init


def test_status_keeps_the_escapes_of_the_name() -> None:
    """The kernel writes a newline in the name as two characters, so lines stay lines."""
    assert b") S 1 (\xff\\n x" == parse_status(status("odd"))[b"Name"]


@pytest.mark.parametrize("name", [b"a\rSigCgt:\tffff", b"a\rSigIgn:\t4000", b"x\r\rShdPnd:\t1"])
def test_carriage_return_in_a_name_forges_no_line(name: bytes) -> None:
    """The kernel escapes newlines in names, not carriage returns."""
    forged = status("plain").replace(b"Name:\tsleep", b"Name:\t" + name)
    assert masks() == parse_masks(forged, (), 0, False)
    assert name == parse_status(forged)[b"Name"]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_status(data: bytes) -> None:
    """A line without a colon has an empty value; nothing raises."""
    assert all(isinstance(key, bytes) for key in parse_status(data))


def test_mask_of_a_signalfd_is_read() -> None:
    """SIGTERM and SIGINT, from the captured fdinfo."""
    assert TERM | INT == parse_signalfd(captured("linux-6.18/proc/signalfd.fdinfo"))


def test_descriptor_without_a_mask_takes_no_signal() -> None:
    """The fdinfo of another kind of file."""
    assert 0 == parse_signalfd(b"pos:\t0\nflags:\t02\n")
