"""One run of the command line: its common options, where it prints, how it ends."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sdtool.errors import Exit, Interrupted, SdtoolError, Unavailable
from sdtool.model.answer import Answer
from sdtool.model.scope import Scope

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sdtool.host import Host

T = TypeVar("T")

PIPE_WIDTH = 100_000
"""Wide enough for any table: nothing is cut that goes to a pipe."""


@dataclass(slots=True)
class Invocation:
    """What the common options say; filled in while the command line is parsed.

    Attributes:
        mute: Stdout takes nothing any more: errors go to stderr.
        farewell: What to say when the question is cancelled: what was asked for without an end.
        answered: What there is to say has been said.
    """

    command: str = ""
    scope: Scope = Scope.SYSTEM
    json: bool = False
    color: str = "auto"
    verbose: bool = False
    debug: bool = False
    farewell: str | None = None
    answered: bool = False
    mute: bool = False

    @classmethod
    def guess(cls, argv: Sequence[str]) -> Invocation:
        """What can be told before parsing, so that a usage error too is JSON when asked for."""
        options = list(argv[: argv.index("--")] if "--" in argv else argv)
        words = [word for word in options if not word.startswith("-")]
        return cls(
            command=words[0] if words else "",
            json=any(word.partition("=")[0] in ("--json", "--jsonl") for word in options),
            debug="--debug" in options,
        )

    def ask(
        self,
        question: Callable[[Host], Awaitable[T]],
        interrupt: Callable[[], bool] | None = None,
    ) -> T:
        """Open the host, ask it, close it: the one place where the event loop runs.

        Args:
            interrupt: Called at the first Ctrl-C, SIGTERM or SIGHUP: has the question come to an
                answer soon, or returns False. Without that, and at the second, the question is
                cancelled.

        Raises:
            Interrupted: The question was cancelled; everything is torn down by then.
        """
        import asyncio

        from sdtool.host import Host

        answers: list[T] = []

        async def answer() -> None:
            with _ended_by_signals(interrupt):
                async with Host(self.scope) as host:
                    # Not returned: asyncio.run puts the handler of SIGINT back, and Python
                    # formats the old one for that, with the task in it and all of its result.
                    answers.append(await question(host))

        self.configure_logging()
        try:
            asyncio.run(answer())
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            raise Interrupted(self.farewell or "Interrupted.") from error
        return answers[0]

    def configure_logging(self) -> None:
        """Send what is logged to stderr, as much as the options ask for."""
        level = logging.DEBUG if self.debug else logging.INFO if self.verbose else logging.WARNING
        logging.basicConfig(level=level, format="sdtool: %(message)s", stream=sys.stderr)
        # The libraries log what we handle ourselves.
        for library in ("asyncio", "dbus_fast"):
            logging.getLogger(library).setLevel(logging.CRITICAL)

    def finish(
        self,
        answer: Answer[Any],
        show: Callable[[Sequence[Any]], RenderableType],
        *,
        bad: bool = False,
    ) -> int:
        """Print an answer as text or as the envelope, and return the exit status.

        Args:
            show: Renders the data for people; not called where there is none.
            bad: The answer is a bad one: exit 1, unless something could not be answered.
        """
        self.answered = True
        status = answer.errors[0].exit if answer.errors else Exit.BAD if bad else Exit.OK
        if any(isinstance(error, Interrupted) for error in answer.errors):
            status = Exit.INTERRUPTED  # whatever else there is: nobody waited for the answer
        if self.json:
            self._print_envelope(answer.data, answer.errors, status, answer.notes)
            return status
        if answer.data:
            self.print(show(answer.data))
        for note in answer.notes:
            print_note(note)
        for error in answer.errors:
            print_error(error)
        return status

    def _print_envelope(
        self,
        data: Sequence[Any],
        errors: Sequence[SdtoolError],
        status: Exit,
        notes: Sequence[str] = (),
    ) -> None:
        from sdtool.render.json import envelope

        self.write(envelope(self.command, data, errors, status, notes) + "\n")

    def write(self, text: str) -> None:
        """Write to stdout; when its reader has gone (head, less), go on without a word.

        The exit status still tells the answer, and a stop is still watched to its end.
        """
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.write_nowhere()
        except OSError as error:
            self.write_nowhere()
            raise lost_output(error, None if self.answered else self.farewell) from error

    def write_nowhere(self) -> None:
        """Let the descriptor itself lead nowhere, so that the flush at exit cannot fail either."""
        self.mute = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

    def print(self, renderable: RenderableType) -> None:
        """Print for people; a pipe gets plain text in full width."""
        if sys.stdout.isatty():
            self.console(sys.stdout).print(renderable)
            return
        buffer = io.StringIO()
        self.console(buffer).print(renderable)
        lines = (line.rstrip() for line in buffer.getvalue().splitlines())
        self.write("".join(f"{line}\n" for line in lines))

    def console(self, file: TextIO) -> Console:
        """A console on a stream, with the colours that the options and the terminal allow."""
        from rich.console import Console

        terminal, colour = file.isatty(), wants_colour(self.color)
        return Console(
            file=file,
            width=None if terminal else PIPE_WIDTH,
            force_terminal=None if terminal else False,
            color_system="auto" if colour and terminal else "standard" if colour else None,
            no_color=False if self.color == "always" else None,
            highlight=False,
            soft_wrap=False,
            emoji=False,
            markup=False,
        )


@contextlib.contextmanager
def _ended_by_signals(interrupt: Callable[[], bool] | None) -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and SIGHUP interrupt the question, or cancel it.

    An exception out of a signal's handler could come up anywhere in the event loop, and be lost.
    """
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    tries = iter([interrupt] if interrupt is not None else [])

    def end() -> None:
        gently = next(tries, None)
        if gently is None or not gently():
            task.cancel()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # From now on it is asyncio's, which in the end breaks off whatever does not end.
            signal.signal(number, before[signal.SIGINT])
        loop.call_soon_threadsafe(end)

    numbers = [signal.SIGTERM, signal.SIGHUP]
    if interrupt is not None:
        numbers.append(signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lost_output(error: OSError, farewell: str | None = None) -> Unavailable:
    """The error for a stdout that takes no more.

    Args:
        farewell: What goes on without us.
    """
    return Unavailable(f"The answer could not be written: {error.strerror}.", hint=farewell)


def wants_colour(option: str) -> bool:
    """Whether to colour: --color, else NO_COLOR, else whether stdout is a terminal."""
    if option != "auto":
        return option == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def print_error(error: SdtoolError) -> None:
    """One sentence on stderr, and the hint below it."""
    from sdtool.render.plain import clean

    hint = f"({clean(error.hint)})\n" if error.hint else ""
    with contextlib.suppress(OSError):
        # A full or closed stderr must not change the exit status.
        sys.stderr.write(f"sdtool: {clean(str(error))}\n{hint}")


def print_note(note: str) -> None:
    """What an answer may lack, on stderr: it is neither data nor an error."""
    from sdtool.render.plain import clean

    with contextlib.suppress(OSError):
        sys.stderr.write(f"(not all could be seen: {clean(note)})\n")


def report_failure(invocation: Invocation, error: SdtoolError) -> int:
    """Say why there is no answer at all, as text or in the envelope."""
    if invocation.json and not invocation.mute:
        invocation._print_envelope((), (error,), error.exit)
    else:
        print_error(error)
    return error.exit
