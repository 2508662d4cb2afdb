"""What every sandbox offers: a manager with the demo units, and a way to run things in it."""

from __future__ import annotations

import abc
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from sdtool.model.scope import Scope


class Sandbox(abc.ABC):
    """A service manager that knows the demo units, while it is started.

    Use it as a context manager.
    """

    scope: Scope = Scope.USER
    """Which manager it is: clients talk to it with ``--user`` or ``--system``."""

    @abc.abstractmethod
    def start(self, *, timeout: float = 20.0) -> Self:
        """Make it ready for use within ``timeout`` seconds."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Remove every trace of it; harmless when it is not started."""

    @property
    @abc.abstractmethod
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment beside the caller's own."""

    @abc.abstractmethod
    def argv(self, command: Sequence[str]) -> list[str]:
        """Build the command line that runs ``command`` inside, environment included."""

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float | None = 60.0,
        env: Mapping[str, str] | None = None,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` inside and return its output and exit status, whatever that is.

        Args:
            command: Program and arguments.
            timeout: Seconds it may take, None for ever.
            env: The environment that the sandbox's own is added to, the caller's by default.
            text: Its standard input.

        Raises:
            Unavailable: The sandbox is not started.
            subprocess.TimeoutExpired: It took longer, and was killed.
        """
        return subprocess.run(
            self.argv(command),
            timeout=timeout,
            env=None if env is None else dict(env),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
