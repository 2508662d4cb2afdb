"""System calls that Python has no words for."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def call(name: str, *arguments: int) -> int:
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


@cache
def _library() -> Any:
    import ctypes  # 5 ms that only those pay who need it

    return ctypes.CDLL(None, use_errno=True)
