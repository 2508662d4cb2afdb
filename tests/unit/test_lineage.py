"""Whose a task is and when a process ended, from literal births, moves and ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.lineage import STRAYS, Lineage, Routed
from sdtool.model.kernel import KernelEvent, ListenerClosed, SignalDelivered, TaskMoved
from sdtool.model.stop import EventSource
from tests.unit.make import (
    DONE,
    GROUP,
    UNIT,
    signalled,
    task_born,
    task_ended,
    task_executed,
    task_moved,
)

MANAGER, MAIN, FOREIGN = 1, 10, 99
OTHER, OTHER_GROUP = "db.service", "/system.slice/db.service"
FOREIGN_GROUP = "/system.slice/cron.service"
PROCEVENTS = EventSource.PROCEVENTS


def lineage(*, tasks: Collection[int] = (), managers: Collection[int] = (MANAGER,)) -> Lineage:
    """Two units; the first has a process, which was found at the very beginning."""
    one = Lineage(EventSource.TRACEFS, managers, {GROUP: UNIT, OTHER_GROUP: OTHER})
    assert [] == one.adopt(UNIT, MAIN, tasks, 0)
    return one


def feed(one: Lineage, *events: KernelEvent) -> list[Routed]:
    """What some events mean together."""
    return [routed for event in events for routed in one.feed(event)]


def of_unit(*events: KernelEvent, unit: str = UNIT) -> list[Routed]:
    """The same events as they are told to a unit."""
    return [(unit, event) for event in events]


def closed(pid: int) -> ListenerClosed:
    """A task closed a listener."""
    return ListenerClosed(at_us=5, source=EventSource.TRACEFS, pid=pid, address="::", port=80)


# Births and ends -----------------------------------------------------------------------------


def test_child_belongs_where_its_maker_does() -> None:
    """And so does what that makes, until each has ended."""
    life = [
        task_born(1, 11, MAIN),
        task_executed(2, 11),
        task_born(3, 12, 11),
        task_ended(4, 11),
        task_ended(5, 12),
        task_ended(6, MAIN),
    ]
    assert of_unit(*life) == feed(lineage(), *life)


def test_child_of_somebody_else_is_nobodys() -> None:
    """Whatever is told of it."""
    life = [
        task_born(1, 11, FOREIGN),
        task_born(2, 12, 11),
        task_born(3, 13, 11, is_thread=True),
        task_executed(4, 11, before=13),
        signalled(5, 11, MAIN),
        closed(11),
        task_ended(6, 11),
    ]
    one = lineage()
    assert ([], ()) == (feed(one, *life), one.strays)


def test_threads_are_their_process() -> None:
    """Their births and ends are not told, and what happens to them is told of it."""
    one = lineage()
    delivered = SignalDelivered(at_us=4, source=EventSource.TRACEFS, pid=12, signal="SIGTERM")
    told = feed(
        one,
        task_born(1, 11, MAIN, is_thread=True),
        task_born(2, 12, 11, is_thread=True),
        signalled(3, 12, 11),
        delivered,
        closed(12),
        task_born(6, 20, 12),
        task_ended(7, 12),
        task_ended(8, 11),
    )
    expected = of_unit(
        signalled(3, MAIN, MAIN),
        replace(delivered, pid=MAIN),
        closed(MAIN),
        task_born(6, 20, MAIN),
    )
    assert expected == told
    assert of_unit(task_ended(9, MAIN)) == one.feed(task_ended(9, MAIN))


def test_another_source_takes_over_when_one_fails() -> None:
    """Births and ends are its own from then on; of one that had ended it tells the status."""
    one = lineage()
    before = [task_born(1, 11, MAIN), task_born(1, 12, MAIN), task_ended(2, 11)]
    assert of_unit(*before) == feed(one, *before)
    one.rely_on(PROCEVENTS)
    after = [
        task_ended(3, 11, DONE, PROCEVENTS),
        task_ended(4, 12, DONE, PROCEVENTS),
        task_born(5, 13, MAIN, source=PROCEVENTS),
        task_ended(6, 13, DONE, PROCEVENTS),
    ]
    assert of_unit(*after) == feed(one, *after)


def test_process_ends_with_its_last_task() -> None:
    """Its first one can be a zombie long before; those that were found count as well."""
    one = lineage(tasks=(MAIN, 13))
    life = [
        task_born(1, 14, MAIN, is_thread=True),
        task_ended(2, MAIN),
        task_ended(3, 13),
    ]
    assert [] == feed(one, *life)
    assert of_unit(signalled(4, MAIN)) == one.feed(signalled(4, MAIN))
    assert of_unit(task_ended(5, MAIN)) == one.feed(task_ended(5, 14))


def test_thread_that_runs_a_program_is_the_process() -> None:
    """The first task has ended by then, and the others need not be told to have."""
    one = lineage()
    threads = [task_born(at_us, 10 + at_us, MAIN, is_thread=True) for at_us in (1, 2)]
    assert [] == feed(one, *threads, task_ended(3, MAIN))
    executed = task_executed(4, MAIN, before=12)
    assert of_unit(executed) == one.feed(executed)
    assert [] == feed(one, signalled(5, 11), signalled(5, 12))
    assert of_unit(task_ended(6, MAIN)) == one.feed(task_ended(6, MAIN))


# Whose it is becomes known -------------------------------------------------------------------


def test_child_of_the_manager_is_held_until_it_is_moved() -> None:
    """Then all that was told of it is handed out, in its order."""
    one = lineage()
    before = [task_born(1, 20, MANAGER), task_executed(2, 20), signalled(3, 20)]
    assert ([], (20,)) == (feed(one, *before), one.strays)
    moved = task_moved(4, 20, f"{OTHER_GROUP}/sub")
    assert of_unit(*before, moved, unit=OTHER) == one.feed(moved)
    assert () == one.strays
    assert of_unit(task_ended(5, 20), unit=OTHER) == one.feed(task_ended(5, 20))


def test_child_of_the_manager_is_held_until_it_is_found() -> None:
    """The manager can make it in its cgroup, which no event says."""
    one = lineage()
    before = [task_born(1, 20, MANAGER, is_elsewhere=True), task_executed(2, 20)]
    assert [] == feed(one, *before)
    assert of_unit(*before) == one.adopt(UNIT, 20, (20,), 3)
    assert [] == one.adopt(UNIT, 20, (20,), 4)
    assert of_unit(task_ended(5, 20)) == one.feed(task_ended(5, 20))


def test_child_of_the_manager_that_ended_before_it_was_known() -> None:
    """Nobody can find it any more, but the manager says whose it was."""
    one = lineage()
    life = [task_born(1, 20, MANAGER, is_elsewhere=True), task_ended(2, 20)]
    assert ([], ()) == (feed(one, *life), one.strays)
    status = task_ended(3, 20, DONE, PROCEVENTS)
    assert [] == one.feed(status)
    assert of_unit(*life, status) == one.adopt(UNIT, 20, (), 4)


def test_child_that_is_moved_to_another_unit_is_not_ours() -> None:
    """It may come still."""
    one = lineage()
    life = [task_born(1, 20, MANAGER), task_moved(2, 20, FOREIGN_GROUP), task_executed(3, 20)]
    assert ([], (20,)) == (feed(one, *life), one.strays)


def test_dismissed_child_is_forgotten() -> None:
    """It is in another unit, and so is what it and its threads make."""
    one = lineage()
    feed(one, task_born(1, 20, MANAGER), task_born(2, 21, 20, is_thread=True))
    one.dismiss(20)
    assert [] == feed(one, task_born(3, 22, 20), task_born(4, 23, 21), task_ended(5, 20))
    assert () == one.strays
    assert [] == one.adopt(UNIT, 20, (20,), 6)
    one.dismiss(22)  # who never was one


def test_only_the_last_of_those_that_nobody_knew_are_remembered() -> None:
    """A manager may run for a year, and make millions."""
    one = lineage()
    first, second, last = 1000, 1001, 1000 + STRAYS + 1
    for pid in range(first, last + 1):
        feed(one, task_born(pid, pid, MANAGER), task_ended(pid, pid))
    feed(one, task_born(9000, 20, MANAGER))
    assert [] == one.adopt(UNIT, first, (), 9999)
    assert [] == one.adopt(UNIT, second, (), 9999)
    assert 2 == len(one.adopt(UNIT, second + 1, (), 9999)) == len(one.adopt(UNIT, last, (), 9999))


def test_children_of_a_stray_come_with_it() -> None:
    """Each with what was told of it."""
    one = lineage()
    parent = [task_born(1, 20, MANAGER, is_elsewhere=True), task_executed(2, 20)]
    child = [task_born(3, 21, 20), task_executed(5, 21)]
    grandchild = [task_born(4, 22, 21), task_ended(6, 22)]
    assert [] == feed(one, *parent, *child[:1], *grandchild[:1], *child[1:], *grandchild[1:])
    assert (20, 21) == one.strays
    assert of_unit(*parent, *child, *grandchild) == one.adopt(UNIT, 20, (), 7)
    born = task_born(8, 23, 21)
    assert of_unit(born) == one.feed(born)


def test_child_made_elsewhere_is_held() -> None:
    """A process that is root may make it anywhere; in the end it was below the maker's own."""
    one = lineage()
    life = [task_born(1, 20, MAIN, is_elsewhere=True), task_born(2, 21, 20), task_ended(3, 21)]
    assert ([], (20,)) == (feed(one, *life), one.strays)
    ended = task_ended(4, 20)
    assert of_unit(life[0], ended, *life[1:]) == one.feed(ended)


