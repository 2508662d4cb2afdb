"""What is mounted, from /proc/PID/mountinfo. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount.

    Attributes:
        kind: The file system's type: cgroup2, nsfs ...
        root: What of the file system is mounted; "net:[4026532201]" for a namespace.
        path: The mount point.
        options: The file system's own options.
    """

    kind: str
    root: str
    path: str
    options: tuple[str, ...]


def read_mounts(pid: int | str, kind: str) -> tuple[Mount, ...]:
    """The mounts of a file system that a process sees; none of one that is gone or hidden."""
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as file:
            text = os.fsdecode(file.read())
    except OSError:
        return ()
    # A machine full of containers has thousands of others.
    lines = (line for line in text.split("\n") if f" - {kind} " in line)
    return tuple(mount for mount in parse_mounts("\n".join(lines)) if mount.kind == kind)


def parse_mounts(text: str) -> Iterator[Mount]:
    """The lines of a mountinfo; of several mounts on one point the last covers the others."""
    # Not splitlines: a mount point may hold any character but space, tab, newline, backslash.
    for line in text.split("\n"):
        before, separator, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), (*after.split(" ", 2), "", "")[:3]
        if separator and len(fields) > 4:
            own = tuple(options.split(" ")[-1].split(","))
            yield Mount(kind, _unescape(fields[3]), _unescape(fields[4]), own)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
