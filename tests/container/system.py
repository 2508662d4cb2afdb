"""A container as its users see it: root and tester, with and without a manager that answers."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from sdtool.sandbox import Container
from sdtool.sandbox.rootfs import TESTER, TESTER_UID

TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and how long it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def envelope(self) -> dict[str, Any]:
        """The whole of what was said as JSON."""
        return dict(json.loads(self.stdout))

    @property
    def data(self) -> list[dict[str, Any]]:
        """The answers of an envelope."""
        return list(self.envelope["data"])

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The errors of an envelope."""
        return list(self.envelope["errors"])


class System:
    """One booted container and the ways to run something in it."""

    def __init__(self, container: Container) -> None:
        self.container = container

    def run(self, command: Sequence[str], **options: Any) -> Result:
        """Run a command as a unit; see ``Container.argv`` for the options."""
        return _run(self.container.argv(command, **options))

    def sdtool(self, *arguments: str, **options: Any) -> Result:
        """Run sdtool as a unit, as root or as another user, with --json."""
        return self.run(["sdtool", *arguments, "--json"], **options)

    def sdtool_alone(self, *arguments: str, user: str = "root") -> Result:
        """Run sdtool without any manager's help: it need not be alive."""
        become = ["runuser", "-u", user, "--"] if user != "root" else []
        runtime = [f"XDG_RUNTIME_DIR=/run/user/{TESTER_UID}"] if user == TESTER else []
        return self.enter([*become, "env", *runtime, "sdtool", *arguments, "--json"])

    def enter(self, command: Sequence[str]) -> Result:
        """Run a command as root in no unit."""
        return _run(self.container.enter(command))

    def shell(self, script: str, **options: Any) -> Result:
        """Run a shell script as a unit."""
        return self.run(["sh", "-euc", script], **options)

    def pid_outside(self, pid: int) -> int:
        """The pid in our own pid namespace of a process inside."""
        ours = Path(f"/proc/{self.container.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            named_so = _read_nspid(process)[-1:] == [str(pid)]
            if named_so and (process / "ns/pid").readlink() == ours:
                return int(process.name)
        raise AssertionError(f"no process {pid} in the container")

    def main_pid(self, unit: str) -> int:
        """Read MainPID of a unit, by our own pid namespace."""
        shown = self.enter(["systemctl", "show", "-P", "MainPID", unit]).stdout
        return self.pid_outside(int(shown))

    def facility(self, name: str, **options: Any) -> dict[str, Any]:
        """What doctor says of one facility."""
        return next(
            row for row in self.sdtool("doctor", **options).data if row["facility"] == name
        )


def _read_nspid(process: Path) -> list[str]:
    """The pids of a process, in our pid namespace first; none when it is gone."""
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])


def _run(argv: Sequence[str]) -> Result:
    began = time.monotonic()
    done: CompletedProcess[str] = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - began)
