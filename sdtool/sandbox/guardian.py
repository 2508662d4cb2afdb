"""The process that outlives a sandbox's owner by the moment it takes to clean up.

``guard`` starts what the sandbox is made of and ends it, with everything that runs in it, as
soon as its standard input closes: when the owner asks for it, and when the owner is gone for
whatever reason, SIGKILL included. Its standard error is the log. It reports one JSON object a
line on standard output:

    {"event": "ready", "pid": 4711, "control_group": "/sdtool-sandbox-.../manager"}
    {"event": "failed", "reason": "...", "denied": false, "hint": null}
    {"event": "gone", "clean": true}

It lives in a cgroup of the sandbox itself, so that what ends its owner's cgroup (a closed
session, an outer sandbox) does not take the cleaner too. Were it killed all the same, its child
dies with it and the owner removes the rest; without an owner the next start does.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, Self

from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.sandbox import cgroup
from sdtool.sandbox.log import Writer
from sdtool.sources.cgroups import read_process_cgroup

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""What the launched command begins with. setpriv comes too late for a guardian that has died
before it, so what follows checks its parent."""

SHOW_CGROUP2 = """
if [ "$remount" = yes ]; then
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
"""
"""Shell commands for a launcher: what it launches sees a machine with nothing but cgroup2."""

_GUARDIAN = "guardian"

_KILL_TIMEOUT = 5.0
_REAP_TIMEOUT = 2.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the owner of a sandbox wants; a kind of sandbox says what that is."""

    def to_argument(self) -> str:
        """Serialise for the guardian's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> Self:
        """Read what ``to_argument`` wrote."""
        return cls(**json.loads(argument))