def test_child_made_elsewhere_is_where_it_is_found() -> None:
    """In another unit, that is."""
    one = lineage()
    born = task_born(1, 20, MAIN, is_elsewhere=True)
    assert [] == one.feed(born)
    assert of_unit(born, unit=OTHER) == one.adopt(OTHER, 20, (20,), 2)
    assert of_unit(task_ended(3, 20), unit=OTHER) == one.feed(task_ended(3, 20))


def test_child_made_elsewhere_does_not_come_with_a_stray() -> None:
    """When the cgroup of its maker is known its own is not."""
    one = lineage()
    parent, child = task_born(1, 20, MANAGER), task_born(2, 21, 20, is_elsewhere=True)
    assert [] == feed(one, parent, child)
    assert of_unit(parent) == one.adopt(UNIT, 20, (20,), 3)
    assert of_unit(child, unit=OTHER) == one.adopt(OTHER, 21, (21,), 4)


def test_child_made_elsewhere_that_has_ended_comes_with_a_stray() -> None:
    """As it does when its maker was known before: nobody can find it any more."""
    one = lineage()
    parent, child = task_born(1, 20, MANAGER), task_born(2, 21, 20, is_elsewhere=True)
    ended = task_ended(3, 21)
    assert [] == feed(one, parent, child, ended)
    assert of_unit(parent, child, ended) == one.adopt(UNIT, 20, (20,), 4)


