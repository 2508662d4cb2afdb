"""Several things asked at once: names resolved, answers and errors kept in the order asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from sdtool.errors import InvalidArgument, NoSuchUnit, SdtoolError
from sdtool.host.session import Session
from sdtool.model.answer import Answer
from sdtool.model.names import is_glob, unit_name

A = TypeVar("A")
T = TypeVar("T")


async def ask_each(
    asked: Iterable[A | SdtoolError], answer: Callable[[A], Awaitable[T]]
) -> Answer[T]:
    """Ask one after the other; an error of one leaves the others their answer.

    Args:
        asked: What to ask about; an error stands for what could not even be understood.
    """
    found: list[T | SdtoolError] = []
    for one in asked:
        if isinstance(one, SdtoolError):
            found.append(one)
            continue
        try:
            found.append(await answer(one))
        except SdtoolError as error:
            found.append(error)
    return split(found)


def split(found: Sequence[T | SdtoolError]) -> Answer[T]:
    """Answers apart from errors, each in order."""
    return Answer(
        data=tuple(one for one in found if not isinstance(one, SdtoolError)),
        errors=tuple(one for one in found if isinstance(one, SdtoolError)),
    )


async def resolve(session: Session, arguments: Sequence[str]) -> list[str | SdtoolError]:
    """The unit names that arguments stand for, each once, in the order asked.

    Globs match loaded units only, as in systemctl.
    """
    found: dict[str | SdtoolError, None] = {}
    for text in arguments:
        try:
            found |= dict.fromkeys(await _resolve_one(session, text))
        except (NoSuchUnit, InvalidArgument) as error:
            found[error] = None
    return list(found)


async def _resolve_one(session: Session, text: str) -> list[str]:
    if not is_glob(text):
        return [unit_name(text)]
    manager = await session.manager()
    units = await manager.list_units([text])
    if not units:
        raise nothing_matches([text])
    return [unit.name for unit in units]


def nothing_matches(patterns: Sequence[str]) -> NoSuchUnit:
    """The error for patterns that no loaded unit matches."""
    return NoSuchUnit(
        f"No loaded unit matches {', '.join(patterns)}.",
        subject=patterns[0],
        hint="sdtool list --all shows the loaded units",
    )
