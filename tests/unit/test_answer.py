"""One answer for each thing asked."""

from __future__ import annotations

import asyncio

import pytest

from sdtool.errors import NoSuchUnit
from sdtool.host.asking import ask_each
from sdtool.model.answer import Answer


async def halve(number: int) -> int:
    """Half of an even number."""
    if number % 2:
        raise NoSuchUnit(f"{number} is odd.", subject=str(number))
    return number // 2


def test_one_error_leaves_the_others_their_answer() -> None:
    """Data and errors each in the order asked."""
    answer = asyncio.run(ask_each([4, 1, 2, 3], halve))
    assert (2, 1) == answer.data
    assert ["1", "3"] == [error.subject for error in answer.errors]


def test_nothing_asked_is_an_empty_answer() -> None:
    """No data and no errors."""
    assert Answer() == asyncio.run(ask_each([], halve))


def test_bug_is_not_an_answer() -> None:
    """Only our own errors are collected; others end the question."""
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask_each([0], _divide))


async def _divide(number: int) -> float:
    return 1 / number