def test_manager_that_is_in_a_unit_has_children_elsewhere() -> None:
    """A user's manager is a process of a unit of the system's."""
    one = lineage(managers=(MANAGER, MAIN))
    born = task_born(1, 20, MAIN)
    assert ([], (20,)) == (one.feed(born), one.strays)
    assert of_unit(born, unit=OTHER) == one.adopt(OTHER, 20, (20,), 2)


def test_birth_of_one_that_was_found_before_is_told() -> None:
    """A walk can be quicker than the record, which says who has made it."""
    one = lineage()
    feed(one, task_born(1, 11, MAIN, is_thread=True))
    assert [] == one.adopt(UNIT, 20, (20,), 9)
    told = feed(one, task_born(2, 20, 11), signalled(3, 20), task_ended(4, 20))
    assert of_unit(task_born(2, 20, MAIN), signalled(3, 20), task_ended(4, 20)) == told


# Moves ---------------------------------------------------------------------------------------


def test_process_is_moved_from_one_unit_to_another() -> None:
    """What comes is told to the other, also of the children that it makes there."""
    one = lineage()
    moved = task_moved(1, MAIN, OTHER_GROUP)
    life = [moved, task_born(2, 20, MAIN), task_ended(3, MAIN), task_ended(4, 20)]
    assert of_unit(*life, unit=OTHER) == feed(one, *life)


