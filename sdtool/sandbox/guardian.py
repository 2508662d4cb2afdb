"""The process that outlives a sandbox's owner by the moment it takes to clean up.

``main`` starts the manager and ends it, with everything that runs in the sandbox, as soon as
its standard input closes: when the owner asks for it, and when the owner is gone for whatever
reason, SIGKILL included. Its standard error is the log. It reports one JSON object a line on
standard output:

    {"event": "ready", "pid": 4711, "control_group": "/sdtool-sandbox-.../manager"}
    {"event": "failed", "reason": "...", "denied": false, "hint": null}
    {"event": "gone", "clean": true}

It lives in a cgroup of the sandbox itself, so that what ends its owner's cgroup (a closed
session, an outer sandbox) does not take the cleaner too. Were it killed all the same, the
manager dies with it and the owner removes the rest; without an owner the next start does.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING

from sdtool.errors import AccessDenied, SdtoolError, Unavailable
from sdtool.sandbox import cgroup
from sdtool.sandbox.journal import Journal
from sdtool.sandbox.log import Writer
from sdtool.sources.cgroups import read_process_cgroup

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

MANAGER, CLIENT, _GUARDIAN = "manager", "client", "guardian"

_KILL_TIMEOUT = 5.0
_REAP_TIMEOUT = 2.0
_PR_SET_CHILD_SUBREAPER = 36

_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private")

# Joining the cgroup comes first, so that there is no process of the sandbox outside of it.
# $PPID: setpriv came too late if the guardian had died before it. The exchange of a line: the
# guardian can reach into the new /run now, and does before the manager looks there.
_LAUNCH = """
set -eu
name=$1 guardian=$2 procs=$3 remount=$4 units=$5; shift 5
[ "$PPID" = "$guardian" ]
echo 0 > "$procs"
if [ "$remount" = yes ]; then
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mount -t tmpfs -o mode=755,nosuid,nodev "$name" /run
# systemd --user refuses to run without the first, see sd_booted(3)
mkdir -p /run/systemd/system /run/systemd/journal "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"
mkdir -p "$XDG_CONFIG_HOME" "$XDG_DATA_HOME" "$XDG_STATE_HOME" "$XDG_CACHE_HOME"
ln -s "$units" "$XDG_RUNTIME_DIR/sdtool-units"
# what is enabled for the users of this machine has no business here
if [ -d /etc/systemd/user ]; then
    mount -t tmpfs -o mode=755,nosuid,nodev "$name" /etc/systemd/user
