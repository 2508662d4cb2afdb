"""The shape of what a Host method returns when it was asked about several things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from sdtool.errors import SdtoolError

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[T_co]):
    """One entry for each thing asked, in the order asked; what could not be answered is an error.

    Attributes:
        data: The answers, in the order asked.
        errors: Why the others could not be answered, in the order asked.
        notes: What could not be seen, so that the answers may lack it.
    """

    data: tuple[T_co, ...] = ()
    errors: tuple[SdtoolError, ...] = ()
    notes: tuple[str, ...] = ()
