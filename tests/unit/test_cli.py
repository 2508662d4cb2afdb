"""The command line, as far as no machine is needed: usage, envelopes, parsing, help."""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from typing import IO, Any

import click
import pytest

import sdtool as package
from sdtool.cli.app import COMMANDS, LazyGroup, build_app
from sdtool.cli.invocation import Invocation, report_failure, wants_colour
from sdtool.cli.ports import parse_bind, parse_port
from sdtool.cli.stop import parse_observers
from sdtool.errors import Exit, InvalidArgument, NoSuchUnit
from sdtool.model.answer import Answer
from sdtool.model.binding import BindSpec
from sdtool.model.ports import PortSpec
from sdtool.model.scope import Scope
from sdtool.model.stop import OBSERVERS
from tests.machine import eventually
from tests.unit.conftest import Run
from tests.unit.make import unit

Sdtool = Callable[..., Run]


def parsed(out: str) -> Any:
    """The one document on stdout."""
    (line,) = out.splitlines()
    return json.loads(line)


# Help and version ----------------------------------------------------------------------------


def test_version_is_one_line(sdtool: Sdtool) -> None:
    """The package's own."""
    assert Run(0, f"sdtool {package.__version__}\n", "") == sdtool("--version")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(sdtool: Sdtool, arguments: tuple[str, ...]) -> None:
    """Without a word it is printed too; a short line for each command."""
    run = sdtool(*arguments)
    assert (0, "") == (run.status, run.err)
    listed = run.out.partition("Commands:\n")[2].splitlines()
    assert list(COMMANDS) == [line.split()[0] for line in listed]
    assert not [line for line in listed if line.endswith("...")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_the_common_options(sdtool: Sdtool, command: str) -> None:
    """Options stand after the command, the same for all."""
    run = sdtool(command, "--help")
    assert (0, "") == (run.status, run.err)
    for option in ("--user / --system", "--json", "--color [auto|always|never]", "-v", "--debug"):
        assert f" {option} " in run.out


# Usage errors --------------------------------------------------------------------------------

USAGE_ERRORS = {
    "no such command": ("lst",),
    "no such option": ("list", "--nope"),
    "option before the command": ("--user", "list"),
    "missing argument": ("stop",),
    "bad choice": ("list", "--color", "pink"),
    "bad number": ("stop", "x", "--deadline", "soon"),
    "deadline over": ("stop", "x", "--deadline", "0"),
    "unit type": ("list", "-t", "servise"),
    "port": ("port", "70000"),
    "port protocol": ("port", "80/sctp"),
    "one port of several": ("port", "80", "x"),
    "no port": ("port",),
    "port and bind": ("port", "80", "--bind", "*:80"),
    "bind to a name": ("port", "--bind", "localhost:80"),
    "bind without an address": ("port", "--bind", "80"),
    "bind without a port": ("port", "--bind", "*"),
    "bind to port 0": ("port", "--bind", "*:0"),
    "bind with another protocol": ("port", "--bind", "*:80/sctp"),
    "pid": ("pid", "0"),
    "observer": ("stop", "x", "--observers", "telescope"),
}


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS.keys())
def test_usage_error_is_a_sentence_on_stderr(sdtool: Sdtool, arguments: tuple[str, ...]) -> None:
    """Exit 2, nothing on stdout, one sentence, and the hint below it."""
    run = sdtool(*arguments)
    assert (Exit.USAGE, "") == (run.status, run.out)
    sentence, *hint = run.err.splitlines()
    assert sentence.startswith("sdtool: ")
    assert sentence.endswith((".", "?"))
    assert len(hint) <= 1
    assert all(line.startswith("(") and line.endswith(")") for line in hint)


@pytest.mark.parametrize("arguments", USAGE_ERRORS.values(), ids=USAGE_ERRORS.keys())
def test_usage_error_is_an_envelope_with_json(sdtool: Sdtool, arguments: tuple[str, ...]) -> None:
    """One document whatever happens, with the same error in it."""
    run = sdtool(*arguments, "--json")
    document = parsed(run.out)
    assert (Exit.USAGE, "") == (run.status, run.err)
    assert (1, Exit.USAGE, []) == (document["sdtool"], document["exit"], document["data"])
    assert ["InvalidArgument"] == [error["code"] for error in document["errors"]]


