"""Why a socket could not be copied: each refusal is lifted by something else."""

from __future__ import annotations

import errno
import os

import pytest

from sdtool.sources.copies import (
    ASKING_NETNS,
    NETNS_HINT,
    TAGGED,
    UNSUPPORTED,
    Tags,
    explain_refusal,
)


def refused(code: int, operation: str | None = None) -> str:
    """What is said of an errno."""
    return explain_refusal(OSError(code, os.strerror(code), operation))


@pytest.mark.parametrize(
    ("code", "operation", "expected"),
    [
        (errno.ENOSYS, None, UNSUPPORTED),
        (errno.EXDEV, None, TAGGED),
        (errno.EPERM, ASKING_NETNS, NETNS_HINT),
        (errno.EMFILE, None, "a copy could not be made: Too many open files"),
        (errno.EMFILE, ASKING_NETNS, "a copy could not be made: Too many open files"),
        (errno.ENOTTY, ASKING_NETNS, "a copy could not be made: Inappropriate ioctl for device"),
    ],
)
def test_refusal_names_what_would_lift_it(code: int, operation: str | None, expected: str) -> None:
    """Root is no cure for a limit of descriptors, and CAP_SYS_PTRACE none for a namespace."""
    assert expected == refused(code, operation)


def test_own_process_has_our_tags() -> None:
    """Whatever hierarchies there are."""
    assert not Tags().differ(os.getpid())
