"""System calls that Python has no words for."""

from __future__ import annotations

import errno
import os
from functools import cache
from typing import Any


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library that answers a negative number where it fails.

    Raises:
        OSError: With its errno.
    """
    library = _library()
    result = int(getattr(library, name)(*arguments))
    if result < 0:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def load() -> None:
    """Have it ready before several threads call it: one may see what another failed to import.

    Raises:
        OSError: EMFILE, ENOMEM: it cannot be loaded now.
    """
    _library()


@cache
def _library() -> Any:
    try:
        import ctypes  # 5 ms that only those pay who need it

        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, AttributeError) as error:
        # What an import says of a machine without descriptors; nothing else can be amiss.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