def test_json_counts_anywhere_before_the_dashes(sdtool: Sdtool) -> None:
    """Even in front, where it is an error itself; behind "--" it is an argument."""
    assert "errors" in parsed(sdtool("--json", "list").out)
    assert "" == sdtool("pid", "--", "--json").out


def test_envelope_names_the_command(sdtool: Sdtool) -> None:
    """The one that was asked for, also when the rest of the line is wrong."""
    assert "stop" == parsed(sdtool("stop", "--json").out)["command"]
    assert "" == parsed(sdtool("--nope", "--json").out)["command"]


@pytest.mark.parametrize("word", ["9" * 5000, "٣", "1_0", "+1", " 1", "1 ", "0x50", "-1", ""])
def test_odd_number_is_a_usage_error(sdtool: Sdtool, word: str) -> None:
    """What int() would take or choke on is not what a user may type for a port or pid."""
    assert Exit.USAGE == sdtool("port", "--", word).status
    assert Exit.USAGE == sdtool("pid", "--", word).status


# Parsing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", PortSpec(port=80)),
        ("80/tcp", PortSpec(port=80, protocol="tcp")),
        ("65535/udp", PortSpec(port=65535, protocol="udp")),
        ("1", PortSpec(port=1)),
    ],
)
def test_port_is_parsed(text: str, expected: PortSpec) -> None:
    """A number, and a protocol behind a slash; it prints as it was typed."""
    assert expected == parse_port(text)
    assert text == str(expected)


@pytest.mark.parametrize("text", ["0", "65536", "x", "80/", "80/sctp", "/tcp", "80/tcp/udp", ""])
def test_port_that_is_none_is_refused(text: str) -> None:
    """The sentence shows what was typed, the subject carries it."""
    with pytest.raises(InvalidArgument) as caught:
        parse_port(text)
    assert text == caught.value.subject


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", BindSpec(address="127.0.0.1", port=80)),
        ("0.0.0.0:80/tcp", BindSpec(address="0.0.0.0", port=80)),
        ("[::1]:80/udp", BindSpec(address="::1", port=80, protocol="udp")),
        ("[::]:80", BindSpec(address="::", port=80)),
        ("*:80", BindSpec(address="::", port=80, dual=True)),
        ("[FE80:0::1%lo]:80", BindSpec(address="fe80::1", port=80, interface="lo")),
        ("[::ffff:7f00:1]:80", BindSpec(address="::ffff:127.0.0.1", port=80)),
    ],
)
def test_bind_is_parsed(text: str, expected: BindSpec) -> None:
    """The address comes out as the kernel writes it."""
    assert expected == parse_bind(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "80", ":80", "*", "*:", "*:0", "*:65536", "*:80/sctp", "localhost:80", "::1:80"),
        *("[::1]", "[127.0.0.1]:80", "127.1:80", "[::1%]:80", "127.0.0.1%lo:80", "[::1:80"),
        *("256.0.0.1:80", "[*]:80", "127.0.0.1:80:80", "1\0:80"),
    ],
)
def test_bind_that_is_none_is_refused(text: str) -> None:
    """With a hint, and nothing is looked up."""
    with pytest.raises(InvalidArgument):
        parse_bind(text)


# The lazy group ------------------------------------------------------------------------------


def group() -> tuple[LazyGroup, click.Context]:
    """The group and a context to ask it in."""
    app = build_app(Invocation())
    assert isinstance(app, LazyGroup)
    return app, click.Context(app)


def test_group_knows_its_commands_in_order() -> None:
    """Without importing any."""
    app, context = group()
    assert list(COMMANDS) == app.list_commands(context)


@pytest.mark.parametrize("name", COMMANDS)
def test_group_loads_each_command(name: str) -> None:
    """Under its own name, with a docstring as help."""
    app, context = group()
    command = app.get_command(context, name)
    assert command is not None
    assert (name, True) == (command.name, bool(command.help))


def test_group_does_not_know_others() -> None:
    """None, which click turns into a usage error."""
    app, context = group()
    assert app.get_command(context, "lst") is None


# One run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "command", "is_json", "debug"),
    [
        ([], "", False, False),
        (["list", "--json"], "list", True, False),
        (["stop", "x", "--jsonl"], "stop", True, False),
        (["sandbox", "--", "x", "--json", "--debug"], "sandbox", False, False),
        (["--debug", "port", "80"], "port", False, True),
    ],
)
def test_options_are_guessed_before_parsing(
    argv: list[str], command: str, is_json: bool, debug: bool
) -> None:
    """So that an error in the parsing itself is told in the right form."""
    guessed = Invocation.guess(argv)
    assert (command, is_json, debug) == (guessed.command, guessed.json, guessed.debug)


