"""The owner's side of a sandbox that has a guardian: start, wait, stop, and the log.

Everything in such a sandbox dies with it, and it dies with its owner: with the process that
called ``start``, however that one ends.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, Self

from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.sandbox import cgroup, log
from sdtool.sandbox.box import Sandbox

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_STOP_TIMEOUT = 15.0
_DESTROY_TIMEOUT = 5.0
_LOG_LINES = 5


class GuardedSandbox(Sandbox):
    """A sandbox that a guardian process ends. A kind of it says how to start and to greet."""

    title: ClassVar[str]
    """What its errors call it: "private manager"."""

    def __init__(self) -> None:
        self._guardian: subprocess.Popen[bytes] | None = None
        self._understudy: threading.Thread | None = None
        self._log_fd: int | None = None
        self._log = ""
        self._pid = 0
        self._control_group = ""

    @abc.abstractmethod
    def _prepare(self) -> tuple[str, str]:
        """Check what is needed; the module of the guardian and its argument.

        Raises:
            AccessDenied: Not root.
            Unavailable: Something is missing.
        """

    @abc.abstractmethod
    def _await_service(self, deadline: float) -> None:
        """Wait until the manager, which has said that it is ready, serves its clients."""

    def start(self, *, timeout: float = 20.0) -> Self:
        """Boot the manager and return when it answers.

        Args:
            timeout: Seconds it may take; what is prepared once and kept is not counted.

        Raises:
            AccessDenied: Not root, or the cgroup hierarchy is not ours to write.
            Unavailable: A package is missing, or the manager did not come up; the message
                ends with the last lines of its log.
        """
        self.stop()
        try:
            module, argument = self._prepare()
            deadline = time.monotonic() + timeout
            cgroup.sweep()
            self._spawn(module, argument)
            self._await_ready(deadline)
            self._await_service(deadline)
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
        """The cgroup2 path under which the units are, "" when it is not running."""
        return self._control_group

    def log_text(self) -> str:
        """Read what has been said so far; after ``stop``, all that had been.

        Of much more than 2 MiB it is the beginning and the end, with a line of sdtool's between.
        """
        return self._log if self._log_fd is None else log.read(self._log_fd)

    def require_running(self) -> None:
        """Check that it is started.

        Raises:
            Unavailable: It is not.
        """
        if self._guardian is None:
            raise Unavailable(f"The {self.title} is not running.")

    def _spawn(self, module: str, argument: str) -> None:
        """Start the guardian, which starts the rest."""
        self._log_fd = log.create()
        self._guardian = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import main; main()", argument],
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
        event = self.next_event(deadline)
        if event is None or event["event"] != "ready":
            raise self.failure(event)
        self._pid, self._control_group = event["pid"], event["control_group"]

    def next_event(self, deadline: float) -> dict[str, Any] | None:
        """Read the guardian's next line, None when there is none by ``deadline``."""
        assert self._guardian is not None
        assert self._guardian.stdout is not None
        remaining = max(0.0, deadline - time.monotonic())
        if not select.select([self._guardian.stdout], [], [], remaining)[0]:
            return None
        line = self._guardian.stdout.readline()
        event: dict[str, Any] = {"event": "failed", "reason": "its guardian died"}
        return json.loads(line) if line else event

    def failure(self, event: dict[str, Any] | None) -> SdtoolError:
        """Make the error of a start that did not succeed, with what the log says."""
        event = event or {"reason": "it was not ready in time"}
        if event.get("denied"):
            return AccessDenied(event["reason"], hint=event.get("hint"))
        lines = self.log_text().splitlines()[-_LOG_LINES:]
        said = f" (log: {'; '.join(lines)})" if lines else ""
        reason = event.get("reason", "its guardian was told to end").rstrip(".")
        return Unavailable(
            f"The {self.title} did not come up: {reason}{said}.", hint=event.get("hint")
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


def _python_path() -> str:
    """Join our own import path, so that the guardian finds sdtool wherever we did."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
