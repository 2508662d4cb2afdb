"""Many small questions to the kernel, spread over the processors.

Python runs one thread at a time, but while the kernel answers the others go on: thousands of
readlinks in /proc take half the time on two processors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")

MAX_THREADS = 4
WORTH_A_THREAD = 150
"""Below some 150 questions of 4 us the thread itself costs more."""


def overlap(beside: Callable[[], A], here: Callable[[], B]) -> tuple[A, B]:
    """Have two things done at the same time, the first by a thread that leaves nothing behind."""
    done: list[A] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            done.append(beside())
        except BaseException as error:
            failures.append(error)

    helper = _start(run)
    try:
        found = here()
    finally:
        if helper is not None:
            helper.join()
    if failures:
        raise failures[0]
    return done[0], found


def _start(run: Callable[[], None]) -> threading.Thread | None:
    """Start a thread; None, with the work done, where there are no more for us (TasksMax=)."""
    helper = threading.Thread(target=run, daemon=True)
    try:
        helper.start()
    except RuntimeError:
        run()
        return None
    return helper


def spread(items: Sequence[A], work: Callable[[Sequence[A]], T]) -> list[T]:
    """Have parts of the items worked on at the same time.

    Args:
        work: Called with consecutive parts, in threads that leave nothing behind.

    Returns:
        What ``work`` returned for each part, in the order of the items.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), len(items) // WORTH_A_THREAD)
    if threads < 2:
        return [work(items)]
    size = -(-len(items) // threads)
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    done: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            done[index] = work(parts[index])
        except BaseException as error:
            failures.append(error)

    helpers = [_start(partial(run, index)) for index in range(1, len(parts))]
    run(0)
    for helper in filter(None, helpers):
        helper.join()
    if failures:
        raise failures[0]
    return [done[index] for index in range(len(parts))]
