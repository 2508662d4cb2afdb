"""A throwaway real systemd: a ``systemd --user`` manager of one's own, in a mount namespace.

It runs in the pid and network namespaces of the caller, so every observer sees its processes
and ports, and it needs no system that was booted with systemd. Its units, configuration and
runtime files live on a tmpfs that nobody else sees; its processes live in one cgroup. It has
no logind, no polkit and no system scope, and what is said to its journal is kept as one text.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from sdtool.sandbox.guarded import PATH, GuardedSandbox
from sdtool.sandbox.private_guardian import CLIENT, PrivateConfig
from sdtool.sandbox.requirements import find_systemd, require_private
from sdtool.sandbox.units import units_directory

_BUS_RETRY = 0.05

# A process joins the sandbox before it becomes CMD, so that CMD cannot outlive it. setns(2)
# leaves it in the root directory, hence the way back to where the caller is.
_ENTER = 'echo 0 > "$1" || exit 126; cd -- "$2" 2> /dev/null || cd /; shift 2; exec env -- "$@"'


class PrivateManager(GuardedSandbox):
    """A throwaway real ``systemd --user`` manager in the caller's pid and network namespaces.

    Only the machine's vendor units and what is put in at run time can start in it, nothing
    that is enabled for the machine's users. Its log has what the manager and its units say, one
    "IDENTIFIER: TEXT" a line, as in the journal: "systemd: Startup finished in 47ms."

    Args:
        units: Directory of units on its search path, the demo units' by default; it is also
            at ``%t/sdtool-units`` inside, where the demo units look for their payloads.
        log_level: How much the manager tells in ``log_text()``, a level of systemd(1).
    """

    title = "private manager"

    def __init__(self, *, units: Path | None = None, log_level: str = "info") -> None:
        super().__init__()
        self._units = (units_directory() if units is None else units).resolve()
        self._log_level = log_level

    @property
    def environment(self) -> dict[str, str]:
        """What a client inside needs in its environment beside the caller's own.

        The XDG directories keep ``systemctl --user enable``, ``link`` and ``edit`` away from
        the caller's home.
        """
        runtime = f"/run/user/{os.geteuid()}"
        home = f"{runtime}/sdtool-home"
        return {
            "XDG_RUNTIME_DIR": runtime,
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
            "XDG_CONFIG_HOME": f"{home}/config",
            "XDG_DATA_HOME": f"{home}/data",
            "XDG_STATE_HOME": f"{home}/state",
            "XDG_CACHE_HOME": f"{home}/cache",
            # A link, as a colon in the real path would separate; the last one appends the default.
            "SYSTEMD_UNIT_PATH": f"{home}/units:",
        }

    def argv(self, command: Sequence[str]) -> list[str]:
        """Build the command line that runs ``command`` inside, environment included.

        It runs in the caller's working directory where that exists inside, and ends with the
        sandbox. It exits 126 when the sandbox is going down.

        Raises:
            Unavailable: The manager is not running.
        """
        self.require_running()
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--"]
        client = Path(self.control_group).parent / CLIENT
        procs = f"/sys/fs/cgroup{client}/cgroup.procs"
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [*enter, "sh", "-c", _ENTER, "sh", procs, _directory(), *variables, *command]

    def _prepare(self) -> tuple[str, str]:
        require_private()
        systemd = find_systemd()
        assert systemd is not None, "require_private() has found it"
        config = PrivateConfig(
            systemd=systemd,
            log_level=self._log_level,
            units=str(self._units),
            environment=_base_environment() | self.environment,
        )
        return "sdtool.sandbox.private_guardian", config.to_argument()

    def _await_service(self, deadline: float) -> None:
        """Wait until the manager answers on its bus, which it joins a moment after it is ready.

        The call itself starts the bus. dbus-daemon holds calls to org.freedesktop.systemd1 back
        until the name is owned; another bus may refuse at once, so the call is repeated.
        """
        while not self._answers(deadline):
            now = time.monotonic()
            # The guardian has nothing to say from now on unless the manager is gone.
            event = self.next_event(min(deadline, now + _BUS_RETRY))
            if event is not None or now >= deadline:
                raise self.failure(event)

    def _answers(self, deadline: float) -> bool:
        ping = ["busctl", "--user", "--timeout=5", "call", "org.freedesktop.systemd1"]
        ping += ["/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer", "Ping"]
        try:
            return self.run(ping, timeout=max(0.0, deadline - time.monotonic())).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def _directory() -> str:
    """Name the working directory, the root if it was removed under us."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


def _base_environment() -> dict[str, str]:
    """Give the manager and its units what a login would, and nothing of the caller's."""
    home = os.environ.get("HOME", "/root")
    return {"PATH": PATH, "HOME": home, "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8"}
