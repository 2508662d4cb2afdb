"""The terminal is given back as it was, and one that hangs up is in nobody's way."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tests.machine import read_line

PROGRAM = """\
import os, signal, sys, termios
from sdtool.cli.terminal import is_foreground, terminal_restored

def interrupt(number, frame):
    raise KeyboardInterrupt

def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))

signal.signal(signal.SIGHUP, interrupt)
before = open_descriptors()
assert is_foreground()
assert before == open_descriptors()
try:
    with terminal_restored(prompted=sys.argv[1] == "prompted"):
        settings = termios.tcgetattr(0)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(0, termios.TCSANOW, settings)
        print("ready", flush=True)
        signal.pause()
except KeyboardInterrupt:
    assert not is_foreground()
    sys.exit(130 if before == open_descriptors() else 1)
"""


ALONE = """\
from sdtool.cli.terminal import is_foreground, terminal_restored
with terminal_restored():
    print(is_foreground())
"""


@pytest.mark.parametrize("how", ["prompted", "not prompted"])
def test_hang_up_does_not_hide_the_interrupt(how: str) -> None:
    """It comes out as it was, and no descriptor is left behind."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-W", "error", "-c", PROGRAM, how]
    child = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    try:
        assert "ready\n" == read_line(ours)
        os.close(ours)
        assert 130 == child.wait(timeout=10)
    finally:
        child.kill()
        child.wait()


def test_without_a_terminal_nothing_is_in_the_foreground() -> None:
    """A service has none."""
    ran = subprocess.run(
        [sys.executable, "-c", ALONE],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert "False\n" == ran.stdout
