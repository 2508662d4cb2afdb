"""What the kernel's trace says of how processes live and end, on a page that it gave."""

from __future__ import annotations

from typing import Any

import pytest

from sdtool.model.kernel import (
    KernelEvent,
    ListenerClosed,
    SignalDelivered,
    SignalGenerated,
    TaskBorn,
    TaskEnded,
    TaskExecuted,
    TaskMoved,
)
from sdtool.model.stop import EventSource, SignalResult
from sdtool.sources.tracepages import (
    TraceEvent,
    parse_event_format,
    parse_page,
    parse_page_format,
)
from sdtool.sources.tracepoints import parse_trace_event, trace_events
from tests.unit.make import captured

DATA = "linux-6.18/tracefs"
EVENTS = (
    *("task_newtask", "cgroup_attach_task", "sched_process_exec", "sched_process_exit"),
    *("signal_generate", "signal_deliver", "inet_sock_set_state"),
)
SOURCE = EventSource.TRACEFS

OURS, THREAD, MOVED, ELSEWHERE = 25001, 25002, 25003, 25004
OTHER, ITS_THREAD, OUTLIVED, LAST = 25005, 25006, 25007, 25008
PATH = "/tmp/rec/ev\n  x-1 [000] ..... 1.0: sched_process_exit: comm=x pid=1"
COMM = "ev\n  x-1 [000] "
CGROUP = "/sdtool-record.slice/web: pid=1 \udcff"


def recorded() -> list[KernelEvent | None]:
    """All that the page has, in its order."""
    texts = (captured(f"{DATA}/{name}.format").decode() for name in EVENTS)
    formats = {form.number: form for form in map(parse_event_format, texts)}
    layout = parse_page_format(captured(f"{DATA}/header_page").decode())
    return list(
        map(parse_trace_event, parse_page(captured(f"{DATA}/lives.page"), layout, formats).events)
    )


def of(pid: int) -> list[KernelEvent]:
    """What the page has of one task."""
    return [event for event in recorded() if event is not None and event.pid == pid]


def born(at_us: int, pid: int, maker: int = OURS, **fields: bool) -> TaskBorn:
    """A task that has the hostile name of its maker."""
    values = {"is_thread": False, "is_elsewhere": False, **fields}
    return TaskBorn(at_us=at_us, source=SOURCE, pid=pid, maker=maker, comm=COMM, **values)


def executed(at_us: int, pid: int, before: int) -> TaskExecuted:
    """A task ran the program with the hostile path."""
    return TaskExecuted(at_us=at_us, source=SOURCE, pid=pid, before=before, path=PATH)


def ended(at_us: int, pid: int) -> TaskEnded:
    """A task ended; how, the trace does not say."""
    return TaskEnded(at_us=at_us, source=SOURCE, pid=pid, status=None)


def sent(at_us: int, signal: str, result: SignalResult) -> SignalGenerated:
    """The signal of our process to its first child."""
    return SignalGenerated(
        at_us=at_us,
        source=SOURCE,
        pid=MOVED,
        sender=OURS,
        signal=signal,
        result=result,
        by_kernel=False,
    )


def test_every_event_of_the_page_is_of_use() -> None:
    """None is passed over, and they are in the order of their time."""
    times = [event.at_us for event in recorded() if event is not None]
    assert 27 == len(recorded()) == len(times)
    assert sorted(times) == times


def test_thread_is_told_from_a_process() -> None:
    """It is born and ends as one; the process that made it ends by itself, and has its name."""
    assert [born(2078693988, THREAD, is_thread=True), ended(2078694021, THREAD)] == of(THREAD)
    first, *_, last = of(OURS)
    assert (executed(2078693417, OURS, OURS), ended(2078720227, OURS)) == (first, last)


def test_child_is_moved_signalled_and_killed() -> None:
    """A handler runs, SIG_IGN is told by the result, and so is what was pending already."""
    delivered, ignored = SignalResult.DELIVERED, SignalResult.IGNORED
    expected: list[KernelEvent] = [
        born(2078695191, MOVED),
        TaskMoved(at_us=2078716097, source=SOURCE, pid=MOVED, control_group=CGROUP),
        sent(2078716152, "SIGUSR1", delivered),
        SignalDelivered(at_us=2078716159, source=SOURCE, pid=MOVED, signal="SIGUSR1"),
        sent(2078716178, "SIGUSR2", ignored),
        sent(2078716180, "SIGHUP", delivered),
        sent(2078716181, "SIGHUP", SignalResult.ALREADY_PENDING),
        sent(2078716184, "SIGKILL", delivered),
        ended(2078716202, MOVED),
    ]
    assert expected == of(MOVED)


def test_child_made_in_another_cgroup_faults() -> None:
    """CLONE_INTO_CGROUP needs no move; of a fault the kernel tells the one that it ran in."""
    fault = SignalGenerated(
        at_us=2078716654,
        source=SOURCE,
        pid=ELSEWHERE,
        sender=ELSEWHERE,
        signal="SIGSEGV",
        result=SignalResult.DELIVERED,
        by_kernel=True,
    )
    expected = [
        born(2078716431, ELSEWHERE, is_elsewhere=True),
        fault,
        ended(2078716678, ELSEWHERE),
    ]
    assert expected == of(ELSEWHERE)


