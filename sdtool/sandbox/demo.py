"""The demo units as guests of the user manager that runs already: for a demo without root.

They are linked in at run time, through ``$XDG_RUNTIME_DIR/sdtool-units``, and a path through
it is the mark that a unit is ours: only such units are ever stopped or removed. What systemd
knows is asked of systemctl(1).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sdtool.errors import AccessDenied, NotConfigured, Unavailable
from sdtool.sandbox.box import Sandbox
from sdtool.sandbox.private import PrivateManager
from sdtool.sandbox.units import units_directory

_SYSTEMCTL_TIMEOUT = 15.0
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    name: str
    exists: bool
    fragment_path: str
    slice: str


def find_manager() -> Sandbox:
    """Choose a manager for the demo, not started yet.

    The caller's own user manager when it answers, else a private one for root. A sandbox, whose
    own units the demo units are, lends nothing: a demo inside gets one of its own.

    Raises:
        AccessDenied: There is no user manager, and we are not root.
        Unavailable: The demo units are missing.
    """
    search_path = _read_search_path()
    if search_path is not None and not any(map(_is_units_directory, search_path)):
        return BorrowedManager()
    if os.geteuid() != 0:
        raise AccessDenied(
            "No systemd user manager runs for you here, and a private one needs root.",
            hint="run it from a login session, or as root",
        )
    return PrivateManager()


def _runtime() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}"))


def _read_search_path() -> list[Path] | None:
    """Ask the user manager where it looks for units; None when none listens and answers."""
    with socket.socket(socket.AF_UNIX) as door:
        try:
            door.connect(str(_runtime() / "systemd" / "private"))
        except OSError:
            return None
    answer = _systemctl("show", "--value", "--property=UnitPath")
    return None if answer.returncode != 0 else [Path(word) for word in answer.stdout.split()]


def _is_units_directory(directory: Path) -> bool:
    """Whether a directory has demo units and payloads, of this or another sdtool."""
    return (directory / "bin").is_dir() and any(directory.glob("sdtool-*.service"))


def _systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask the user manager; no answer in time and no systemctl are failures like others."""
    command = ["systemctl", "--user", *arguments]
    try:
        return subprocess.run(
            command,
            env={**os.environ, "XDG_RUNTIME_DIR": str(_runtime()), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SYSTEMCTL_TIMEOUT,
            start_new_session=True,  # away from the terminal's Ctrl-C
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=255, stdout="", stderr=str(error))


class BorrowedManager(Sandbox):
    """The caller's own user manager, with the demo units linked into it.

    Args:
        units: Directory of the units to link, the demo units' by default.
    """

    def __init__(self, *, units: Path | None = None) -> None:
        self._units = (units_directory() if units is None else units).resolve()
        self._runtime = _runtime()
        self._door = self._runtime / "sdtool-units"
        self._links = self._runtime / "systemd" / "user"
        self._lock: int | None = None

    def start(self, *, timeout: float = 20.0) -> Self:
        """Link the demo units in; those an earlier demo could not remove are removed first.

        Args:
            timeout: Of no use here: each question to the manager has a limit of its own.

        Raises:
            NotConfigured: A unit with the name of one of ours exists and is not ours.
            Unavailable: Another demo runs in this manager, or it does not answer.
        """
        self.stop()
        self._take_lock()
        try:
            self._refuse_strangers()
        except BaseException:
            self._drop_lock()  # nothing here is ours to remove
            raise
        try:
            self._remove()
            self._door.symlink_to(self._units)
            self._link()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the demo units and remove every trace of them, even during a Ctrl-C.

        Takes no longer than the units' ExecStop= and ExecStopPost= commands: processes are
        killed, not asked.
        """
        if self._lock is None:
            return
        with _signals_held():
            try:
                self._remove()
            finally:
                self._drop_lock()

    @property
    def environment(self) -> dict[str, str]:
        """What names the user manager and its bus to a client."""
        return {
            "XDG_RUNTIME_DIR": str(self._runtime),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self._runtime}/bus",
        }

    def argv(self, command: Sequence[str]) -> list[str]:
        """Build the command line that runs ``command`` as a client of the user manager."""
        return ["env", "--", *(f"{k}={v}" for k, v in self.environment.items()), *command]

    def _take_lock(self) -> None:
        """Be the only demo here. The lock ends with this process and leaves no file."""
        try:
            self._lock = os.open(self._runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._drop_lock()
            raise Unavailable("Another sdtool demo runs in your user manager.") from None
        except OSError as error:
            raise Unavailable(f"Cannot use {self._runtime}: {error.strerror}.") from error

    def _drop_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _files(self) -> list[Path]:
        types = (".service", ".socket")
        return [path for path in sorted(self._units.iterdir()) if path.suffix in types]

    def _refuse_strangers(self) -> None:
        """Check that nothing in our way belongs to somebody else."""
        if self._door.exists() and not self._door.is_symlink():
            raise NotConfigured(f"{self._door} exists and is not sdtool's.", hint="move it away")
        for unit in _show([_instance_of(path.name) for path in self._files()]):
            if unit.exists and not self._is_ours(unit):
                raise NotConfigured(
                    f"{unit.name} exists already and is not the demo's.",
                    subject=unit.name,
                    hint=f"see systemctl --user cat '{unit.name}'",
                )

    def _is_ours(self, unit: _Unit) -> bool:
        return self._leads_through(Path(unit.fragment_path))

    def _link(self) -> None:
        files = [str(self._door / path.name) for path in self._files()]
        linking = _systemctl("link", "--runtime", *files)
        if linking.returncode != 0:
            reason = (linking.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Unavailable(f"Your user manager did not link the demo units: {reason}.")

    def _remove(self) -> None:
        """Stop what is ours, unlink it, and have the manager forget it."""
        try:
            self._end([unit for unit in _list("sdtool-*") if self._is_ours(unit)])
        finally:
            if self._unlink():
                _systemctl("daemon-reload")

    def _end(self, units: list[_Unit]) -> None:
        """Stop units by force, with what they left behind.

        The stop is asked for first, else a kill would count as a failure worth a restart.
        """
        if not units:
            return
        names = [unit.name for unit in units]
        _systemctl("stop", "--no-block", *names)
        _systemctl("kill", "--signal=KILL", *names)
        # Instances bring a slice that nobody else needs.
        slices = {unit.slice for unit in units if "sdtool" in unit.slice}
        _systemctl("stop", *names, *slices)
        _systemctl("reset-failed", *names)

    def _unlink(self) -> bool:
        """Remove the links, the manager's and our own; whether the manager had any."""
        links = [path for path in self._links.glob("sdtool-*") if self._leads_through(path)]
        for link in links:
            link.unlink(missing_ok=True)
        if self._door.is_symlink():
            self._door.unlink()
        with contextlib.suppress(OSError):  # not there, or not empty
            self._links.rmdir()
        return bool(links)

    def _leads_through(self, path: Path) -> bool:
        """Whether a unit's file is a link through ``sdtool-units``, the mark of ours."""
        return path.is_symlink() and path.readlink().parent == self._door


def _instance_of(name: str) -> str:
    """Name an instance where ``name`` is a template, which systemctl cannot show."""
    return name.replace("@.", "@sdtool.")


def _list(pattern: str) -> list[_Unit]:
    """Ask for the units that are loaded, running or not, and match."""
    listing = _systemctl("list-units", "--all", "--plain", "--full", "--no-legend", pattern)
    names = [line.split()[0] for line in listing.stdout.splitlines() if line.strip()]
    return _show(names) if names else []


def _show(names: Sequence[str]) -> list[_Unit]:
    properties = "--property=Id,LoadState,FragmentPath,Slice"
    return [_parse(block) for block in _ask("show", properties, *names).split("\n\n") if block]


def _ask(*arguments: str) -> str:
    """Ask systemctl for what cannot be done without.

    Raises:
        Unavailable: It gave no answer.
    """
    answer = _systemctl(*arguments)
    if answer.returncode != 0:
        reason = answer.stderr.strip() or f"systemctl exited {answer.returncode}"
        raise Unavailable(f"Your user manager does not answer: {reason.rstrip('.')}.")
    return answer.stdout


def _parse(block: str) -> _Unit:
    values = dict(line.split("=", 1) for line in block.strip().splitlines())
    return _Unit(
        name=values["Id"],
        exists=values["LoadState"] != "not-found",
        fragment_path=values["FragmentPath"],
        slice=values.get("Slice", ""),
    )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back what would interrupt the cleaning; it arrives afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
