"""The guardian of a container: a layered root directory, and systemd-nspawn(1) booting it.

Between the machine and the container lies a pid namespace of its own, so that the death of any
link of the chain guardian, unshare, nspawn takes all that is below it; and a mount namespace,
where all that is mounted ends. nspawn gets a cgroup of its own: without one all containers of a
machine would share a single ``/payload``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sdtool.errors import Unavailable
from sdtool.sandbox import cgroup
from sdtool.sandbox.guardian import DIES_WITH_US, SHOW_CGROUP2, Config, Guardian, guard
from sdtool.sandbox.log import Writer

_BOX, _LAUNCH = "box", "launch"

_ENTER = """
set -eu
[ "$PPID" = "$1" ]
echo 0 > "$2"
shift 2
exec unshare --mount --propagation private --pid --fork --kill-child=KILL --mount-proc -- "$@"
"""

# /run holds the layers and what nspawn leaves behind; nobody else sees this one.
_BOOT = f"""
set -eu
name=$1 procs=$2 remount=$3 lower=$4 prepare=$5; shift 5
echo 0 > "$procs"
{SHOW_CGROUP2}mount -t tmpfs -o mode=755 "$name" /run
mkdir -p /run/lower /run/upper /run/work /run/root /run/systemd/nspawn
mount --bind "$lower" /run/lower
mount -t overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work "$name" /run/root
cd /run/root
tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id
sh -euc "$prepare" < /dev/null
exec systemd-nspawn --directory=/run/root "$@" < /dev/null
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerConfig(Config):
    """What the owner wants: the root file system, what is done to it, and nspawn's arguments.

    Attributes:
        prepare: Shell commands, run in the root directory before the boot.
        cgroups: "unified", or "legacy" for a container that has cgroup v1 only.
    """

    rootfs: str
    prepare: str
    cgroups: str
    arguments: tuple[str, ...]


class ContainerGuardian(Guardian):
    """Guards a container; what is said on its console is the log."""

    members = (_LAUNCH, _BOX)

    def __init__(self, log: Writer, config: ContainerConfig) -> None:
        super().__init__(log)
        self._config = config
        self._console: int | None = None

    def _launch(self) -> subprocess.Popen[bytes]:
        enter = [str(os.getpid()), str(self.tree / _LAUNCH / "cgroup.procs")]
        legacy = self._config.cgroups == "legacy"
        remount = self.must_remount() and not legacy
        boot = [self.name, str(self.tree / _BOX / "cgroup.procs"), "yes" if remount else "no"]
        boot += [self._config.rootfs, self._config.prepare]
        nspawn = ["--quiet", "--boot", "--notify-ready=yes", "--console=pipe", "--register=no"]
        nspawn += ["--keep-unit", f"--machine={self.name}", *self._config.arguments]
        child = subprocess.Popen(
            [
                *DIES_WITH_US,
                "sh",
                "-c",
                _ENTER,
                "sh",
                *enter,
                "sh",
                "-c",
                _BOOT,
                "sh",
                *boot,
                *nspawn,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "0" if legacy else "1",
                "NOTIFY_SOCKET": self.notify_socket,
            },
        )
        assert child.stdout is not None
        self._console = console = child.stdout.fileno()
        os.set_blocking(console, False)
        self.listen(console, self._console_spoke)
        return child

    def _read_manager(self, child: int) -> tuple[int, str]:
        """The container's PID 1 is the child of nspawn, which is the child of unshare."""
        nspawn = _read_children(child)
        leader = _read_children(nspawn[0]) if nspawn else []
        if not leader:
            raise Unavailable("The container's first process is gone.")
        return leader[0], f"{self.prefix}/{self.name}/{_BOX}/payload"

    def _tear_down(self) -> bool:
        clean = super()._tear_down()
        cgroup.remove_mirror(self.name)
        return clean

    def _console_spoke(self) -> bool:
        assert self._console is not None
        text = os.read(self._console, 65536)
        self.append(text)
        if not text:
            self.forget(self._console)
        return True

    def _drain(self) -> None:
        if self._console is None:
            return
        with contextlib.suppress(BlockingIOError):
            while text := os.read(self._console, 65536):
                self.append(text)


def _read_children(pid: int) -> list[int]:
    """The children of a process's main thread, see proc(5)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def main() -> None:
    """Guard one container."""
    guard(lambda log, argument: ContainerGuardian(log, ContainerConfig.from_argument(argument)))
