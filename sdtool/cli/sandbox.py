"""sandbox."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sdtool.errors import Exit

if TYPE_CHECKING:
    from sdtool.sandbox import Sandbox

DEMO: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Which units run, with how many processes, on which ports?", ("list", "sdtool-*")),
    ("What is in this one, and what would SIGTERM do to each?", ("trace", "sdtool-forks")),
    ("Who owns port 18080?", ("port", "18080/tcp")),
    ("A clean stop.", ("stop", "sdtool-graceful")),
    ("A stop that needs SIGKILL: systemctl would exit 0 here.", ("stop", "sdtool-forks")),
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

    A real systemd --user manager with the demo units; it ends with the command. Needs root.
    """
    if demo:
        return run_demo()
    from sdtool.sandbox import PrivateManager

    with PrivateManager() as manager:
        if command is None and sys.stderr.isatty():
            _greet()
        return _call(manager, command or [os.environ.get("SHELL", "/bin/sh")])


def _greet() -> None:
    sys.stderr.write(
        "A real systemd --user manager with the demo units; it ends with this shell. Try:\n"
        "  systemctl --user start sdtool-forks\n"
        "  sdtool trace --user sdtool-forks\n"
        "  sdtool stop --user sdtool-forks\n"
    )


def _call(sandbox: Sandbox, command: Sequence[str]) -> int:
    """Run a command inside on our own terminal; its exit status, as a shell reports it."""
    with subprocess.Popen(sandbox.argv(command)) as process:
        while True:
            try:
                status = process.wait()
                return 128 - status if status < 0 else status
            except KeyboardInterrupt:
                # Ctrl-C is the command's to handle: it has got it too.
                continue


def run_demo() -> int:
    """list, trace, port and two stops on the demo units; removes all of it afterwards."""
    from sdtool.sandbox import find_manager

    with find_manager() as sandbox:
        started = sandbox.run(["systemctl", "--user", "start", *DEMO_UNITS])
        if started.returncode != 0:
            sys.stderr.write(started.stderr)
            return Exit.BAD
        statuses = [_show(sandbox, title, words) for title, words in DEMO]
    # The last stop needs SIGKILL, and says so by its exit status: that is the demo's success.
    return Exit.OK if statuses == [0, 0, 0, 0, 1] else Exit.BAD


def _show(sandbox: Sandbox, title: str, words: Sequence[str]) -> int:
    words = [*words, "--user"]
    sys.stdout.write(f"\n# {title}\n$ sdtool {' '.join(words)}\n")
    sys.stdout.flush()
    status = _call(sandbox, [sys.executable, "-m", "sdtool", *words])
    sys.stdout.write(f"(exit {status})\n")
    sys.stdout.flush()
    return status
