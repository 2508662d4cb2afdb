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

agent.END_S = 0.3

async def question():
    async with agent_on_terminal():
        pathlib.Path(sys.argv[1]).with_suffix(".asked").write_text("")
        if sys.argv[2] == "interrupt":
            raise KeyboardInterrupt

try:
    asyncio.run(question())
except KeyboardInterrupt:
    sys.exit(130)
"""


def ask(tmp_path: Path, *, how: str = "answer", trap: str = "", register: str = "") -> int:
    """Ask with a fake agent on a terminal of its own; the status, when all is as it was."""
    pid = tmp_path / "agent.pid"
    agent = tmp_path / "pkttyagent"
    # $2 is the number of the descriptor; dash takes no more than one digit.
    closes = 'python3 -c "" ; eval "exec $2>&-"'
    agent.write_text(AGENT.format(pid=pid, trap=trap, register=register or closes))
    agent.chmod(0o755)
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(pid), how],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        preexec_fn=lambda: os.login_tty(theirs),
    )
    try:
        status = child.wait(timeout=15)
        assert before == termios.tcgetattr(theirs)
        assert not Path(f"/proc/{pid.read_text().strip()}").exists()
        assert pid.with_suffix(".asked").exists()
    finally:
        child.kill()
        os.close(ours)
        os.close(theirs)
    return status


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