def test_process_is_moved_within_its_unit() -> None:
    """Which is no news."""
    assert [] == lineage().feed(task_moved(1, MAIN, f"{GROUP}/sub"))


def test_thread_moves_alone_only_within_its_unit() -> None:
    """Its cgroup is a threaded one, below that of its process."""
    one = lineage(tasks=(11,))
    assert [] == feed(one, task_moved(1, 11, f"{GROUP}/threads"), task_moved(2, 11, OTHER_GROUP))
    assert of_unit(signalled(3, MAIN)) == one.feed(signalled(3, 11))


def test_process_is_moved_in_from_outside() -> None:
    """Nothing was told of it before; what it makes belongs to the unit as well."""
    one = lineage()
    life = [task_moved(1, 50), task_born(2, 51, 50), task_ended(3, 50), task_ended(4, 51)]
    assert of_unit(*life) == feed(one, *life)


def test_one_that_is_moved_in_under_an_old_pid_is_new() -> None:
    """The process that had it has ended."""
    one = lineage()
    life = [task_ended(1, MAIN), task_moved(2, MAIN), task_ended(3, MAIN)]
    assert of_unit(*life) == feed(one, *life)


@pytest.mark.parametrize(
    ("control_group", "unit"),
    [
        ("/a/b", "b"),
        ("/a/b/c/d", "b"),
        ("/a/b/e", "e"),
        ("/a/b/e/f", "e"),
        ("/a/bc", None),
        ("/a/bc/d", None),
        ("/a", None),
        ("/", None),
        ("", None),
        ("/z/a/b", None),
    ],
)
def test_cgroup_is_in_the_unit_nearest_above(control_group: str, unit: str | None) -> None:
    """By whole names."""
    one = Lineage(EventSource.TRACEFS, (MANAGER,), {"/a/b": "b", "/a/b/e": "e"})
    assert unit == one.unit_of(control_group)


# Pids that come again ------------------------------------------------------------------------


def test_pid_of_a_member_comes_again_outside() -> None:
    """Whether its end was told or was lost."""
    for end in ([], [task_ended(2, 11)]):
        one = lineage()
        feed(one, task_born(1, 11, MAIN), *end)
        life = [task_born(3, 11, FOREIGN), signalled(4, 11), task_born(5, 12, 11)]
        assert [] == feed(one, *life, task_ended(6, 11))


def test_pid_of_a_member_comes_again_inside() -> None:
    """It is born and ends once more."""
    life = [
        task_born(1, 11, MAIN),
        task_ended(2, 11),
        task_born(3, 11, MAIN),
        task_ended(4, 11),
    ]
    assert of_unit(*life) == feed(lineage(), *life)


def test_pid_of_a_member_is_found_again() -> None:
    """Before the birth of the other is told."""
    one = lineage()
    feed(one, task_ended(1, MAIN))
    assert [] == one.adopt(OTHER, MAIN, (MAIN,), 5)
    life = [task_born(2, MAIN, FOREIGN), task_ended(6, MAIN)]
    assert of_unit(*life, unit=OTHER) == feed(one, *life)


def test_pid_of_a_stray_comes_again_outside() -> None:
    """What was held of the other is nobody's, whether its end was told or was lost."""
    for end in ([], [task_ended(2, 20)]):
        one = lineage()
        feed(one, task_born(1, 20, MANAGER), *end, task_born(3, 20, FOREIGN))
        assert ([], ()) == (one.feed(signalled(4, 20)), one.strays)
        assert [] == one.adopt(UNIT, 20, (20,), 5)


def test_pid_of_a_stray_that_ended_is_found_again() -> None:
    """One that has tasks runs: what ended was another, and of another unit."""
    one = lineage()
    feed(one, task_born(1, 20, MANAGER), task_ended(2, 20))
    assert [] == one.adopt(UNIT, 20, (20,), 5)
    life = [task_born(3, 20, MAIN), task_ended(6, 20)]
    assert of_unit(*life) == feed(one, *life)


def test_end_from_before_it_was_found_is_anothers() -> None:
    """Who had its pid."""
    one = lineage()
    one.adopt(UNIT, 20, (20,), 5)
    assert [] == feed(one, task_ended(4, 20), task_ended(4, 20, DONE, PROCEVENTS))
    assert of_unit(task_ended(6, 20)) == one.feed(task_ended(6, 20))


