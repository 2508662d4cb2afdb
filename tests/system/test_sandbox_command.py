"""The sandbox command: what becomes of CMD, of signals, and of a demo that went wrong."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdtool.cli import sandbox
from sdtool.cli.invocation import Invocation
from sdtool.cli.sandbox import Step, run_demo
from sdtool.errors import Exit, Unavailable
from sdtool.sandbox.cgroup import read_hierarchy
from tests.machine import read_line
from tests.system.bench import Client

# Says in which sandbox it is, and does not end by itself.
STUBBORN = "trap '' TERM HUP; sed -n 's/^0:://p' /proc/self/cgroup; sleep 600 & wait"
POLITE = "trap 'echo goodbye; exit 0' TERM; sed -n 's/^0:://p' /proc/self/cgroup; sleep 600 & wait"
BUSY = "trap 'echo caught; exit 7' INT; sed -n 's/^0:://p' /proc/self/cgroup; sleep 600 & wait"


class Running:
    """``sdtool sandbox`` with a shell script in it, in a process group of its own."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sdtool", "sandbox", "--", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        path = self.process.stdout.readline().strip()
        self.cgroup = read_hierarchy() / path.split("/")[-2]

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; exit status, what came after the first line, the last error."""
        out, errors = self.process.communicate(timeout=10)
        return self.process.returncode, out, "".join(errors.splitlines()[-1:])


@pytest.fixture
def running() -> Iterator[Callable[[str], Running]]:
    """Start one; none of them outlives the test."""
    started: list[Running] = []

    def start(script: str) -> Running:
        started.append(Running(script))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("script", "farewell"), [(STUBBORN, ""), (POLITE, "goodbye\n")], ids=["stubborn", "polite"]
)
def test_signal_to_sdtool_ends_the_sandbox(
    running: Callable[[str], Running], number: int, script: str, farewell: str
) -> None:
    """A SIGTERM or SIGHUP that only sdtool gets ends CMD too, in seconds whatever it ignores."""
    one = running(script)
    assert one.cgroup.is_dir()
    one.process.send_signal(number)
    expected = (Exit.INTERRUPTED, farewell, "sdtool: Interrupted; the sandbox is gone.")
    assert expected == one.finish()
    assert not one.cgroup.exists()


def test_ctrl_c_is_for_the_command(running: Callable[[str], Running]) -> None:
    """The terminal sends it to both; what CMD makes of it is the answer."""
    one = running(BUSY)
    os.killpg(one.process.pid, signal.SIGINT)
    assert (7, "caught\n", "") == one.finish()
    assert not one.cgroup.exists()


def test_terminal_that_hangs_up_ends_the_sandbox() -> None:
    """As any SIGHUP does; there is no terminal left to give back."""
    ours, theirs = pty.openpty()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "sdtool", "sandbox", "--", "sh", "-c", "echo ready; sleep 600"],
            stderr=errors,
            preexec_fn=lambda: _log_in(theirs),
        )
        os.close(theirs)
        try:
            assert "ready\n" == read_line(ours)
            os.close(ours)
            status = child.wait(timeout=10)
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        expected = (Exit.INTERRUPTED, "sdtool: Interrupted; the sandbox is gone.\n")
        assert expected == (status, errors.read())


def _log_in(terminal: int) -> None:
    """Make it our controlling terminal, our stdin and stdout; stderr stays a file."""
    errors = os.dup(2)
    os.login_tty(terminal)
    os.dup2(errors, 2)


def test_command_ends_when_the_guardian_is_killed(running: Callable[[str], Running]) -> None:
    """Nothing goes on in a sandbox that has lost its manager."""
    one = running(STUBBORN)
    (guardian,) = (one.cgroup / "guardian" / "cgroup.procs").read_text().split()
    os.kill(int(guardian), signal.SIGKILL)
    assert 128 + signal.SIGKILL == one.finish()[0]
    assert not one.cgroup.exists()


def test_demo_runs_inside_a_sandbox(sdtool: Client) -> None:
    """It boots a manager of its own, and each step ends as it should."""
    done = sdtool("sandbox", "--demo")
    steps = [line for line in done.stdout.splitlines() if line.startswith(("$ sdtool", "(exit"))]
    expected = [
        line
        for step in sandbox.DEMO
        for line in (f"$ sdtool {' '.join(step.words)} --user", f"(exit {int(step.expected)})")
    ]
    assert (0, expected, "") == (done.returncode, steps, done.stderr)


def test_demo_names_the_step_that_differs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with the status it had and the one that was expected."""
    steps = (Step("Fine.", ("list", "sdtool-*")), Step("Not.", ("list", "sdtool-*"), Exit.BAD))
    monkeypatch.setattr(sandbox, "DEMO", steps)
    assert Exit.BAD == run_demo(Invocation())
    assert "sdtool: sdtool list sdtool-* exited 0, expected 1.\n" == capfd.readouterr().err


def test_demo_says_why_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemctl says about the units, and what is in the way most often."""
    monkeypatch.setattr(sandbox, "DEMO_UNITS", ("sdtool-no-such-unit",))
    with pytest.raises(Unavailable, match="sdtool-no-such-unit") as caught:
        run_demo(Invocation())
    assert "by another demo" in str(caught.value.hint)


def test_shell_is_the_default(tmp_path: Path) -> None:
    """The caller's own, with the sandbox's environment."""
    done = subprocess.run(
        [sys.executable, "-m", "sdtool", "sandbox"],
        input='echo "$XDG_RUNTIME_DIR"; exit 3\n',
        env={**os.environ, "SHELL": "/bin/sh"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (3, f"/run/user/{os.geteuid()}\n") == (done.returncode, done.stdout)
