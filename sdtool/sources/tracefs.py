"""What the kernel traces of the whole machine: signals, processes, TCP states; in an own instance.

Each instance has buffers, events and filters of its own, and disturbs no other tracer's. It
records until it is removed, which a killed process cannot do: so it bears the name of its maker,
and the next one removes it. The pids are those of the initial pid namespace.

Where tracefs is mounted nowhere, or only to be read, it is opened without a place: nobody sees a
mount, and none is left behind.

Source: Documentation/trace/ftrace.rst (instances, trace_clock, trace_pipe_raw),
Documentation/trace/events.rst (filters), fsopen(2), fsmount(2).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path

from sdtool.sources.libc import call
from sdtool.sources.mounts import read_mounts
from sdtool.sources.processes import read_identity
from sdtool.sources.tracepages import (
    EventFormat,
    TraceEvent,
    parse_event_format,
    parse_page,
    parse_page_format,
)

# Numbers that every architecture has in common, as all system calls since Linux 5.1.
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
FSOPEN_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1

INSTANCE = re.compile(r"sdtool-(\d+)-(\d+)-\d+")
"""By whom: pid, start time in ticks since boot, the how manieth of its."""

BUFFER_KB = 512
"""For each processor, some 6,000 events; of many processors each has less to tell."""

ALL_BUFFERS_KB = 16_384
LEAST_BUFFER_KB = 64

PAGE = 1 << 16
"""As much as any kernel gives at once."""

READ_NS = 60_000_000
"""One call takes no longer: it ends in a storm of events too, and the next one goes on."""


def open_tracefs() -> int:
    """A descriptor of the root of tracefs.

    Raises:
        OSError: It may not be mounted or entered (needs root), or the kernel has none.
    """
    for mount in read_mounts("self", "tracefs"):
        root = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not os.fstatvfs(root).f_flag & os.ST_RDONLY:
            return root
        os.close(root)
    made = call("syscall", FSOPEN, b"tracefs", FSOPEN_CLOEXEC)
    try:
        call("syscall", FSCONFIG, made, FSCONFIG_CMD_CREATE, None, None, 0)
        return call("syscall", FSMOUNT, made, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(made)


def remove_stale_instances(root: Path) -> None:
    """Remove the instances of those who are gone; one that may not be removed stays."""
    for name in os.listdir(root / "instances"):
        match = INSTANCE.fullmatch(name)
        if match is None:
            continue
        maker = read_identity(int(match[1]))
        if maker is None or maker.start_ticks != int(match[2]):
            with contextlib.suppress(OSError):
                _remove(root / "instances" / name)


def _remove(instance: Path) -> None:
    with contextlib.suppress(OSError):
        (instance / "events" / "enable").write_text("0")
    instance.rmdir()


def explain_refusal(error: OSError) -> str:
    """Why there is no trace for us, and what would permit it."""
    if isinstance(error, PermissionError):
        return "needs root (CAP_SYS_ADMIN), and a kernel that is not locked down"
    if error.errno == errno.ENODEV:
        return "this kernel has no tracefs (CONFIG_TRACING)"
    return error.strerror or str(error)


class Trace:
    """An instance that records.

    Args:
        events: "system/event" -> a filter of the kernel's, or None for all of them. Those that
            this kernel has not are left out.

    Attributes:
        missing: The events that this kernel has not.
        lost: How many events were overwritten before they were read; what is not told counts one.
        complete_ns: What happened until then has been read, or is lost; by CLOCK_MONOTONIC.

    Raises:
        OSError: Tracing is closed to us.
    """

    def __init__(self, events: Mapping[str, str | None]) -> None:
        self.lost = 0
        self.complete_ns = 0
        self.missing: tuple[str, ...] = ()
        self._pipes: dict[int, int] = {}
        self._closing = contextlib.ExitStack()
        try:
            self._set_up(events)
        except BaseException:
            self.close()
            raise

    def _set_up(self, events: Mapping[str, str | None]) -> None:
        tree = open_tracefs()
        self._closing.callback(os.close, tree)
        root = Path(f"/proc/self/fd/{tree}")
        remove_stale_instances(root)
        self._instance = _make_instance(root)
        self._closing.callback(_remove, self._instance)
        self._write("tracing_on", "0")
        self._write("trace_clock", "mono")
        self._write("buffer_size_kb", str(_buffer_size_kb(os.cpu_count() or 1)))
        self._layout = parse_page_format((root / "events" / "header_page").read_text())
        self._formats = dict(self._enable(events))
        for pipe in sorted(self._instance.glob("per_cpu/cpu*/trace_pipe_raw")):
            number = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._closing.callback(os.close, number)
            self._pipes[number] = 0
        self._write("tracing_on", "1")

    def _enable(self, events: Mapping[str, str | None]) -> Iterator[tuple[int, EventFormat]]:
        for event, condition in events.items():
            directory = self._instance / "events" / event
            try:
                form = parse_event_format((directory / "format").read_text())
            except FileNotFoundError:
                self.missing += (event,)
                continue
            if condition is not None:
                self._write(f"events/{event}/filter", condition)
            self._write(f"events/{event}/enable", "1")
            yield form.number, form

    def narrow(self, event: str, condition: str) -> None:
        """Have another filter for an event that is recorded.

        Raises:
            OSError: The kernel does not take it.
        """
        self._write(f"events/{event}/filter", condition)

    def _write(self, name: str, value: str) -> None:
        # Opened as it is: a file that is not there must not be made.
        number = os.open(self._instance / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(number, value.encode())
        finally:
            os.close(number)

    def read(self) -> tuple[TraceEvent, ...]:
        """The events since the last call, in the order of their time.

        An event of one processor may come a call later than a younger one of another. In a
        storm some come with the next calls, or are lost; ``complete_ns`` says so.
        """
        found: list[TraceEvent] = []
        until_ns = time.monotonic_ns() + READ_NS
        waiting = list(self._pipes)
        # A page of each in turn: whatever processor the storm is on has all of the time.
        while waiting and time.monotonic_ns() < until_ns:
            waiting = [pipe for pipe in waiting if self._read_page(pipe, found)]
        self.complete_ns = min(self._pipes.values(), default=0)
        return tuple(sorted(found, key=attrgetter("at_ns")))

    def _read_page(self, pipe: int, found: list[TraceEvent]) -> bool:
        """Read what one processor has; whether there may be more."""
        now_ns = time.monotonic_ns()
        try:
            data = os.read(pipe, PAGE)
        except BlockingIOError:
            data = b""
        if not data:
            # The same, when an event came and went meanwhile.
            self._pipes[pipe] = now_ns
            return False
        page = parse_page(data, self._layout, self._formats)
        self.lost += 1 if page.lost is None else page.lost
        found += page.events
        if page.events:
            self._pipes[pipe] = page.events[-1].at_ns
        return True

    def close(self) -> None:
        """Stop recording, and leave nothing behind."""
        self._closing.close()


def _buffer_size_kb(processors: int) -> int:
    return min(BUFFER_KB, max(LEAST_BUFFER_KB, ALL_BUFFERS_KB // processors))


def _make_instance(root: Path) -> Path:
    """A new directory, by which the kernel makes an instance.

    Raises:
        OSError: We may not.
    """
    us = read_identity(os.getpid())
    if us is None:
        raise FileNotFoundError(errno.ENOENT, "/proc does not show us")
    for number in itertools.count():
        instance = root / "instances" / f"sdtool-{us.pid}-{us.start_ticks}-{number}"
        with contextlib.suppress(FileExistsError):
            instance.mkdir()
            break
    return instance
