"""What the manager has said of one unit while it stops, signal by signal and on being asked again.

The manager itself is not known here: its words come in, and events and a state come of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdtool.analysis import absence, phases, timeline
from sdtool.analysis.events import SIGNAL_LEAD_US
from sdtool.analysis.phases import ENDED
from sdtool.host.ends import Ends
from sdtool.host.eventlog import HOLD_BACK_US, EventLog, now_us
from sdtool.host.members import Members
from sdtool.host.record import UnitRecord
from sdtool.model.manager import JobChange, MainExit, ManagerGap, UnitChange
from sdtool.model.stop import Event, EventKind, EventSource, Evidence, StopPolicy
from sdtool.model.unit import Unit, UnitDetails

UNTOLD_END = "the manager was out of reach when the job ended"

State = tuple[UnitDetails, UnitChange]
"""A unit as the manager tells it now."""


class Told:
    """The state of a unit and of its stop job by the manager's words; they go to the log too.

    Args:
        details: The unit before the stop.
        members: Its processes: what the manager says of them is handed on.
        ends: Their ends: what the manager says of its main process is handed on.
        record: The kernel's: where that has the signals none has to be concluded.

    Attributes:
        policy: How the unit is stopped; a reload can change it.
        state_us: When the unit came into its state, by the manager's clock; 0 for the first.
        result: The last result; None when it is not known or the type has none.
        result_reason: Why the result is not known; None when it is known.
        begun: What is told belongs to a stop.
        requested: The stop was asked for by itself; else the unit goes down along.
        has_job: The manager has said that there is a stop job.
        job: The object path of the job that was asked for; None while it is not known.
        job_result: systemd's word for it; None until it ended, or when that was not told.
        job_result_reason: Why the job's result is not known; None when it is known.
        started_us: When the unit was found to run anew, by the manager's clock: nothing that is
            told from then on is the stop's; None while it is not.
        requested_us: When the stop was asked for.
        ended_us: When it was over.
        over: Set when the job is over, or the watch was given up.
    """

    def __init__(
        self,
        details: UnitDetails,
        log: EventLog,
        members: Members,
        ends: Ends,
        record: UnitRecord,
    ) -> None:
        unit = details.unit
        self._details = details
        self._log = log
        self._members = members
        self._ends = ends
        self._record = record
        self.policy = details.policy
        self.active_state, self.sub_state = unit.active_state, unit.sub_state
        self.state_us = 0
        self.result = unit.result
        self.result_reason: str | None = None
        self.begun = False
        self.requested = False
        self.has_job = False
        self.job: str | None = None
        self.job_result: str | None = None
        self.job_result_reason: str | None = None
        self.started_us: int | None = None
        self.requested_us = self.ended_us = now_us()
        self.over = asyncio.Event()
        self._control_pid = self._next_control = details.control_pid
        self._main_exit: MainExit | None = None
        self._phases: list[tuple[Event, StopPolicy | None]] = []
        self._concluded_phases = 0
        self._conclusions: list[Event] = []
        self._ended_jobs: dict[str, tuple[JobChange, ManagerGap | None]] = {}
        self._awaits_job = False
        self._answered_us: int | None = None
        self._told_end_us: int | None = None

    @property
    def queued(self) -> bool:
        """Whether the manager has said that it has a stop job for the unit."""
        return self.has_job or self.job is not None

    # The request -----------------------------------------------------------------------------

    def begin(self) -> None:
        """From now on what is told belongs to the stop."""
        self.requested_us = now_us()
        self.begun = True
        self._awaits_job = False

    def begin_after_question(self) -> None:
        """Begin anew: a person is asked first, and the stop begins with its job.

        One that has a job, or had it, is on its way down with another unit already.
        """
        if not (self.has_job or self.over.is_set()):
            self.begin()
            self._awaits_job = True
        self.begun = True

    def expect_job(self) -> None:
        """The stop is asked for by itself: a job that ends before its path is known is kept."""
        self.requested = True

    def refuse(self) -> None:
        """There is no job: what is told from now on belongs to no stop."""
        self.begun = False

    def take_job(self, job: str) -> None:
        """Take the answer to the request, the path of the job."""
        self.job = job
        # One that was over before this answer began before it ended.
        self._begin_with_job(min(now_us(), self.ended_us) if self.over.is_set() else now_us())
        # The job can be over before its path is in our hands.
        if job in self._ended_jobs:
            self._take_end(*self._ended_jobs[job])

    def _begin_with_job(self, heard_us: int) -> None:
        """Let the stop begin with the word of its job, not when the person was asked.

        The word takes a moment to reach us: what was seen in that moment can be the job's own.
        """
        if not self._awaits_job:
            if self._answered_us is not None:
                # The answer can be taken before the signal that came in ahead of it.
                self.requested_us = min(self.requested_us, heard_us)
            return
        self._awaits_job, self._answered_us = False, heard_us
        earliest = self._answered_us - HOLD_BACK_US
        recent = [e.at_us for e in self._log.events if e.at_us >= earliest]
        self.requested_us = max(self.requested_us, min([*recent, self._answered_us]))

    def _begin_with_state(self, at_us: int) -> None:
        """The manager's own clock in a change of state can be ahead of the word of the job.

        What the first phase did came before the first word of it, and the job before that.
        """
        if self._answered_us is not None and at_us >= self._answered_us - HOLD_BACK_US:
            self.requested_us = min(self.requested_us, at_us - SIGNAL_LEAD_US)

    # Signals ---------------------------------------------------------------------------------

    def on_signal(self, signal: UnitChange | JobChange, gap: ManagerGap | None = None) -> None:
        """Take a signal of the manager about this unit.

        Args:
            gap: The time until this signal, where the manager is still to be asked what it has
                told meanwhile.
        """
        if isinstance(signal, UnitChange):
            self._on_change(signal)
        else:
            self._on_job(signal, gap)

    def _on_change(self, change: UnitChange) -> None:
        """The Service part of a change comes first and the Unit part, with the state, second."""
        heard_us = change.heard_us or now_us()
        if self.started_us is None and self._is_start(change):
            self._start_again(change.changed_us or heard_us)
        if self.started_us is not None:
            self._follow_new_run(change, heard_us)
            return
        if not self._has_ended:
            # What runs anew brings a result of its own, and that ahead of its state.
            self.result = change.result or self.result
        if change.main_exit is not None and self._main_exit is None:
            self._on_main_exit(change.main_exit)
        if change.control_pid is not None:
            self._next_control = change.control_pid or None
        if change.sub_state is None or change.active_state is None:
            return
        if (change.active_state, change.sub_state) != (self.active_state, self.sub_state):
            self.active_state, self.sub_state = change.active_state, change.sub_state
            self._on_state(change.changed_us or heard_us)
        if self._next_control != self._control_pid:
            self._control_pid = self._next_control
            self._members.follow_control(self._control_pid, heard_us)

    @property
    def _has_ended(self) -> bool:
        """Whether the job is over and the unit down: its last words have been told."""
        job_ended = self.over.is_set() or bool(self._ended_jobs)
        return self.begun and job_ended and self.active_state in ENDED

    def _is_start(self, change: UnitChange) -> bool:
        """Whether a change leads out of the state in which a stop ends, told or not."""
        if change.active_state is None or change.active_state in ENDED:
            return False
        undone = self.job_result == "done" and change.active_state != "deactivating"
        return self._has_ended or undone

    def _start_again(self, at_us: int) -> None:
        """The unit runs anew: what it is and whom it has from now on is not the stop's."""
        self.started_us = at_us
        self._members.stop_adopting()

    def _follow_new_run(self, change: UnitChange, heard_us: int) -> None:
        """Keep the state of what was started again; only that it was is an event."""
        if change.sub_state is None or change.active_state is None:
            return
        self.active_state, self.sub_state = change.active_state, change.sub_state
        if self.state_us < (self.started_us or 0):
            self._on_state(change.changed_us or heard_us)

    def _on_main_exit(self, main: MainExit) -> None:
        """The manager's word on its main process."""
        if not self.begun or main.pid != self._details.unit.main_pid:
            return
        self._main_exit = main
        self._ends.take_waited(main.pid, main.at_us, main.exit)

    def _on_state(self, at_us: int, **bounds: Any) -> None:
        self.state_us = at_us
        state = self._log.note(
            EventKind.STATE,
            EventSource.DBUS,
            at_us=at_us,
            active_state=self.active_state,
            sub_state=self.sub_state,
            result=self.result if self.started_us is None else None,
            **self._limit(self.policy),
            **bounds,
        )
        if self.begun:
            self._begin_with_state(at_us)
            self._phases.append((state, self.policy))
            if self.active_state in ENDED:
                self.ended_us = at_us
            elif self.active_state != "deactivating":
                self._members.stop_adopting()
        self._members.rescan()

    def _limit(self, policy: StopPolicy | None) -> dict[str, Any]:
        """How long the manager waits in the present phase, and what it does then."""
        if policy is None or not phases.is_stopping(self.sub_state):
            return {}
        limit = phases.limit_of(policy, self.sub_state)
        return {"limit_us": limit, "then": phases.after_limit(policy, self.sub_state)}

    def infer_phases(self, until_us: int) -> None:
        """Conclude what the manager did in each new phase, once its first exits are known."""
        for state, policy in self._phases[self._concluded_phases :]:
            if state.at_us > until_us:
                break
            self._concluded_phases += 1
            concluded = self._infer(state, policy, self._log.events)
            self._conclusions += concluded
            self._log.add(*concluded)

    def conclude(self) -> None:
        """Conclude it anew from all that there is: some ends are known, or dated, only by now.

        What was concluded before and is not so gives way; who has taken it is told no other.
        """
        before = {id(event): event for event in self._conclusions}
        events = [event for event in self._log.events if id(event) not in before]
        anew: list[Event] = []
        for state, policy in self._phases:
            anew += self._infer(state, policy, [*events, *anew])
        self._concluded_phases = len(self._phases)
        old: dict[object, list[Event]] = {}
        for event in self._conclusions:
            old.setdefault(_subject(event), []).append(event)
        for event in anew:
            if same := old.get(_subject(event)):
                self._log.exchange(same.pop(0), event)
            else:
                self._log.add(event)
        self._log.drop([event for rest in old.values() for event in rest])
        self._conclusions = anew

    def _infer(
        self, state: Event, policy: StopPolicy | None, events: Sequence[Event]
    ) -> tuple[Event, ...]:
        if policy is None:
            return ()
        return timeline.infer_phase(
            policy,
            state,
            self._members.known,
            events,
            self.requested_us,
            sees_signals=self._record.sees_signals,
        )

    def _on_job(self, change: JobChange, gap: ManagerGap | None) -> None:
        if not self.begun:
            return
        if change.result is None:
            if self.over.is_set() or self._has_ended:
                return  # the stop's own has come, and gone
            heard_us = change.heard_us or now_us()
            self.has_job = True
            self._begin_with_job(heard_us)
            self._log.note(EventKind.JOB_NEW, EventSource.DBUS, at_us=heard_us)
        elif self.job is None and self.requested:
            self._ended_jobs[change.job] = change, gap
        elif self.job is None or change.job == self.job:
            # Where there is none nobody asked for it by itself: another unit pulls it along.
            self._take_end(change, gap)

    def _take_end(self, change: JobChange, gap: ManagerGap | None) -> None:
        """Take the end of the job, as the manager told it."""
        if self.over.is_set():
            return
        heard_us = self._told_end_us = change.heard_us or now_us()
        if gap is not None:
            self.note_gap_before_end(gap, None)
        self.job_result = change.result
        self._log.note(EventKind.JOB_DONE, EventSource.DBUS, at_us=heard_us, result=change.result)
        self._end(max(heard_us, self.requested_us))

    def _infer_end(self, since_us: int) -> None:
        """Conclude that the job has ended at some moment since then, nobody knows how."""
        if self.over.is_set():
            return
        until_us = now_us()
        self._log.note(
            EventKind.JOB_DONE,
            EventSource.DBUS,
            at_us=since_us,
            evidence=Evidence.INFERRED,
            at_min_us=since_us,
            at_max_us=until_us,
        )
        self._end(until_us)

    def _end(self, at_us: int) -> None:
        """Let the stop be over: with the state that ended it, else then."""
        if self.started_us is not None:
            if self.ended_us < self.requested_us:
                # It had ended by then; when it did was not told.
                self.ended_us = self.started_us
        elif self.active_state not in ENDED or self.ended_us < self.requested_us:
            self.ended_us = at_us
        self.over.set()

    # What was missed -------------------------------------------------------------------------

    def is_behind(self, unit: Unit, job_path: str | None) -> bool:
        """Whether a look at the unit says what no signal has: another state, or its job gone."""
        if unit.job != "stop" or self.job not in (None, job_path):
            return True
        return (unit.active_state, unit.sub_state) != (self.active_state, self.sub_state)

    def resync(self, state: State | None, gap: ManagerGap, *, told: bool) -> None:
        """Take what the manager says now for what it would have told meanwhile.

        Args:
            state: The unit now; None when the manager has forgotten it.
            told: The gap is an event of its own; else only where the end of the job fell into it.
        """
        details = state[0] if state is not None else None
        if told:
            self._note_gap(gap, details.policy if details is not None else None)
        if state is None:
            self._forget(gap)
        else:
            self._catch_up(*state)
        if self._is_job_gone(details):
            self.job_result_reason = UNTOLD_END
            if not told:
                self._note_gap(gap, None)
            self._infer_end(max(gap.since_us, self.state_us))

    def _catch_up(self, details: UnitDetails, change: UnitChange) -> None:
        if (change.changed_us or 0) < self.state_us:
            # A signal that was sent after this answer has overtaken it.
            change = replace(change, active_state=None)
        # One that was started before its stop job came has another run too: that one is stopped.
        gone = self.queued and absence.is_job_gone(self.job, details)
        if gone and self._runs_anew(details.unit):
            if self.active_state not in ENDED:
                # Its own result was not told.
                self.result = change.result or self.result
            self._start_again(max(change.changed_us or now_us(), self.state_us))
        self._on_change(change)

    def _runs_anew(self, unit: Unit) -> bool:
        """Whether a unit is found up that is in another run than the one that is stopped."""
        same = unit.invocation_id == self._details.unit.invocation_id
        return self.started_us is None and not same and unit.active_state not in ENDED

    def note_gap_before_end(self, gap: ManagerGap, policy: StopPolicy | None) -> None:
        """Tell the gap within which the end of the job was told: it lasted until then.

        Args:
            policy: How the unit is stopped now; None where nobody was asked.
        """
        told_us = self._told_end_us
        known = {event.at_min_us for event in self._log.of_kind(EventKind.GAP)}
        if told_us is not None and gap.since_us not in known:
            # Both can come in at one moment, and the loss is noted when its turn comes.
            since_us = min(gap.since_us, told_us)
            self._note_gap(replace(gap, since_us=since_us, until_us=told_us), policy)

    def _note_gap(self, gap: ManagerGap, policy: StopPolicy | None) -> None:
        """Tell the gap, and what a reload has changed for the phase that it came upon."""
        changed = policy is not None and policy != self.policy
        stopping = changed and phases.is_stopping(self.sub_state)
        self.policy = policy if changed else self.policy
        self._log.note(
            EventKind.GAP,
            EventSource.SDTOOL,
            at_us=gap.until_us,
            at_min_us=gap.since_us,
            at_max_us=gap.until_us,
            text=f"{gap.reason}; the stop policy changed" if changed else gap.reason,
            sub_state=self.sub_state if stopping else None,
            **(self._limit(policy) if changed else {}),
        )

    def _forget(self, gap: ManagerGap) -> None:
        """The manager knows the unit no more: it became inactive, at an unknown moment."""
        if self.active_state in ENDED:
            return
        self.active_state, self.sub_state = "inactive", "dead"
        self.result, self.result_reason = absence.result_of_forgotten(self._details)
        self._on_state(
            absence.end_of_forgotten(self._log.events, gap),
            evidence=Evidence.INFERRED,
            at_min_us=gap.since_us,
            at_max_us=gap.until_us,
        )

    def _is_job_gone(self, details: UnitDetails | None) -> bool:
        """Whether the job that is awaited is over, though nobody told its end."""
        if not self.begun or (self.requested and self.job is None):
            return False
        gone = absence.is_job_gone(self.job, details)
        if not self.requested and not self.has_job:
            # One that goes down along: its job may have come, and gone, unseen.
            self.has_job = not gone or self.active_state in ENDED
        return gone and (self.requested or self.has_job)

    def take_last_state(self, state: State | None) -> None:
        """Take what the manager says after the job, of which no event is made any more."""
        active, sub = "inactive", "dead"
        if state is not None:
            active, sub = state[0].unit.active_state, state[0].unit.sub_state
            down = self.job_result == "done" or self.active_state in ENDED
            if down and self._runs_anew(state[0].unit):
                self._start_again(state[1].changed_us or now_us())
        if active != "inactive" or self.active_state not in ENDED:
            # A unit that failed and was forgotten reads as inactive: the signal's word stays.
            self.active_state, self.sub_state = active, sub


def _subject(event: Event) -> object:
    """What an event concludes of whom, whenever that was."""
    return event.kind, event.process, event.signal, event.sub_state
