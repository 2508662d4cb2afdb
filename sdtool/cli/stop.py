"""stop."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from sdtool.cli.invocation import Invocation
from sdtool.cli.units import Units
from sdtool.cli.views import show_reports
from sdtool.errors import Interrupted, InvalidArgument
from sdtool.model.answer import Answer
from sdtool.model.names import is_glob
from sdtool.model.stop import OBSERVERS, Event, EventKind, StopOptions, StopReport, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from sdtool.host.eventlog import OnEvents


def stop_command(
    ctx: typer.Context,
    units: Units,
    deadline: Annotated[
        float | None,
        typer.Option(metavar="S", help="Stop watching after this many seconds; the job goes on."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Stop critical units too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask about globs.")] = False,
    observers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Observe with these only, or with all but -these; see sdtool doctor. "
            f"{', '.join(OBSERVERS)}, none.",
        ),
    ] = None,
    no_ask_password: Annotated[
        bool,
        typer.Option("--no-ask-password", help="Do not let polkit ask for a password."),
    ] = False,
    jsonl: Annotated[
        bool,
        typer.Option("--jsonl", help="Print each event as a line of JSON, then the document."),
    ] = False,
) -> int:
    """Stop units and watch every step.

    Exits 1 unless all of them stopped cleanly: when something was SIGKILLed, failed or stayed
    behind.
    """
    invocation = ctx.ensure_object(Invocation)
    if deadline is not None and not deadline > 0:
        raise InvalidArgument(f"A deadline of {deadline:g} s has passed already.")
    options = StopOptions(
        deadline_s=deadline,
        force=force,
        # What counts is where a password would be typed, not where the answer goes.
        interactive=not no_ask_password and sys.stdin.isatty(),
        observers=parse_observers(observers),
    )
    names = _confirm(invocation, units, yes)
    answer = _stop(invocation, names, options, jsonl)
    bad = any(report.verdict is not Verdict.CLEAN for report in answer.data)
    return invocation.finish(answer, show_reports, bad=bad)


def parse_observers(text: str | None) -> frozenset[str] | None:
    """The observers that a LIST stands for; None for all.

    Raises:
        InvalidArgument: A name is none of ``OBSERVERS``.
    """
    if text is None:
        return None
    parts = frozenset(part for part in text.split(",") if part)
    without = frozenset(part.removeprefix("-") for part in parts if part.startswith("-"))
    only = frozenset(part for part in parts if not part.startswith("-"))
    named = only - {"none"}
    # With a minus alone it is all but those.
    chosen = named if only or not without else frozenset(OBSERVERS)
    unknown = (named | without) - frozenset(OBSERVERS)
    if unknown:
        raise InvalidArgument(
            f"{', '.join(sorted(unknown))} is no observer.", hint=f"{', '.join(OBSERVERS)} or none"
        )
    return chosen - without


def _confirm(invocation: Invocation, units: list[str], yes: bool) -> list[str]:
    """Expand globs, and let the user see what they stand for before it is stopped."""
    if yes or not any(is_glob(unit) for unit in units):
        return units
    found = invocation.ask(lambda host: host.resolve(units))
    if found.errors:
        raise found.errors[0]
    listed = "".join(f"  {name}\n" for name in found.data)
    if invocation.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidArgument(
            f"The pattern stands for {', '.join(found.data)}.", hint="--yes stops them"
        )
    sys.stderr.write(f"This stops:\n{listed}")
    if not typer.confirm("Stop them?", err=True):
        raise Interrupted("Nothing was stopped.")
    return list(found.data)


def _stop(
    invocation: Invocation, names: list[str], options: StopOptions, jsonl: bool
) -> Answer[StopReport]:
    from sdtool.host.record import KernelRecord

    with ExitStack() as stack:
        record = stack.enter_context(KernelRecord(options.observers))
        view = None if jsonl or invocation.json else _View(invocation, stack)
        if view is not None:
            on_events: OnEvents = view.on_events
        else:
            on_events = partial(_print_json_lines, invocation) if jsonl else _ignore
        request = _Request(invocation, view, on_events)
        answer = invocation.ask(
            lambda host: host.stop(
                names,
                options,
                on_events=request.on_events,
                on_request=request.on_request,
                asking=request.asking,
                interrupt=request.interrupted,
                record=record,
            ),
            request.interrupt,
        )
    if request.interrupted.is_set() and not any(
        isinstance(error, Interrupted) for error in answer.errors
    ):
        last = Interrupted("Interrupted; there was nothing left to watch.")
        return replace(answer, errors=(*answer.errors, last))
    return answer


def _ignore(events: tuple[Event, ...]) -> None:
    pass


def _print_json_lines(invocation: Invocation, events: tuple[Event, ...]) -> None:
    from sdtool.render.json import event_line

    invocation.write("".join(f"{event_line(event)}\n" for event in events))


class _Request:
    """What goes on between the terminal and the job: an interrupt, and polkit's question.

    Attributes:
        interrupted: Set when the watch is to end.
    """

    def __init__(self, invocation: Invocation, view: _View | None, on_events: OnEvents) -> None:
        import asyncio

        self.interrupted = asyncio.Event()
        self._invocation = invocation
        self._view = view
        self._on_events = on_events
        self._units: list[str] = []
        self._held: list[tuple[Event, ...]] | None = None
        self._is_terminal = sys.stdout.isatty()

    def on_request(self, unit: str) -> None:
        """A stop is asked for: from now on there can be a job that goes on without us."""
        self._units.append(unit)
        self._invocation.farewell = (
            "No longer watching; whether the stop job goes on was not looked at: "
            f"{', '.join(self._units)}."
        )

    def interrupt(self) -> bool:
        """End the watch with an answer; there is none before anything was asked for."""
        if not self._units:
            return False
        if self._is_terminal and not sys.stdout.isatty():
            self._invocation.write_nowhere()  # it has hung up
        self.interrupted.set()
        return True

    def on_events(self, events: tuple[Event, ...]) -> None:
        """Show events, or keep them: the password prompt has the terminal for itself."""
        if self._held is not None and sys.stdout.isatty():
            self._held.append(events)
        else:
            self._on_events(events)

    @asynccontextmanager
    async def asking(self, unit: str) -> AsyncIterator[str | None]:
        """Have an agent on the terminal for the one question about a unit, or say why not."""
        from sdtool.cli.agent import agent_on_terminal

        self._held = []
        try:
            with self._view.paused() if self._view else nullcontext():
                async with agent_on_terminal() as lack:
                    yield lack
        finally:
            held, self._held = self._held, None
            for events in held:
                self._on_events(events)


class _View:
    """A line an event; on a terminal the countdown of the phase below them."""

    def __init__(self, invocation: Invocation, stack: ExitStack) -> None:
        self._invocation = invocation
        self._units: set[str] = set()
        self._start_us: int | None = None
        self._states: dict[str, Event] = {}
        self._asked = self._has_job = self._printed = False
        self._live: Live | None = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = stack.enter_context(
                Live(
                    console=invocation.console(sys.stdout),
                    get_renderable=self._countdown,
                    transient=True,
                    refresh_per_second=10,
                )
            )

    def _countdown(self) -> Text:
        from sdtool.render.timeline import render_countdown

        waiting = [state for state in self._states.values() if state.limit_us is not None]
        latest = max(waiting, key=lambda state: state.at_us, default=None)
        return render_countdown(latest, time.monotonic_ns() // 1000)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to somebody else; after that the stop begins with its job."""
        self._asked = True
        if self._live is not None:
            self._live.stop()
        try:
            yield
        finally:
            if self._live is not None:
                self._live.start()

    def on_events(self, events: Sequence[Event]) -> None:
        """Show events that happened at about the same time."""
        from rich.console import Group

        from sdtool.render.timeline import render_events

        if self._start_us is None:
            # The request follows at once when the last observer is armed.
            armed = [e.at_us for e in events if e.kind is EventKind.OBSERVER]
            self._start_us = max(armed, default=events[0].at_us)
        if not self._has_job and any(e.kind is EventKind.JOB_NEW for e in events):
            self._has_job = True
            if self._asked and not self._printed:
                self._start_us = min(e.at_us for e in events if e.kind is not EventKind.OBSERVER)
        self._states |= {e.unit: e for e in events if e.kind is EventKind.STATE}
        # All units have their observers armed before anything is asked: the first batch has them.
        self._units |= {event.unit for event in events}
        several, verbose = len(self._units) > 1, self._invocation.verbose
        lines = render_events(events, self._start_us, with_unit=several, verbose=verbose)
        if lines:
            # At once: a thousand processes end together, and the stop goes on meanwhile.
            self._print(Group(*lines))

    def _print(self, lines: RenderableType) -> None:
        self._printed = True
        if self._live is not None:
            self._live.console.print(lines)
        else:
            self._invocation.print(lines)