def test_thread_from_before_its_process_was_found_is_waited_for_no_more() -> None:
    """It was born and has ended, or was among the tasks still; both are told afterwards."""
    one = lineage()
    one.adopt(UNIT, 20, (20, 22), 5)
    feed(one, task_born(2, 21, 20, is_thread=True), task_ended(3, 21), task_ended(4, 22))
    assert of_unit(task_ended(6, 20)) == one.feed(task_ended(6, 20))


def test_first_task_from_before_its_process_was_found_is_waited_for_no_more() -> None:
    """A zombie is among the tasks as long as the others are."""
    one = lineage()
    one.adopt(UNIT, 20, (20, 21), 5)
    feed(one, task_ended(4, 20))
    assert of_unit(task_ended(6, 20)) == one.feed(task_ended(6, 21))


def test_pid_of_a_thread_comes_again_outside() -> None:
    """Its process has ended it, and runs."""
    one = lineage()
    feed(one, task_born(1, 11, MAIN, is_thread=True), task_ended(2, 11))
    life = [task_born(3, 11, FOREIGN), signalled(4, 11), task_executed(5, 11), task_ended(6, 11)]
    assert [] == feed(one, *life)
    assert of_unit(task_ended(7, MAIN)) == one.feed(task_ended(7, MAIN))


def test_pid_of_a_member_comes_again_as_a_thread_outside() -> None:
    """What is sent to it is not the unit's business."""
    one = lineage()
    feed(one, task_ended(1, MAIN), task_born(2, MAIN, FOREIGN, is_thread=True))
    assert [] == feed(one, signalled(3, MAIN), task_ended(4, MAIN, DONE, PROCEVENTS))


def test_pid_of_a_thread_is_found_again() -> None:
    """As a process of another unit, before its birth is told."""
    one = lineage()
    feed(one, task_born(1, 11, MAIN, is_thread=True), task_ended(2, 11))
    one.adopt(OTHER, 11, (11,), 5)
    life = [task_born(3, 11, MANAGER), task_ended(6, 11)]
    assert of_unit(*life, unit=OTHER) == feed(one, *life)


# Several sources -----------------------------------------------------------------------------


def test_second_source_adds_the_status_of_the_last_task() -> None:
    """Births, programs and the ends of other tasks are told by the first."""
    one = lineage(tasks=(13,))
    again = [
        task_born(1, 20, MAIN, source=PROCEVENTS),
        task_executed(2, MAIN, source=PROCEVENTS),
        task_ended(3, 13, DONE, PROCEVENTS),
    ]
    assert [] == feed(one, *again)
    assert [] == feed(one, task_ended(4, MAIN), task_ended(5, MAIN, DONE, PROCEVENTS))
    assert of_unit(task_ended(6, MAIN)) == one.feed(task_ended(6, 13))
    status = task_ended(7, 13, DONE, PROCEVENTS)
    assert of_unit(replace(status, pid=MAIN)) == one.feed(status)
    assert [] == one.feed(task_ended(8, MAIN, DONE, PROCEVENTS))


def test_only_source_tells_the_status_with_the_end() -> None:
    """Without a trace the process connector is the first."""
    one = Lineage(PROCEVENTS, (MANAGER,), {GROUP: UNIT})
    one.adopt(UNIT, MAIN, (MAIN,), 0)
    life = [task_born(1, 11, MAIN, source=PROCEVENTS), task_ended(2, 11, DONE, PROCEVENTS)]
    assert of_unit(*life) == feed(one, *life)
    assert [] == one.feed(task_ended(3, MAIN))


def test_listener_is_told_to_whose_it_is() -> None:
    """One that the manager closes may be any unit's, each once, as it was handed to it."""
    groups = {GROUP: UNIT, OTHER_GROUP: OTHER, "/system.slice/db.socket": OTHER}
    one = Lineage(EventSource.TRACEFS, (MANAGER,), groups)
    one.adopt(UNIT, MAIN, (), 0)
    assert [(UNIT, closed(MAIN))] == one.feed(closed(MAIN))
    assert [(UNIT, closed(MANAGER)), (OTHER, closed(MANAGER))] == one.feed(closed(MANAGER))
    assert [] == one.feed(closed(FOREIGN))


