"""Where the system tests run: on a private manager, or in a booted system that they are inside of.

The same tests run in both. In a container, ``SDTOOL_TEST_SCOPE`` says whether they are about its
system manager, as root, or about the user manager of who runs them.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Self

from sdtool.model.scope import Scope
from sdtool.sandbox import PrivateManager, Sandbox

# (*arguments: str, timeout: float = 60.0)
Client = Callable[..., CompletedProcess[str]]

SCOPE = os.environ.get("SDTOOL_TEST_SCOPE")

_MARKERS = itertools.count()


class Inhabited(Sandbox):
    """A manager of the system that these tests run in."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def start(self, *, timeout: float = 20.0) -> Self:
        """It runs already."""
        return self

    def stop(self) -> None:
        """It goes on."""

    @property
    def environment(self) -> dict[str, str]:
        """Everything needed is in our own environment."""
        return {}

    def argv(self, command: Sequence[str]) -> list[str]:
        """We are inside."""
        return list(command)

    @property
    def pid(self) -> int:
        """The manager's process."""
        if self.scope is Scope.SYSTEM:
            return 1
        unit = f"user@{os.getuid()}.service"
        return int(self._read("systemctl", "show", "--value", "--property=MainPID", unit))

    @property
    def control_group(self) -> str:
        """The cgroup under which its units are."""
        return self._read("systemctl", flag_of(self), "show", "-P", "ControlGroup")

    def _read(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def log_text(self) -> str:
        """Everything in the journal so far, one "IDENTIFIER: TEXT" a line."""
        marker = f"sdtool-test-marker-{os.getpid()}-{next(_MARKERS)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
            # Records are taken in the order they come: after ours, all earlier ones are there.
            door.connect("/run/systemd/journal/socket")
            door.send(f"MESSAGE={marker}\n".encode())
        until = time.monotonic() + 10
        while marker not in (text := self._read_journal()):
            assert time.monotonic() < until, "the journal has not taken a record in 10 s"
        return text.replace(f"?: {marker}\n", "")

    def _read_journal(self) -> str:
        fields = "--output-fields=SYSLOG_IDENTIFIER,MESSAGE"
        shown = self._read("journalctl", "--output=json", fields, "--no-pager", "--boot")
        records = map(json.loads, shown.splitlines())
        return "".join(
            f"{r.get('SYSLOG_IDENTIFIER', '?')}: {r.get('MESSAGE', '')}\n" for r in records
        )


Bench = PrivateManager | Inhabited


def open_bench() -> Bench:
    """The manager that this run is about, not started yet."""
    return Inhabited(Scope(SCOPE)) if SCOPE else PrivateManager()


def flag_of(manager: Sandbox) -> str:
    """What names its manager to systemctl, systemd-run and sdtool."""
    return f"--{manager.scope}"


def sdtool_argv(manager: Bench, *arguments: str) -> list[str]:
    """The command line that runs sdtool inside, on the manager."""
    command = [sys.executable, "-m", "sdtool", *arguments, flag_of(manager)]
    return manager.argv(command)


def cgroupfs_of(manager: Bench) -> Path:
    """Where cgroup2 is mounted, as the manager sees it."""
    root = Path("/") if isinstance(manager, Inhabited) else Path(f"/proc/{manager.pid}/root")
    return root / "sys/fs/cgroup"
