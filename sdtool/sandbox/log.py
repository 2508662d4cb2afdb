"""The sandbox's log: a file without a name that outlives its writer and leaves nothing behind.

The guardian appends and the owner reads, each through its own descriptor of one memfd. However
much is said, it takes a bounded amount of memory: the beginning and the end are kept, and what
lies between is given back to the kernel as a hole in the file (madvise(2), MADV_REMOVE). So
the file's size is what has been said in all, and no reader needs to be told of a hole.
"""

from __future__ import annotations

import mmap
import os

HEAD = 1 << 20
"""Bytes that are kept of the beginning, a multiple of any page size."""

TAIL = 1 << 20
"""Bytes that are kept of the end, at least."""

# A writer may be this far ahead of a reader before the reader's tail becomes a hole.
_SLACK = 1 << 20


def create() -> int:
    """Make an empty log and return its descriptor."""
    return os.memfd_create("sdtool-sandbox-log")


class Writer:
    """The one that appends to a log; its middle is dropped as it grows."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._hole_end = HEAD

    def append(self, text: bytes) -> None:
        """Append, where the launcher and the manager may have appended by themselves."""
        while text:
            text = text[os.write(self._fd, text) :]
        end = os.fstat(self._fd).st_size - TAIL - _SLACK
        if end >= self._hole_end + _SLACK:
            self._drop(end - end % mmap.ALLOCATIONGRANULARITY)

    def _drop(self, end: int) -> None:
        start, self._hole_end = self._hole_end, end
        with mmap.mmap(self._fd, end - start, offset=start) as middle:
            middle.madvise(mmap.MADV_REMOVE)


def read(fd: int) -> str:
    """Read a log: all of it, or its head and tail in whole lines with a word between them."""
    size = os.fstat(fd).st_size
    if size <= HEAD + TAIL + _SLACK:
        return os.pread(fd, size, 0).decode(errors="replace")
    head = os.pread(fd, HEAD, 0).rpartition(b"\n")[0] + b"\n"
    # A writer that overtook us left zeros.
    tail = os.pread(fd, TAIL, size - TAIL).lstrip(b"\0").partition(b"\n")[2]
    dropped = size - len(head) - len(tail)
    note = f"sdtool: {dropped} bytes of the log are left out here\n"
    return (head + note.encode() + tail).decode(errors="replace")