# Any history ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """One process as it truly is.

    Attributes:
        unit: None outside, and for a child of the manager that is not in its place yet.
        tasks: Those that run; its pid is its own until the last of them has ended.
        keeps_pid: It may become known late, and until then nobody else can have its pid.
        held: What should be told once it is in its place.
    """

    pid: int
    unit: str | None
    tasks: list[int]
    keeps_pid: bool = False
    is_placed: bool = True
    held: list[KernelEvent] = field(default_factory=list)


class Machine:
    """A machine that makes only what a kernel and a manager can, and knows the truth.

    What happens is not told before the next ``pump``, and a ``walk`` may come before that.
    """

    def __init__(self) -> None:
        self.now = 0
        self.lineage = lineage(tasks=(MAIN,))
        self.lineage.adopt(OTHER, 20, (20,), 0)
        self.manager, self.foreign = Life(MANAGER, None, [MANAGER]), Life(FOREIGN, None, [FOREIGN])
        members = [Life(MAIN, UNIT, [MAIN]), Life(20, OTHER, [20])]
        self.lives = [self.manager, self.foreign, *members]
        self.late: list[Life] = []
        self.queue: list[KernelEvent] = []
        self.expected: list[Routed] = []
        self.told: list[Routed] = []
        self.taken: set[int] = set()
        self.next_pid = 1000

    def tick(self) -> int:
        """A moment that is only once."""
        self.now += 1
        return self.now

    def happen(self, life: Life, event: KernelEvent, *, told: KernelEvent | None = None) -> None:
        """Something happens to a task, and should be told of its process in that form."""
        self.queue.append(event)
        if told is not None and life.unit is not None:
            self.expected.append((life.unit, told))
        elif told is not None:
            life.held.append(told)

    def choose(self, number: int) -> Life:
        """A process that runs and is none of the two that always do."""
        return self.lives[number % len(self.lives)]

    def new_pid(self, keeps_pid: bool) -> int:
        """The lowest that is free, so that pids come again soon; not one that ended just now."""
        if not keeps_pid:
            used = {pid for life in self.lives for pid in (life.pid, *life.tasks)} | self.taken
            return next(pid for pid in range(100, 1000) if pid not in used)
        self.next_pid += 1
        return self.next_pid

    def fork(self, number: int, how: int) -> None:
        """In the cgroup of the maker, or elsewhere: as the manager likes, or below its own."""
        maker = self.choose(number)
        if not maker.is_placed:
            return
        is_elsewhere = how % 2 == 1 and maker is not self.foreign
        unit, is_placed = maker.unit, True
        if maker is self.manager:
            unit = (UNIT, OTHER, None)[how // 2 % 3] if is_elsewhere else None
            is_placed = is_elsewhere
        keeps_pid = maker.keeps_pid or (is_elsewhere and unit is not None)
        pid = self.new_pid(keeps_pid)
        child = Life(pid, unit, [pid], keeps_pid, is_placed)
        task = maker.tasks[how % len(maker.tasks)]
        born = task_born(self.tick(), pid, task, is_elsewhere=is_elsewhere)
        self.happen(child, born, told=replace(born, maker=maker.pid))
        self.lives.append(child)

    def thread(self, number: int, how: int) -> None:
        """Any of the tasks makes another."""
        life = self.choose(number)
        if life is self.manager:
            return
        pid, maker = self.new_pid(life.keeps_pid), life.tasks[how % len(life.tasks)]
        self.happen(life, task_born(self.tick(), pid, maker, is_thread=True))
        life.tasks.append(pid)

    def end(self, number: int, how: int) -> None:
        """One task ends, and with the last one its process."""
        life = self.choose(number)
        if life not in (self.manager, self.foreign):
            self._end(life, life.tasks[how % len(life.tasks)])

    def exit(self, number: int, how: int) -> None:
        """All tasks end, in any order."""
        life = self.choose(number)
        if life not in (self.manager, self.foreign):
            for task in life.tasks[how % len(life.tasks) :] + life.tasks[: how % len(life.tasks)]:
                self._end(life, task)

    def _end(self, life: Life, task: int) -> None:
        life.tasks.remove(task)
        self.taken.add(task)
        for event in (
            task_ended(self.tick(), task),
            task_ended(self.tick(), task, DONE, PROCEVENTS),
        ):
            self.happen(life, event, told=None if life.tasks else replace(event, pid=life.pid))
        if not life.tasks:
            self.lives.remove(life)
            self.taken.add(life.pid)
            self.late += [life] if life.keeps_pid and life.unit is not None else []

    def execute(self, number: int, how: int) -> None:
        """Any of the tasks runs a program, and is the only one then, with the pid of all."""
        life = self.choose(number)
        task = life.tasks[how % len(life.tasks)]
        for other in [other for other in life.tasks if other != task]:
            self._end(life, other)
        event = task_executed(self.tick(), life.pid, before=task)
        self.happen(life, event, told=event)
        self.taken.add(task)
        life.tasks = [life.pid]

    def place(self, number: int, how: int) -> None:
        """The manager moves a child to its place."""
        waiting = [life for life in self.lives if not life.is_placed]
        if waiting:
            life = waiting[number % len(waiting)]
            life.unit, group = ((UNIT, GROUP), (OTHER, OTHER_GROUP), (None, FOREIGN_GROUP))[
                how % 3
            ]
            life.is_placed = True
            self.happen(life, task_moved(self.tick(), life.pid, group))
            if life.unit is not None:
                self.expected += [(life.unit, event) for event in life.held]

    def move(self, number: int, how: int) -> None:
        """A process that is known as one of a unit gets into the other one."""
        self.pump()
        life = self.choose(number)
        if life.unit is not None:
            life.unit, group = (OTHER, OTHER_GROUP) if life.unit == UNIT else (UNIT, GROUP)
            self.happen(life, task_moved(self.tick(), life.pid, group))

    def signal(self, number: int, how: int) -> None:
        """Any task gets one."""
        life, sender = self.choose(number), self.choose(how)
        event = signalled(self.tick(), life.tasks[how % len(life.tasks)], sender.pid)
        self.happen(life, event, told=replace(event, pid=life.pid))

    def walk(self, number: int = 0, how: int = 0) -> None:
        """Look who is in the cgroups of the units."""
        for life in self.lives:
            if life.unit is not None:
                self.told += self.lineage.adopt(life.unit, life.pid, life.tasks, self.tick())

    def pump(self, number: int = 0, how: int = 0) -> None:
        """Tell what has happened, and look where those are of whom it did not say."""
        self.told += feed(self.lineage, *self.queue)
        self.queue.clear()
        self.taken.clear()
        units = {life.pid: life.unit for life in self.lives}
        for pid in self.lineage.strays:
            unit = units.get(pid)
            if unit is not None:
                self.told += self.lineage.adopt(unit, pid, (), self.tick())

    def finish(self) -> None:
        """Tell the rest; of those that have ended unknown the manager says whose they were."""
        self.pump()
        for life in self.late:
            if life.unit is not None:
                self.told += self.lineage.adopt(life.unit, life.pid, (), self.tick())


STEPS = (
    *(Machine.fork, Machine.thread, Machine.end, Machine.exit, Machine.execute),
    *(Machine.place, Machine.move, Machine.signal, Machine.walk, Machine.pump),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 5)),
        min_size=60,
        max_size=120,
    )
)
def test_any_history_is_told_once_and_to_whom_it_concerns(history: list[tuple]) -> None:
    """Each birth, program, signal and end of a member, and nothing of anybody else."""
    machine = Machine()
    for step, number, how in history:
        step(machine, number, how)
    machine.finish()
    told = [routed for routed in machine.told if not isinstance(routed[1], TaskMoved)]
    assert sorted(machine.expected, key=time_of) == sorted(told, key=time_of)
    for pid in {event.pid for _, event in told}:
        own = [routed for routed in told if routed[1].pid == pid]
        assert sorted(own, key=time_of) == own


def time_of(routed: Routed) -> int:
    """By which they are told apart as well."""
    return routed[1].at_us
