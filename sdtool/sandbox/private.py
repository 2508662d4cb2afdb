"""A throwaway real systemd: a ``systemd --user`` manager of one's own, in a mount namespace.

It runs in the pid and network namespaces of the caller, so every observer sees its processes
and ports, and it needs no system that was booted with systemd. Its units, configuration and
runtime files live on a tmpfs that nobody else sees; its processes live in one cgroup. It has
no logind, no polkit and no system scope, and what is said to its journal is kept as one text.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.sandbox import cgroup, log
from sdtool.sandbox.box import Sandbox
from sdtool.sandbox.guardian import CLIENT, Config
from sdtool.sandbox.requirements import find_systemd, require_host
from sdtool.sandbox.units import units_directory

_GUARDIAN = "from sdtool.sandbox.guardian import main; main()"
_STOP_TIMEOUT = 15.0
_DESTROY_TIMEOUT = 5.0
_BUS_RETRY = 0.05
_LOG_LINES = 5
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A process joins the sandbox before it becomes CMD, so that CMD cannot outlive it. setns(2)
# leaves it in the root directory, hence the way back to where the caller is.
_ENTER = 'echo 0 > "$1" || exit 126; cd -- "$2" 2> /dev/null || cd /; shift 2; exec env -- "$@"'


class PrivateManager(Sandbox):
    """A throwaway real ``systemd --user`` manager in the caller's pid and network namespaces.

    Everything in it dies with it, and it dies with its owner: with the process that called
    ``start``, however that one ends. Only the machine's vendor units and what is put in at run
    time can start in it, nothing that is enabled for the machine's users.

    Args:
        units: Directory of units on its search path, the demo units' by default; it is also
            at ``%t/sdtool-units`` inside, where the demo units look for their payloads.
        log_level: How much the manager tells in ``log_text()``, a level of systemd(1).
    """

    def __init__(self, *, units: Path | None = None, log_level: str = "info") -> None:
        self._units = (units_directory() if units is None else units).resolve()
        self._log_level = log_level
        self._guardian: subprocess.Popen[bytes] | None = None
        self._understudy: threading.Thread | None = None
        self._log_fd: int | None = None
        self._log = ""
        self._pid = 0
        self._control_group = ""

    def start(self, *, timeout: float = 20.0) -> Self:
        """Boot the manager and return when it answers on its bus.

        Args:
            timeout: Seconds it may take.

        Raises:
            AccessDenied: Not root, or the cgroup hierarchy is not ours to write.
            Unavailable: A package is missing, or the manager did not come up; the message
                ends with the last lines of its log.
        """
        require_host()
        self.stop()
        deadline = time.monotonic() + timeout
        cgroup.sweep()
        try:
            self._spawn()
            self._await_ready(deadline)
            self._await_bus(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the manager and every process in the sandbox; harmless when it is not running.

        No process, mount, cgroup or file of it is left on return; what the kernel cannot kill
        is logged and left.
        """
        guardian, self._guardian = self._guardian, None
        if guardian is None:
            return
        try:
            guardian.communicate(timeout=_STOP_TIMEOUT)  # closing its stdin is the request
        except subprocess.TimeoutExpired:
            guardian.kill()
            guardian.communicate()
        if self._understudy is not None:
            self._understudy.join()
            self._understudy = None
        self._close_log()
        self._pid, self._control_group = 0, ""

    @property
    def pid(self) -> int:
        """The manager's pid in the caller's pid namespace, 0 when it is not running."""
        return self._pid

    @property
    def control_group(self) -> str:
        """The manager's cgroup2 path, under which its units are, "" when it is not running."""
        return self._control_group

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
            "SYSTEMD_UNIT_PATH": f"{self._units}:",  # the colon appends the default path
        }

    def argv(self, command: Sequence[str]) -> list[str]:
        """Build the command line that runs ``command`` inside, environment included.

        It runs in the caller's working directory where that exists inside, and ends with the
        sandbox. It exits 126 when the sandbox is going down.

        Raises:
            Unavailable: The manager is not running.
        """
        if self._guardian is None:
            raise Unavailable("The private manager is not running.")
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--"]
        client = Path(self._control_group).parent / CLIENT
        procs = f"/sys/fs/cgroup{client}/cgroup.procs"
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [*enter, "sh", "-c", _ENTER, "sh", procs, _directory(), *variables, *command]

    def log_text(self) -> str:
        """Read what manager and units have said so far; after ``stop``, all they had said.

        One "IDENTIFIER: TEXT" a line, as in the journal: "systemd: Startup finished in 47ms."
        Of much more than 2 MiB it is the beginning and the end, with a line of sdtool's between.
        """
        return self._log if self._log_fd is None else log.read(self._log_fd)

    def _spawn(self) -> None:
        """Start the guardian, which starts the manager."""
        systemd = find_systemd()
        assert systemd is not None, "require_host() has found it"
        config = Config(
            systemd=systemd,
            log_level=self._log_level,
            units=str(self._units),
            environment=_base_environment() | self.environment,
        )
        self._log_fd = log.create()
        self._guardian = subprocess.Popen(
            [sys.executable, "-P", "-c", _GUARDIAN, config.to_argument()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_fd,
            bufsize=0,  # what select() does not see must not hide in a buffer
            cwd="/",
            env={**os.environ, "PYTHONPATH": _python_path()},
            start_new_session=True,
        )
        # No reason to keep a process from ending: then the guardian does the work.
        pid = self._guardian.pid
        self._understudy = threading.Thread(
            target=_clean_up_after, args=(pid, cgroup.tree_of(pid)), daemon=True
        )
        self._understudy.start()

    def _await_ready(self, deadline: float) -> None:
        event = self._next_event(deadline)
        if event is None or event["event"] != "ready":
            raise self._failure(event)
        self._pid, self._control_group = event["pid"], event["control_group"]

    def _next_event(self, deadline: float) -> dict[str, Any] | None:
        """Read the guardian's next line, None when there is none by ``deadline``."""
        assert self._guardian is not None
        assert self._guardian.stdout is not None
        remaining = max(0.0, deadline - time.monotonic())
        if not select.select([self._guardian.stdout], [], [], remaining)[0]:
            return None
        line = self._guardian.stdout.readline()
        event: dict[str, Any] = {"event": "failed", "reason": "its guardian died"}
        return json.loads(line) if line else event

    def _await_bus(self, deadline: float) -> None:
        """Wait until the manager answers on its bus, which it joins a moment after it is ready.

        The call itself starts the bus. dbus-daemon holds calls to org.freedesktop.systemd1 back
        until the name is owned; another bus may refuse at once, so the call is repeated.
        """
        while not self._answers(deadline):
            now = time.monotonic()
            # The guardian has nothing to say from now on unless the manager is gone.
            event = self._next_event(min(deadline, now + _BUS_RETRY))
            if event is not None or now >= deadline:
                raise self._failure(event)

    def _answers(self, deadline: float) -> bool:
        ping = ["busctl", "--user", "--timeout=5", "call", "org.freedesktop.systemd1"]
        ping += ["/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer", "Ping"]
        try:
            return self.run(ping, timeout=max(0.0, deadline - time.monotonic())).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _failure(self, event: dict[str, Any] | None) -> SdtoolError:
        """Make the error of a start that did not succeed, with what the log says."""
        event = event or {"reason": "it was not ready in time"}
        if event.get("denied"):
            return AccessDenied(event["reason"], hint=event.get("hint"))
        lines = self.log_text().splitlines()[-_LOG_LINES:]
        log = f" (log: {'; '.join(lines)})" if lines else ""
        reason = event.get("reason", "its guardian was told to end").rstrip(".")
        return Unavailable(
            f"The private manager did not come up: {reason}{log}.", hint=event.get("hint")
        )

    def _close_log(self) -> None:
        self._log = self.log_text()
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None


def _clean_up_after(guardian: int, tree: Path) -> None:
    """Wait for the end of the guardian, our child, and do what it could not: being killed, say.

    The manager dies with it, but not what else is in the sandbox.
    """
    with contextlib.suppress(ChildProcessError):  # stop() has seen its end already
        os.waitid(os.P_PID, guardian, os.WEXITED | os.WNOWAIT)
    if not cgroup.destroy(tree, timeout=_DESTROY_TIMEOUT):
        cgroup.report(tree)


def _directory() -> str:
    """Name the working directory, the root if it was removed under us."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


def _base_environment() -> dict[str, str]:
    """Give the manager and its units what a login would, and nothing of the caller's."""
    home = os.environ.get("HOME", "/root")
    return {"PATH": _PATH, "HOME": home, "USER": "root", "LOGNAME": "root", "LANG": "C.UTF-8"}


def _python_path() -> str:
    """Join our own import path, so that the guardian finds sdtool wherever we did."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