fi
echo mounted
read -r go
exec "$@" < /dev/null >&2
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the owner wants: the manager's executable, its log level, units and environment."""

    systemd: str
    log_level: str
    units: str
    environment: dict[str, str]

    def to_argument(self) -> str:
        """Serialise for the guardian's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, argument: str) -> Config:
        """Read what ``to_argument`` wrote."""
        return cls(**json.loads(argument))


class Guardian:
    """One sandbox, from the making of its cgroup to its removal."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._home = read_process_cgroup("self")
        self._tree = cgroup.tree_of(os.getpid())
        self._name = self._tree.name
        self._prefix = ""
        self._manager: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._launch_line, self._launcher = socket.socketpair()
        self._log = Writer(sys.stderr.fileno())
        self._journal = Journal(self._append)

    def run(self) -> None:
        """Guard until the owner, a SIGTERM or the end of the manager ends it."""
        self._arm()
        try:
            self._create()
            self._launch()
            self._watch()
        except (SdtoolError, OSError) as error:
            _say_failed(error)
        finally:
            _say(event="gone", clean=self._tear_down())

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
        self._notify.bind(f"\0{self._name}")
        # In the order in which they are served.
        self._listen(sys.stdin, self._owner_spoke)
        self._listen(self._signals, self._signalled)
        self._listen(self._launch_line, self._launcher_spoke)
        self._listen(self._notify, self._manager_spoke)
        self._listen(self._journal, self._something_said)

    def _listen(self, source: FileDescriptorLike, callback: Callable[[], bool]) -> None:
        """Have ``callback`` called when there is something to read; False from it is the end."""
        rank = len(self._selector.get_map())
        self._selector.register(source, selectors.EVENT_READ, (rank, callback))

    def _create(self) -> None:
        cgroup.create(self._tree, (MANAGER, CLIENT, _GUARDIAN))
        cgroup.write(self._tree / _GUARDIAN / "cgroup.procs", "0")
        place = f"/{self._name}/{_GUARDIAN}"
        found = read_process_cgroup("self")
        if found is None or not found.endswith(place):
            raise Unavailable(f"The cgroups at {self._tree.parent} are not this process's own.")
        # Not "" where a container was given a part of its host's hierarchy.
        self._prefix = found.removesuffix(place)

    def _launch(self) -> None:
        """Start the manager; until it has joined its cgroup only its pid is known."""
        arguments = [self._name, str(os.getpid()), str(self._tree / MANAGER / "cgroup.procs")]
        arguments += ["yes" if self._must_remount() else "no", self._config.units]
        systemd = [self._config.systemd, "--user", "--log-target=journal"]
        systemd.append(f"--log-level={self._config.log_level}")
        self._manager = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _LAUNCH, "sh", *arguments, *systemd],
            stdin=self._launcher.fileno(),
            stdout=self._launcher.fileno(),
            env={**self._config.environment, "NOTIFY_SOCKET": f"@{self._name}"},
        )
        self._launcher.close()

    def _launcher_spoke(self) -> bool:
        """Open the journal in the sandbox's own /run and let the manager start."""
        self._selector.unregister(self._launch_line)
        if self._manager is not None and self._launch_line.recv(4096):
            self._journal.open(Path(f"/proc/{self._manager.pid}/root/run/systemd/journal"))
            self._launch_line.sendall(b"go\n")
        # Otherwise it has failed, and SIGCHLD will tell.
        return True

    def _must_remount(self) -> bool:
        """Whether /sys/fs/cgroup, where systemd looks, is not the whole of cgroup2."""
        return (self._tree.parent, self._prefix) != (Path("/sys/fs/cgroup"), "")

    def _watch(self) -> None:
        """Serve whoever has something to say, a bounded piece of it each, the owner first."""
        served = True
        while served:
            ready = sorted((key.data for key, _ in self._selector.select()), key=itemgetter(0))
            served = all(callback() for _, callback in ready)

    def _something_said(self) -> bool:
        self._journal.take()
        return True

    def _append(self, text: bytes) -> None:
        # A log that cannot be written is no reason to end the sandbox.
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
            _say_failed(Unavailable(reason))
        return status is None and signal.SIGTERM not in numbers

    def _manager_spoke(self) -> bool:
        """Report the first READY=1; the manager repeats it when all its start-up jobs are done."""
        message = self._notify.recv(65536).decode(errors="replace")
        if "READY=1" in message.splitlines() and not self._ready and self._manager is not None:
            self._ready = True
            control_group = f"{self._prefix}/{self._name}/{MANAGER}"
            _say(event="ready", pid=self._manager.pid, control_group=control_group)
        return True

    def _reap(self) -> int | None:
        """Reap every child that is dead; the manager's wait status if it was among them."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                if self._manager is not None and child[0] == self._manager.pid:
                    found = child[1]
        return found

    def _tear_down(self) -> bool:
        """End every process of the sandbox and remove its cgroups; whether that succeeded."""
        if self._manager is not None:
            self._manager.kill()  # it may not have joined its cgroup yet
        deadline = time.monotonic() + _KILL_TIMEOUT
        for member in (MANAGER, CLIENT):
            remaining = max(0.0, deadline - time.monotonic())
            cgroup.destroy(self._tree / member, timeout=remaining)
        self._reap_all()
        self._journal.drain()
        self._go_home()
        cgroup.remove(self._tree)
        return not self._tree.exists()

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
        relative = (self._home or "/").removeprefix(self._prefix).strip("/")
        for directory in (self._tree.parent / relative, self._tree.parent):
            with contextlib.suppress(OSError):
                cgroup.write(directory / "cgroup.procs", "0")
                return


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up socket has the signal's number already."""


def _say_failed(error: Exception) -> None:
    denied = isinstance(error, AccessDenied)
    _say(event="failed", reason=str(error), denied=denied, hint=getattr(error, "hint", None))


def _say(**event: object) -> None:
    # Nobody listens once the owner is dead.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Guard one sandbox."""
    os.umask(0o022)
    try:
        guardian = Guardian(Config.from_argument(sys.argv[1]))
    except (SdtoolError, OSError) as error:
        _say_failed(error)
    else:
        guardian.run()
