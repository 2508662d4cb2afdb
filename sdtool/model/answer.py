"""The shape of what a Host method returns when it was asked about several things."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sdtool.errors import SdtoolError

A = TypeVar("A")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[T_co]):
    """One entry for each thing asked, in the order asked; what could not be answered is an error.

    Attributes:
        data: The answers, in the order asked.
        errors: Why the others could not be answered, in the order asked.
    """

    data: tuple[T_co, ...] = ()
    errors: tuple[SdtoolError, ...] = ()


async def collect(asked: Sequence[A], answer: Callable[[A], Awaitable[T]]) -> Answer[T]:
    """Ask one after the other; an ``SdtoolError`` of one leaves the others their answer."""
    data: list[T] = []
    errors: list[SdtoolError] = []
    for one in asked:
        try:
            data.append(await answer(one))
        except SdtoolError as error:
            errors.append(error)
    return Answer(data=tuple(data), errors=tuple(errors))
