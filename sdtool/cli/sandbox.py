"""sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import click
import typer

from sdtool.cli.invocation import Invocation
from sdtool.cli.terminal import terminal_restored
from sdtool.errors import Exit, Interrupted, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from sdtool.sandbox import Sandbox

_GRACE = 1.0

SUITE = "sdtool.suite"
"""Where the context keeps what --container says."""

GREETING = """\
A real systemd --user manager with the demo units; it ends with this shell. Try:
  systemctl --user start sdtool-forks
  sdtool trace --user sdtool-forks
  sdtool stop --user sdtool-forks
"""

CONTAINER_GREETING = """\
Debian {} in a container, booted by systemd, with the demo units; it ends with this shell. Try:
  systemctl start sdtool-forks
  sdtool trace sdtool-forks
  sdtool stop sdtool-forks
  su - tester            # an ordinary user; its password is its name, and root's is root
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the demo: what it shows, its words, and the exit status that is right."""

    title: str
    words: tuple[str, ...]
    expected: Exit = Exit.OK


DEMO = (
    Step("Which units run, with how many processes, on which ports?", ("list", "sdtool-*")),
    Step("What is in this one, and what would SIGTERM do to each?", ("trace", "sdtool-forks")),
    Step("Who owns port 18080?", ("port", "18080/tcp")),
    Step("A clean stop.", ("stop", "sdtool-graceful")),
    Step(
        "A stop that needs SIGKILL: systemctl would exit 0 here.",
        ("stop", "sdtool-forks"),
        Exit.BAD,
    ),
)

DEMO_UNITS = ("sdtool-graceful", "sdtool-forks", "sdtool-activated.socket")


def sandbox_command(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- CMD...]", help="What to run; a shell by default."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show what sdtool does, on the demo units.")
    ] = False,
) -> int:
    """Run a command or a shell in a throwaway systemd.

    A real systemd --user manager with the demo units, or with --container a whole system with
    them; it ends with the command. Needs root.
    """
    try:
        invocation = ctx.ensure_object(Invocation)
        invocation.configure_logging()
        suite = ctx.meta.get(SUITE)
        if demo and (suite or command):
            raise InvalidArgument("--demo takes neither a container nor a command.")
        if demo:
            return run_demo(invocation)
        return _run(command) if suite is None else _run_in_container(suite, command)
    except KeyboardInterrupt as error:
        raise Interrupted("Interrupted; the sandbox is gone.") from error


def _store_suite(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta[SUITE] = value


# typer has no options whose value may be left out; click has.
sandbox_command.options = [  # type: ignore[attr-defined]
    click.Option(
        param_decls=["--container", "container"],
        help="Boot Debian (bookworm, trixie or sid) in a container instead.  [trixie]",
        metavar="[SUITE]",
        is_flag=False,
        flag_value="trixie",
        expose_value=False,
        callback=_store_suite,
    )
]


def _run(command: Sequence[str] | None) -> int:
    from sdtool.sandbox import PrivateManager

    with PrivateManager() as manager:
        if command is None and sys.stderr.isatty():
            sys.stderr.write(GREETING)
        command = command or [os.environ.get("SHELL", "/bin/sh")]
        return _call(manager.argv(command))


def _run_in_container(suite: str, command: Sequence[str] | None) -> int:
    from sdtool.sandbox import Container

    with Container(suite, on_progress=_say_progress) as container:
        container.log_in()
        if command is None and sys.stderr.isatty():
            sys.stderr.write(CONTAINER_GREETING.format(suite))
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        return _call(container.argv(command or ["bash", "--login"], terminal=terminal))


def _say_progress(sentence: str) -> None:
    sys.stderr.write(f"sdtool: {sentence}\n")


def _call(argv: Sequence[str]) -> int:
    """Run what is inside on our own terminal; its exit status, as a shell reports it.

    Raises:
        KeyboardInterrupt: We got a SIGTERM or SIGHUP; the command is dead by then.
    """
    with _ctrl_c_left_alone(), terminal_restored(), subprocess.Popen(argv) as process:
        try:
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _ctrl_c_left_alone() -> Iterator[None]:
    """Leave Ctrl-C to the command: the terminal sends it to both.

    A handler, not SIG_IGN, which the command would inherit; unless it is ignored already.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command, by force after a moment; a shell at its prompt heeds SIGHUP only."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return


def run_demo(invocation: Invocation) -> int:
    """list, trace, port and two stops on the demo units; removes all of it afterwards."""
    from sdtool.sandbox import find_manager

    with find_manager() as sandbox:
        started = sandbox.run(["systemctl", "--user", "start", *DEMO_UNITS])
        if started.returncode != 0:
            said = started.stderr.strip().partition("\n")[0].rstrip(".")
            raise Unavailable(
                f"The demo units did not start: {said}.",
                hint="their ports may be taken, by another demo: sdtool port 18080 18083",
            )
        result = Exit.OK
        for step in DEMO:
            status = _show(invocation, sandbox, step)
            if status == Exit.INTERRUPTED:
                return Exit.INTERRUPTED
            if status != step.expected:
                result = Exit.BAD
                command = f"sdtool {' '.join(step.words)}"
                sys.stderr.write(
                    f"sdtool: {command} exited {status}, expected {int(step.expected)}.\n"
                )
    return result


def _show(invocation: Invocation, sandbox: Sandbox, step: Step) -> int:
    from rich.text import Text

    words = [*step.words, "--user"]
    title = Text(f"\n{step.title}", style="bold")
    invocation.print(title.append(f"\n$ sdtool {' '.join(words)}", style="not bold"))
    sys.stdout.flush()
    words += ["--color", invocation.color]
    status = _call(sandbox.argv([sys.executable, "-m", "sdtool", *words]))
    invocation.print(Text(f"(exit {status})"))
    sys.stdout.flush()
    return status
