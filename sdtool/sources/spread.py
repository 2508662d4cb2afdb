"""Many small questions to the kernel, spread over the processors.

Python runs one thread at a time, but while the kernel answers the others go on: thousands of
readlinks in /proc take half the time on two processors.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

A = TypeVar("A")
T = TypeVar("T")

MAX_THREADS = 4
PART = 150
"""Questions taken at a time: below some 150 of 4 us a thread costs more than it saves."""


def spread(items: Sequence[A], work: Callable[[Sequence[A]], T]) -> list[T]:
    """Have parts of the items worked on at the same time.

    Args:
        work: Called with consecutive parts, in threads that leave nothing behind.

    Returns:
        What ``work`` returned for each part, in the order of the items.
    """
    parts = [items[at : at + PART] for at in range(0, len(items), PART)]
    crew = Crew([partial(work, part) for part in parts])
    with crew.helpers(len(parts) - 1, ours=1):
        crew.work()
    return [crew.done[index] for index in range(len(parts))]


class Crew(Generic[T]):
    """Threads that take the next of the works as soon as they are free.

    Dealt out beforehand they would wait for the slowest: processors have other things to do.

    Attributes:
        done: What the works returned, by their place in the order they came in.
    """

    def __init__(self, works: Iterable[Callable[[], T]]) -> None:
        self._left = deque(enumerate(works))
        self._failures: list[BaseException] = []
        self.done: dict[int, T] = {}

    def work(self) -> None:
        """Take one after the other, until there are none or one has failed."""
        while not self._failures:
            try:
                index, work = self._left.popleft()
            except IndexError:
                return
            try:
                self.done[index] = work()
            except BaseException as error:
                self._failures.append(error)

    @contextlib.contextmanager
    def helpers(self, wanted: int, ours: int = 0) -> Iterator[None]:
        """Have threads work beside us, and wait for them at the end; a failure comes out there.

        There may be none to be had (TasksMax=): then not all is done.

        Args:
            wanted: How many would find something to do; there are never more than processors.
            ours: The threads of our own that work as well.
        """
        threads = min(wanted, MAX_THREADS - ours, len(os.sched_getaffinity(0)) - ours)
        started = [thread for _ in range(threads) if (thread := _start(self.work))]
        try:
            yield
        except BaseException:
            self._left.clear()
            raise
        finally:
            for thread in started:
                thread.join()
        if self._failures:
            raise self._failures[0]


def _start(run: Callable[[], None]) -> threading.Thread | None:
    thread = threading.Thread(target=run, name="sdtool-crew", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
