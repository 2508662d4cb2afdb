"""The terminal that we run on: whether it is ours now, and how it is given back.

It can hang up at any time. That is no error here: the SIGHUP that comes with it ends us as Ctrl-C
does, and nothing that is tidied up on the way may take its place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Iterator
from typing import Any

CONTROLLING = "/dev/tty"


def is_foreground() -> bool:
    """Whether we may read our terminal: a job in the background is stopped for that."""
    try:
        terminal = _open()
    except OSError:
        return False
    try:
        return _is_ours(terminal)
    finally:
        os.close(terminal)


@contextlib.contextmanager
def terminal_restored(*, prompted: bool = False) -> Iterator[None]:
    """Give the terminal back as it was: who uses it may be killed before they do that.

    Args:
        prompted: It is left in the middle of a question: what was half typed is thrown away, and
            what we write next begins a line.
    """
    try:
        terminal = _open()
    except OSError:
        yield
        return
    try:
        before = _read_settings(terminal)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, termios.error):
                _restore(terminal, before, prompted)
    finally:
        os.close(terminal)


def _open() -> int:
    return os.open(CONTROLLING, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)


def _is_ours(terminal: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False  # it has hung up


def _read_settings(terminal: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(terminal)
    except termios.error:
        return None


def _restore(terminal: int, before: list[Any] | None, prompted: bool) -> None:
    # From the background it would stop us, and the terminal is another's there.
    if before is None or not _is_ours(terminal) or _read_settings(terminal) in (before, None):
        return
    termios.tcsetattr(terminal, termios.TCSAFLUSH if prompted else termios.TCSADRAIN, before)
    if prompted:
        sys.stderr.write("\n")
