"""The polkit agent on a terminal: registered before the question, gone after it, echo restored."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

AGENT = """\
#!/bin/sh
# pkttyagent as we see it: it takes its time, closes the pipe, and leaves the echo off when killed.
{trap}
echo $$ > {pid}
stty -echo < /dev/tty
{register}
while :; do sleep 0.1; done
"""

PROGRAM = """\
import asyncio, os, pathlib, sys
from sdtool.cli import agent
from sdtool.cli.agent import agent_on_terminal

asked, how = sys.argv[1:]
agent.END_S = 0.3
if how == "late":
    agent.REGISTER_S = 0.3
if how == "background":
    job = os.fork()
    if job:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
    os.setpgid(0, 0)

async def question():
    async with agent_on_terminal() as lack:
        pathlib.Path(asked).write_text(lack or "")
        if how == "interrupt":
            raise KeyboardInterrupt

try:
    asyncio.run(question())
except KeyboardInterrupt:
    sys.exit(130)
"""


def ask(tmp_path: Path, *, how: str = "answer", trap: str = "", register: str = "") -> int:
    """Ask with a fake agent on a terminal of its own; the status, when all is as it was."""
    write_agent(tmp_path, trap=trap, register=register)
    status, lack = run(tmp_path, how)
    assert "" == lack
    assert (True, False) == ((tmp_path / "agent.pid").exists(), is_there(tmp_path))
    return status


def write_agent(tmp_path: Path, *, trap: str = "", register: str = "") -> None:
    """Put a fake agent where it is found."""
    # $2 is the number of the descriptor; dash takes no more than one digit.
    closes = 'python3 -c "" ; eval "exec $2>&-"'
    agent = tmp_path / "pkttyagent"
    pid = tmp_path / "agent.pid"
    agent.write_text(AGENT.format(pid=pid, trap=trap, register=register or closes))
    agent.chmod(0o755)


def is_there(tmp_path: Path) -> bool:
    """Whether the fake agent runs."""
    pid = tmp_path / "agent.pid"
    return pid.exists() and Path(f"/proc/{pid.read_text().strip()}").exists()


def run(tmp_path: Path, how: str, path: str = os.environ["PATH"]) -> tuple[int, str]:
    """Ask on a terminal, which is as it was afterwards; the status, and why there was no agent."""
    asked = tmp_path / "asked"
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(asked), how],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PATH": f"{tmp_path}:{path}"},
        preexec_fn=lambda: os.login_tty(theirs),
    )
    try:
        status = child.wait(timeout=15)
        assert before == termios.tcgetattr(theirs)
    finally:
        child.kill()
        os.close(ours)
        os.close(theirs)
    return status, asked.read_text()


@pytest.mark.parametrize(("how", "status"), [("answer", 0), ("interrupt", 130)])
def test_agent_leaves_the_terminal_as_it_was(tmp_path: Path, how: str, status: int) -> None:
    """Also when the question is interrupted."""
    assert status == ask(tmp_path, how=how)


def test_agent_that_dies_at_once_is_no_obstacle(tmp_path: Path) -> None:
    """Its end of the pipe closes with it: another agent may answer."""
    assert 0 == ask(tmp_path, register="exit 1")


def test_agent_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """After a moment, by SIGKILL."""
    assert 0 == ask(tmp_path, trap="trap '' TERM")


# Without one ---------------------------------------------------------------------------------


def test_missing_agent_is_named(tmp_path: Path) -> None:
    """It is a package of its own in some distributions."""
    assert (0, "pkttyagent is not installed") == run(tmp_path, "answer", path="/nowhere")


def test_agent_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    """With the kernel's reason."""
    agent = tmp_path / "pkttyagent"
    agent.write_text("#!/nowhere/sh\n")
    agent.chmod(0o755)
    lack = f"{agent} cannot be started: No such file or directory"
    assert (0, lack) == run(tmp_path, "answer")


def test_agent_that_does_not_register_is_named(tmp_path: Path) -> None:
    """It is given some seconds, and ended all the same."""
    write_agent(tmp_path, register=":")
    lack = "pkttyagent has not registered with polkit within 0.3 s"
    assert (0, lack) == run(tmp_path, "late")
    assert not is_there(tmp_path)


def test_job_in_the_background_has_no_agent(tmp_path: Path) -> None:
    """The terminal would stop it when it reads an answer."""
    write_agent(tmp_path)
    lack = "pkttyagent asks in the foreground of a terminal only"
    assert (0, lack) == run(tmp_path, "background")
    assert not (tmp_path / "agent.pid").exists()
