"""What the manager is asked of a unit once its job is over, and for how long.

Only the manager knows some of it; one that is lost by then does not cost the unit its report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sdtool.errors import SdtoolError, Unavailable

LAST_WORD_S = 3.5
"""How long the manager is asked for what only it knows of a unit whose job is over."""

T = TypeVar("T")


class LastWord:
    """The questions after the job, and the patience for them.

    Attributes:
        until: When nothing is waited for any more, by the event loop's clock.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._questions: set[asyncio.Task[Any]] = set()
        self._missing: list[str] = []
        self._is_given = False
        self.until = 0.0

    def begin(self, until: float | None) -> None:
        """Ask from now on; until a moment, or for a few seconds."""
        self._missing.clear()
        self._is_given = until is not None
        self.until = _now() + LAST_WORD_S if until is None else until

    @property
    def left_s(self) -> float:
        """Seconds."""
        return max(0.0, self.until - _now())

    def renew(self) -> None:
        """Wait as long anew: the manager was needed, and heard, for something else."""
        if not self._is_given:
            self.until = _now() + LAST_WORD_S

    async def ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Ask the manager, for as long as there is patience.

        The question itself is not broken off: others wait for the connection that it renews.

        Raises:
            Unavailable: There is no answer.
        """
        task = asyncio.create_task(question)
        self._questions.add(task)
        task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=self.left_s)
        if not done:
            raise Unavailable("The manager does not answer.", subject=self._unit)
        return task.result()

    def _forget(self, question: asyncio.Task[Any]) -> None:
        """A failure that nobody waits for any more is nobody's business."""
        self._questions.discard(question)
        if not question.cancelled():
            question.exception()

    def miss(self, what: str, error: SdtoolError) -> None:
        """Note what could not be read after the stop, and why."""
        self._missing.append(f"{what} is not known ({str(error).rstrip('.')})")

    @property
    def unread_reason(self) -> str | None:
        """What could not be read, and why; None when all was."""
        return "; ".join(self._missing) or None

    def close(self) -> None:
        """End every question."""
        for question in self._questions:
            question.cancel()


def _now() -> float:
    return asyncio.get_running_loop().time()
