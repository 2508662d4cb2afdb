"""The command line: arguments -> Host -> render -> exit status.

The only room that prints, and the only one that runs an event loop. A command's module is
imported when that command is asked for: start-up time is a feature.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO, cast

from click.exceptions import Abort, ClickException, NoSuchOption, UsageError

from sdtool.cli.app import build_app
from sdtool.cli.invocation import Invocation, lost_output, report_failure
from sdtool.errors import Exit, Interrupted, InvalidArgument, SdtoolError, Unavailable

LOST_OUTPUT = (errno.ENOSPC, errno.EIO, errno.EPIPE)
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; the entry point of the console script."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_streams()
    invocation = Invocation.guess(argv)
    try:
        status = int(
            build_app(invocation).main(argv, prog_name="sdtool", standalone_mode=False) or 0
        )
        if status == Exit.INTERRUPTED and not (
            invocation.answered or invocation.command == "sandbox"
        ):
            # typer makes that of a Ctrl-C before or after the question itself.
            raise Interrupted("Interrupted.")
        return status
    except ClickException as error:
        return report_failure(invocation, _as_ours(error))
    except SdtoolError as error:
        return report_failure(invocation, error)
    except (KeyboardInterrupt, Abort):
        return report_failure(invocation, Interrupted("Interrupted."))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOST_OUTPUT:
            # What typer prints itself (the help) has no other way to say so.
            invocation.write_nowhere()
            return report_failure(invocation, lost_output(error))
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            sentence = f"The system gives us no more: {error.strerror}."
            return report_failure(invocation, Unavailable(sentence, hint="ulimit -a"))
        if invocation.debug:
            raise
        bug = SdtoolError(
            f"This is a bug in sdtool: {type(error).__name__}: {error}.",
            hint="run it again with --debug and report what it prints",
        )
        return report_failure(invocation, bug)


def _prepare_streams() -> None:
    """Have streams that take any character; a closed one is as good as /dev/null."""
    sys.stdin = sys.stdin or _open_null("r")
    sys.stdout = sys.stdout or _open_null("w")
    sys.stderr = sys.stderr or _open_null("w")
    sys.stdout = _buffered(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _buffered(stream: TextIO) -> TextIO:
    """A stream that writes all of what it is given.

    With PYTHONUNBUFFERED= it is one write(2), which a full pipe may cut short without a word.
    """
    raw = getattr(stream, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, line_buffering=stream.isatty()
    )


def _open_null(mode: str) -> TextIO:
    """Open /dev/null, which gets the lowest free number: that of the closed stream."""
    stream = cast("TextIO", open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    # What we start finds its own streams open then, too.
    os.set_inheritable(stream.fileno(), True)
    return stream


def _as_ours(error: ClickException) -> SdtoolError:
    message = error.format_message().strip()
    command = error.ctx.command_path if isinstance(error, UsageError) and error.ctx else "sdtool"
    if isinstance(error, NoSuchOption) and command == "sdtool":
        return InvalidArgument(
            f"{error.option_name} stands before the command; options stand after it.",
            hint=f"sdtool COMMAND {error.option_name}",
        )
    end = "" if message.endswith((".", "?")) else "."
    return InvalidArgument(f"{message}{end}", hint=f"{command} --help")