def test_thread_that_runs_a_program_becomes_its_process() -> None:
    """The first task ends before that, and its pid once more with the process."""
    expected = [
        born(2078716773, OTHER),
        ended(2078716973, OTHER),
        executed(2078717083, OTHER, before=ITS_THREAD),
        ended(2078717499, OTHER),
    ]
    assert expected == of(OTHER)
    assert [born(2078716889, ITS_THREAD, OTHER, is_thread=True)] == of(ITS_THREAD)


def test_thread_outlives_the_first_of_its_process() -> None:
    """Which is a zombie for two milliseconds, while its process lives."""
    assert [born(2078717606, OUTLIVED), ended(2078717892, OUTLIVED)] == of(OUTLIVED)
    expected = [born(2078717695, LAST, OUTLIVED, is_thread=True), ended(2078720058, LAST)]
    assert expected == of(LAST)


def test_listener_that_is_closed_has_its_address() -> None:
    """Of both families."""
    closed = [event for event in recorded() if isinstance(event, ListenerClosed)]
    expected = [
        ListenerClosed(at_us=2078720193, source=SOURCE, pid=OURS, address="127.0.0.2", port=18080),
        ListenerClosed(at_us=2078720216, source=SOURCE, pid=OURS, address="::1", port=18081),
    ]
    assert expected == closed


# What the page has not -----------------------------------------------------------------------


def signal_generated(pid: int = 1, **values: Any) -> KernelEvent | None:
    """What is made of a signal that a task has sent to process 7."""
    fields = {"sig": 15, "errno": 0, "code": 0, "comm": b"p7", "pid": 7, "group": 1, "result": 0}
    return parse_trace_event(TraceEvent(5999, "signal_generate", pid, {**fields, **values}))


def generated(sender: int = 1, **fields: Any) -> SignalGenerated:
    """The same as it should be."""
    values = {"signal": "SIGTERM", "result": SignalResult.DELIVERED, "by_kernel": False}
    return SignalGenerated(at_us=5, source=SOURCE, pid=7, sender=sender, **{**values, **fields})


@pytest.mark.parametrize(
    ("number", "result"),
    [
        (0, SignalResult.DELIVERED),
        (1, SignalResult.IGNORED),
        (2, SignalResult.ALREADY_PENDING),
        (3, SignalResult.OVERFLOW_FAIL),
        (4, SignalResult.LOSE_INFO),
    ],
)
def test_result_of_a_signal_has_a_name(number: int, result: SignalResult) -> None:
    """Each that the kernel has one for (TRACE_SIGNAL_*)."""
    assert generated(result=result) == signal_generated(result=number)


@pytest.mark.parametrize(
    ("code", "by_kernel"),
    [
        (0, False),  # kill(2), and cgroup.kill
        (-6, False),  # tgkill(2)
        (-1, False),  # sigqueue(3)
        (128, True),  # SI_KERNEL: memory that ran out
        (1, True),  # a fault
    ],
)
def test_code_says_whether_the_kernel_sent_it(code: int, by_kernel: bool) -> None:
    """By itself, not for one who asked it to."""
    assert generated(by_kernel=by_kernel) == signal_generated(code=code)


def test_signal_of_a_timer_is_the_kernels() -> None:
    """It is sent (SI_TIMER) while anything may run: here nothing did, which is pid 0."""
    assert generated(sender=0, by_kernel=True) == signal_generated(pid=0, code=-2)


def test_signal_without_a_name_has_its_number() -> None:
    """Real-time signals are counted from the first that is free."""
    assert generated(signal="SIGRTMIN+3") == signal_generated(sig=37)


def test_event_of_another_kind_is_of_no_use() -> None:
    """One that nobody has asked for."""
    assert None is parse_trace_event(TraceEvent(5000, "sched_switch", 7, {"pid": 7}))


# What is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "wanted"),
    [
        (("SIGRTMIN+3", "SIGTERM"), "sig != 17 && sig != 18 && sig != 23 && sig != 28"),
        (("SIGWINCH",), "sig != 17 && sig != 18 && sig != 23"),
        (("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH"), "sig != 0"),
    ],
)
def test_all_but_harmless_signals_are_recorded(signals: tuple[str, ...], wanted: str) -> None:
    """Of those the ones that are asked for, and a SIGCONT to ourselves."""
    events = trace_events(signals, 42)
    assert f"({wanted}) || (sig == 18 && pid == 42)" == events["signal/signal_generate"]
    assert f"({wanted}) && sa_handler > 1" == events["signal/signal_deliver"]


def test_lives_of_all_tasks_are_recorded() -> None:
    """A connection that comes in is a copy of its listener, which is not closed by that."""
    conditions = {
        name: filter for name, filter in trace_events((), 42).items() if "signal" not in name
    }
    expected = {
        "task/task_newtask": None,
        "cgroup/cgroup_attach_task": "dst_root == 0",
        "sched/sched_process_exec": None,
        "sched/sched_process_exit": None,
        "sock/inet_sock_set_state": "oldstate == 10 && newstate == 7",
    }
    assert expected == conditions
