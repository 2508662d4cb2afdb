"""The guardian of a private manager: a mount namespace, a ``systemd --user``, a journal for it."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sdtool.sandbox.guardian import DIES_WITH_US, SHOW_CGROUP2, Config, Guardian, guard
from sdtool.sandbox.journal import Journal
from sdtool.sandbox.log import Writer

MANAGER, CLIENT = "manager", "client"

_UNSHARE = (*DIES_WITH_US, "unshare", "--mount", "--propagation", "private")

# Joining the cgroup comes first, so that there is no process of the sandbox outside of it.
# The exchange of a line: the guardian can reach into the new /run now, and does before the
# manager looks there.
_LAUNCH = f"""
set -eu
name=$1 guardian=$2 procs=$3 remount=$4 units=$5; shift 5
[ "$PPID" = "$guardian" ]
echo 0 > "$procs"
{SHOW_CGROUP2}mount -t tmpfs -o mode=755,nosuid,nodev "$name" /run
# systemd --user refuses to run without the first, see sd_booted(3)
mkdir -p /run/systemd/system /run/systemd/journal "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"
mkdir -p "$XDG_CONFIG_HOME" "$XDG_DATA_HOME" "$XDG_STATE_HOME" "$XDG_CACHE_HOME"
ln -s "$units" "$XDG_RUNTIME_DIR/sdtool-units"
ln -s "$units" "${{SYSTEMD_UNIT_PATH%:}}"
# what is enabled for the users of this machine has no business here
if [ -d /etc/systemd/user ]; then
    mount -t tmpfs -o mode=755,nosuid,nodev "$name" /etc/systemd/user
fi
echo mounted
read -r go
exec "$@" < /dev/null >&2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateConfig(Config):
    """What the owner wants: the manager's executable, its log level, units and environment."""

    systemd: str
    log_level: str
    units: str
    environment: dict[str, str]


class PrivateGuardian(Guardian):
    """Guards a ``systemd --user`` manager and keeps what it and its units say."""

    members = (MANAGER, CLIENT)

    def __init__(self, log: Writer, config: PrivateConfig) -> None:
        super().__init__(log)
        self._config = config
        self._launch_line, self._launcher = socket.socketpair()
        self._journal = Journal(self.append)

    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the manager; until it has joined its cgroup only its pid is known."""
        self.listen(self._launch_line, self._launcher_spoke)
        self.listen(self._journal, self._something_said)
        arguments = [self.name, str(os.getpid()), str(self.tree / MANAGER / "cgroup.procs")]
        arguments += ["yes" if self.must_remount() else "no", self._config.units]
        systemd = [self._config.systemd, "--user", "--log-target=journal"]
        systemd.append(f"--log-level={self._config.log_level}")
        manager = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _LAUNCH, "sh", *arguments, *systemd],
            stdin=self._launcher.fileno(),
            stdout=self._launcher.fileno(),
            env={**self._config.environment, "NOTIFY_SOCKET": self.notify_socket},
        )
        self._launcher.close()
        self._door = Path(f"/proc/{manager.pid}/root/run/systemd/journal")
        return manager

    def _read_manager(self, child: int) -> tuple[int, str]:
        return child, f"{self.prefix}/{self.name}/{MANAGER}"

    def _launcher_spoke(self) -> bool:
        """Open the journal in the sandbox's own /run and let the manager start."""
        self.forget(self._launch_line)
        if self._launch_line.recv(4096):
            self._journal.open(self._door)
            self._launch_line.sendall(b"go\n")
        # Otherwise it has failed, and SIGCHLD will tell.
        return True

    def _something_said(self) -> bool:
        self._journal.take()
        return True

    def _drain(self) -> None:
        self._journal.drain()


def main() -> None:
    """Guard one private manager."""
    guard(lambda log, argument: PrivateGuardian(log, PrivateConfig.from_argument(argument)))