@pytest.mark.parametrize(
    ("errors", "bad", "expected"),
    [
        ((), False, Exit.OK),
        ((), True, Exit.BAD),
        ((NoSuchUnit("No."),), False, Exit.NO_SUCH_UNIT),
        ((NoSuchUnit("No."), InvalidArgument("No.")), True, Exit.NO_SUCH_UNIT),
    ],
)
def test_first_error_decides_the_exit(
    capsys: pytest.CaptureFixture[str], errors: tuple[Any, ...], bad: bool, expected: Exit
) -> None:
    """Then whether an answer is bad."""
    invocation = Invocation(command="list", json=True)
    answer = Answer(data=(unit(),), errors=errors)
    assert expected == invocation.finish(answer, str, bad=bad)
    document = parsed(capsys.readouterr().out)
    assert (expected, 1) == (document["exit"], len(document["data"]))


def test_pipe_gets_whole_lines_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    """Not cut, and without blanks at the end."""
    long = "x" * 5000
    Invocation().print(f"{long}   ")
    assert f"{long}\n" == capsys.readouterr().out


def test_text_answer_shows_data_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """What could be answered on stdout, the rest on stderr."""
    answer = Answer(data=(unit(),), errors=(NoSuchUnit("No x.", hint="look\x1b"),))
    Invocation().finish(answer, lambda data: data[0].name)
    printed = capsys.readouterr()
    assert ("web.service\n", "sdtool: No x.\n(look\\x1b)\n") == (printed.out, printed.err)


def test_nothing_found_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty table is no output."""
    assert Exit.OK == Invocation().finish(Answer(), lambda _: "never")
    assert "" == capsys.readouterr().out


def test_failure_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """As text on stderr, or in the envelope on stdout."""
    error = NoSuchUnit("No x.", subject="x")
    assert Exit.NO_SUCH_UNIT == report_failure(Invocation(), error)
    assert "sdtool: No x.\n" == capsys.readouterr().err
    report_failure(Invocation(command="trace", json=True), error)
    assert "x" == parsed(capsys.readouterr().out)["errors"][0]["subject"]


@pytest.mark.parametrize(("option", "expected"), [("always", True), ("never", False)])
def test_colour_option_decides(option: str, expected: bool) -> None:
    """Whatever stdout is."""
    assert expected is wants_colour(option)


def test_colour_is_off_for_a_pipe() -> None:
    """--color auto asks whether stdout is a terminal."""
    assert not wants_colour("auto")


def test_scope_is_the_systems_by_default() -> None:
    """--user asks for the other one."""
    assert Scope.SYSTEM is Invocation().scope


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("none", set()),
        ("", set()),
        ("pidfd,cgroup", {"pidfd", "cgroup"}),
        ("-tracefs,-journal", set(OBSERVERS) - {"tracefs", "journal"}),
        ("pidfd,-pidfd", set()),
        ("none,-pidfd", set()),
    ],
)
def test_observers_are_named_or_left_out(text: str | None, expected: set[str] | None) -> None:
    """Names are all there is; with a minus alone they are what there is not."""
    assert expected == parse_observers(text)


@pytest.mark.parametrize("text", ["telescope", "-telescope", "pidfd,-none"])
def test_observer_that_is_none_is_refused(text: str) -> None:
    """With the names that there are."""
    with pytest.raises(InvalidArgument, match="is no observer"):
        parse_observers(text)


WRITES_MUCH = """
import sys
from sdtool.cli import _prepare_streams
_prepare_streams()
sys.stdout.write("x" * 1_000_000)
sys.stdout.flush()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_pipe_cuts_nothing_short(unbuffered: str) -> None:
    """Whoever is stopped and continued in a write(2) has written a part, and goes on with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        [sys.executable, "-c", WRITES_MUCH], stdout=subprocess.PIPE, env=environment
    ) as writer:
        assert writer.stdout is not None
        room = fcntl.fcntl(writer.stdout, fcntl.F_GETPIPE_SZ)
        eventually(lambda: room == bytes_in(writer.stdout))
        writer.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
        writer.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, writer.pid, os.WCONTINUED)
        assert 1_000_000 == len(writer.stdout.read())


def bytes_in(pipe: IO[bytes] | None) -> int:
    """How much waits to be read."""
    assert pipe is not None
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]
