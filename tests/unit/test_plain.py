"""Words for single values, and names that cannot harm a terminal."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdtool.model.stop import ExitCode, ExitSignal
from sdtool.render.plain import (
    address,
    clean,
    count,
    duration,
    encodable,
    exit_status,
    seconds,
    size,
)
from tests.unit.make import socket

surrogates = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
fs_text = st.text(st.characters(exclude_categories=["Cs"]) | surrogates)


@given(fs_text)
@example("\udcc2\udc9b")
@example("\x1b]0;title\x07")
@example("a\u202eb\u2028c\x85")
def test_clean_text_has_no_control_character(text: str) -> None:
    """Whatever a process calls itself, what is printed is printable and can be encoded."""
    shown = clean(text)
    shown.encode("utf-8")
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs")]


@given(st.binary())
def test_clean_text_of_bytes_is_one_line(data: bytes) -> None:
    """As os.fsdecode gives them."""
    assert len(clean(os.fsdecode(data)).splitlines()) <= 1


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"])))
def test_clean_leaves_ordinary_text_alone(text: str) -> None:
    """Letters of every script stay as they are."""
    assert text == clean(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", r"a\x0ab"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202e", r"\u202e"),
        ("\u2028", r"\u2028"),
        (os.fsdecode(b"\xff"), r"\xff"),
        ("\x7f", r"\x7f"),
    ],
)
def test_unsafe_character_is_shown_as_its_escape(text: str, expected: str) -> None:
    """Nothing is dropped: a reader sees that it was there."""
    assert expected == clean(text)


@given(st.binary())
def test_encodable_text_is_utf8(data: bytes) -> None:
    """Bytes that are not UTF-8 come back as escapes, valid ones as they are."""
    encodable(os.fsdecode(data)).encode("utf-8")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, "unknown"),
        ("infinity", "no time limit"),
        (0, "0 ms"),
        (200_000, "200 ms"),
        (1_000_000, "1 s"),
        (1_500_000, "1.5 s"),
        (59_000_000, "59 s"),
        (60_000_000, "1 min"),
        (90_000_000, "1 min 30 s"),
        (7_200_000_000, "120 min"),
    ],
)
def test_duration_is_in_one_unit(limit: Any, expected: str) -> None:
    """As systemd writes time spans, in the largest unit that leaves something."""
    assert expected == duration(limit)


@given(st.integers(0, 10**12))
def test_every_duration_has_words(limit: int) -> None:
    """No exponent, no fraction of a minute."""
    assert "e+" not in duration(limit)
    assert duration(limit).split()[1] in ("ms", "s", "min")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (None, "?"),
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (10 * 1024, "10K"),
        (3 * 2**20, "3.0M"),
        (2**30 * 20, "20G"),
        (2**42, "4.0T"),
    ],
)
def test_size_is_in_one_unit(number: int | None, expected: str) -> None:
    """As ls -h writes it."""
    assert expected == size(number)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "127.0.0.1:80"),
        ({"address": "0.0.0.0"}, "0.0.0.0:80"),
        ({"address": "::", "v6only": False}, "*:80"),
        ({"address": "::", "v6only": True}, "[::]:80"),
        ({"address": "::1", "v6only": False}, "[::1]:80"),
        ({"family": "unix", "path": "/run/x\n.sock"}, r"/run/x\x0a.sock"),
    ],
)
def test_address_is_as_users_type_it(fields: dict[str, Any], expected: str) -> None:
    """IPv6 in brackets, a socket of both families as a star."""
    assert expected == address(socket(**fields))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, "ended, its wait status is not known"),
        (ExitCode(code=3), "exited 3"),
        (ExitSignal(signal="SIGKILL", core=False), "ended by SIGKILL"),
        (ExitSignal(signal="SIGABRT", core=True), "ended by SIGABRT (core dumped)"),
    ],
)
def test_exit_is_told_in_words(status: Any, expected: str) -> None:
    """The same in the timeline and in the report."""
    assert expected == exit_status(status)


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "process", "1 process"), (2, "process", "2 processes"), (0, "unit", "0 units")],
)
def test_noun_agrees_with_its_number(number: int, noun: str, expected: str) -> None:
    """One process, two processes."""
    assert expected == count(number, noun)


def test_moment_has_milliseconds() -> None:
    """A moment before the first one is negative."""
    assert ("1.234", "-0.001") == (seconds(1_234_000), seconds(-1000))
