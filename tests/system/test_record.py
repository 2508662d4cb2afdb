"""The kernel's record when one of its sources fails midway: a gap, a lower tier, and no crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtool.host.eventlog import now_us
from sdtool.host.record import KernelRecord
from sdtool.model.kernel import KernelEvent, TaskBorn, TaskEnded
from sdtool.model.stop import EventSource, ExitCode, Tier

pytestmark = pytest.mark.capability("tracefs")

TRACEFS, PROCEVENTS = EventSource.TRACEFS, EventSource.PROCEVENTS
UNIT = "web.service"


class Heard:
    """Who watches the unit: all that it was told."""

    def __init__(self) -> None:
        self.events: list[KernelEvent] = []
        self.gaps: list[tuple[EventSource, int, int, str]] = []

    def take_kernel_event(self, event: KernelEvent) -> None:
        """Keep it."""
        self.events.append(event)

    def take_loss(self, source: EventSource, since_us: int, until_us: int, text: str) -> None:
        """Keep it."""
        self.gaps.append((source, since_us, until_us, text))


def descriptors() -> dict[int, str]:
    """What we have open."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


@pytest.fixture
def heard() -> Heard:
    """Nothing yet."""
    return Heard()


@pytest.fixture
def before() -> dict[int, str]:
    """What was open before the record."""
    return descriptors()


@pytest.fixture
def record(before: dict[int, str], heard: Heard) -> Iterator[KernelRecord]:
    """A record that takes our own children for those of a unit."""
    with KernelRecord(None) as one:
        one.attach({UNIT: heard}, {}, ["SIGTERM"], None)
        assert Tier.A is one.tier(tell_status=True)
        one.adopt(UNIT, os.getpid(), {os.getpid()})
        yield one


def break_off(numbers: list[int]) -> None:
    """Have descriptors that cannot be read any more."""
    assert numbers
    blind = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(blind, number, inheritable=False)
    os.close(blind)


def have_child() -> int:
    """A process that exits 3."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], {})
    os.waitpid(pid, 0)
    return pid


def lives(heard: Heard, pid: int) -> list[TaskBorn | TaskEnded]:
    """What was told of the life of a process."""
    return [e for e in heard.events if isinstance(e, TaskBorn | TaskEnded) and e.pid == pid]


def new_sockets(before: dict[int, str]) -> list[int]:
    """The sockets that were opened since then."""
    now = descriptors()
    return [n for n, what in now.items() if what.startswith("socket:") and before.get(n) != what]


def test_trace_that_fails_leaves_the_connector(record: KernelRecord, heard: Heard) -> None:
    """Births and ends are told by that alone, statuses too, and signals no more."""
    began_us = now_us()
    break_off([n for n, what in descriptors().items() if what.endswith("trace_pipe_raw")])
    record.finish()
    ((source, since_us, until_us, text),) = heard.gaps
    assert (TRACEFS, Tier.B) == (source, record.tier(tell_status=True))
    assert since_us <= began_us <= until_us <= now_us()
    assert "tracefs tells nothing any more" in text
    (state, other) = record.states()
    assert [("tracefs", False), ("procevents", True)] == [
        (one.name, one.available) for one in (state, other)
    ]

    pid = have_child()
    record.finish()
    born, ended = lives(heard, pid)
    assert [TaskBorn, TaskEnded] == [type(born), type(ended)]
    assert (PROCEVENTS, PROCEVENTS) == (born.source, ended.source)
    assert isinstance(ended, TaskEnded)
    assert ExitCode(code=3) == ended.status
    assert 1 == len(heard.gaps)


def test_connector_that_fails_leaves_the_trace(
    record: KernelRecord, heard: Heard, before: dict[int, str]
) -> None:
    """It tells lives and signals, and pidfds have the statuses."""
    break_off(new_sockets(before))
    record.finish()
    ((source, *_),) = heard.gaps
    assert (PROCEVENTS, Tier.A) == (source, record.tier(tell_status=True))

    pid = have_child()
    record.finish()
    assert [(TaskBorn, TRACEFS), (TaskEnded, TRACEFS)] == [
        (type(event), event.source) for event in lives(heard, pid)
    ]


def test_without_any_source_nothing_is_told(
    record: KernelRecord, heard: Heard, before: dict[int, str]
) -> None:
    """It ends up as if there had never been a record."""
    break_off([n for n, what in descriptors().items() if what.endswith("trace_pipe_raw")])
    break_off(new_sockets(before))
    record.finish()
    assert [TRACEFS, PROCEVENTS] == [source for source, *_ in heard.gaps]
    assert (Tier.C, Tier.D) == (record.tier(tell_status=True), record.tier(tell_status=False))
    assert frozenset() == record.sources
    have_child()
    heard.events.clear()
    record.finish()
    assert [] == heard.events