class Guardian(abc.ABC):
    """One sandbox, from the making of its cgroup to its removal.

    A kind of sandbox says what to launch and which of its parts is the manager.

    Args:
        log: What is appended to the sandbox's log.
    """

    members: ClassVar[tuple[str, ...]]
    """Its cgroups beside the guardian's, in the order in which they are ended."""

    def __init__(self, log: Writer) -> None:
        self._log = log
        self._home = read_process_cgroup("self")
        self.tree = cgroup.tree_of(os.getpid())
        self.name = self.tree.name
        self.prefix = ""
        self._child: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @abc.abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Start what the sandbox is made of."""

    @abc.abstractmethod
    def _read_manager(self, child: int) -> tuple[int, str]:
        """Read the manager's pid and cgroup2 path, once it is ready."""

    @abc.abstractmethod
    def _drain(self) -> None:
        """Take in what was said to the last; nobody says any more."""

    def run(self) -> None:
        """Guard until the owner, a SIGTERM or the end of what was launched ends it."""
        self._arm()
        try:
            self._create()
            self._child = self._launch()
            self._watch()
        except (SdtoolError, OSError) as error:
            say_failed(error)
        finally:
            say(event="gone", clean=self._tear_down())

    def _arm(self) -> None:
        """Be ready for the end before anything is begun."""
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        # Handlers instead of SIG_IGN, which the manager would inherit.
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, _note)
        # Orphans of the sandbox become ours to reap: some containers have no init that does.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._notify.bind(f"\0{self.name}")
        # In the order in which they are served.
        self.listen(sys.stdin, self._owner_spoke)
        self.listen(self._signals, self._signalled)
        self.listen(self._notify, self._manager_spoke)

    def listen(self, source: FileDescriptorLike, callback: Callable[[], bool]) -> None:
        """Have ``callback`` called when there is something to read; False from it is the end."""
        rank = len(self._selector.get_map())
        self._selector.register(source, selectors.EVENT_READ, (rank, callback))

    def forget(self, source: FileDescriptorLike) -> None:
        """Listen to it no longer."""
        self._selector.unregister(source)

    @property
    def notify_socket(self) -> str:
        """The address for the manager's NOTIFY_SOCKET, see sd_notify(3)."""
        return f"@{self.name}"

    def must_remount(self) -> bool:
        """Whether /sys/fs/cgroup, where systemd looks, is not the whole of cgroup2."""
        return (self.tree.parent, self.prefix) != (Path("/sys/fs/cgroup"), "")

    def _create(self) -> None:
        cgroup.create(self.tree, (*self.members, _GUARDIAN))
        cgroup.write(self.tree / _GUARDIAN / "cgroup.procs", "0")
        place = f"/{self.name}/{_GUARDIAN}"
        found = read_process_cgroup("self")
        if found is None or not found.endswith(place):
            raise Unavailable(f"The cgroups at {self.tree.parent} are not this process's own.")
        # Not "" where a container was given a part of its host's hierarchy.
        self.prefix = found.removesuffix(place)

    def _watch(self) -> None:
        """Serve whoever has something to say, a bounded piece of it each, the owner first."""
        served = True
        while served:
            ready = sorted((key.data for key, _ in self._selector.select()), key=itemgetter(0))
            served = all(callback() for _, callback in ready)

    def append(self, text: bytes) -> None:
        """Append to the log; one that cannot be written is no reason to end the sandbox."""
        with contextlib.suppress(OSError):
            self._log.append(text)

    def _owner_spoke(self) -> bool:
        return bool(os.read(sys.stdin.fileno(), 4096))

    def _signalled(self) -> bool:
        """Take the signals that came; False when one of them ends the sandbox."""
        numbers = self._signals.recv(4096)
        status = self._reap()
        if status is not None:
            reason = f"the manager ended with status {os.waitstatus_to_exitcode(status)}"
            say_failed(Unavailable(reason))
        return status is None and signal.SIGTERM not in numbers

    def _manager_spoke(self) -> bool:
        """Report the first READY=1; the manager repeats it when all its start-up jobs are done."""
        message = self._notify.recv(65536).decode(errors="replace")
        if "READY=1" in message.splitlines() and not self._ready and self._child is not None:
            self._ready = True
            pid, control_group = self._read_manager(self._child.pid)
            say(event="ready", pid=pid, control_group=control_group)
        return True

    def _reap(self) -> int | None:
        """Reap every child that is dead; our own child's wait status if it was among them."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitpid(-1, os.WNOHANG))[0]:
                if self._child is not None and dead[0] == self._child.pid:
                    found = dead[1]
        return found

    def _tear_down(self) -> bool:
        """End every process of the sandbox and remove its cgroups; whether that succeeded."""
        if self._child is not None:
            self._child.kill()  # it may not have joined its cgroup yet
        deadline = time.monotonic() + _KILL_TIMEOUT
        for member in self.members:
            remaining = max(0.0, deadline - time.monotonic())
            cgroup.destroy(self.tree / member, timeout=remaining)
        self._reap_all()
        self._drain()
        self._go_home()
        cgroup.remove(self.tree)
        return not self.tree.exists()

    def _reap_all(self) -> None:
        """Wait for the last of the children; the bound is for one that left the sandbox."""
        deadline = time.monotonic() + _REAP_TIMEOUT
        while self._reap() is not None or self._has_children():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            select.select([self._signals], [], [], remaining)
            with contextlib.suppress(BlockingIOError):
                self._signals.recv(4096)

    def _has_children(self) -> bool:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _go_home(self) -> None:
        """Leave the sandbox's cgroup, for the root if where we came from is gone."""
        relative = (self._home or "/").removeprefix(self.prefix).strip("/")
        for directory in (self.tree.parent / relative, self.tree.parent):
            with contextlib.suppress(OSError):
                cgroup.write(directory / "cgroup.procs", "0")
                return


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up socket has the signal's number already."""


def say_failed(error: Exception) -> None:
    """Report that the sandbox cannot be, and why."""
    denied = isinstance(error, AccessDenied)
    say(event="failed", reason=str(error), denied=denied, hint=getattr(error, "hint", None))


def say(**event: object) -> None:
    """Report an event to the owner."""
    # Nobody listens once the owner is dead.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def guard(make: Callable[[Writer, str], Guardian]) -> None:
    """Guard one sandbox: the whole program.

    Args:
        make: Makes the guardian from the log and the argument that the owner gave.
    """
    os.umask(0o022)
    try:
        guardian = make(Writer(sys.stderr.fileno()), sys.argv[1])
    except (SdtoolError, OSError) as error:
        say_failed(error)
    else:
        guardian.run()
