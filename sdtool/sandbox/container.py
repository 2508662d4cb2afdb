"""A throwaway real system: Debian of a suite, booted by systemd in a container.

It has a system manager, a journal, logind, polkit, an ordinary user, and a loopback of its own;
it has neither the machine's network nor its devices. Everything in it is gone with it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sdtool.errors import Unavailable
from sdtool.model.scope import Scope
from sdtool.sandbox import cache
from sdtool.sandbox.container_guardian import ContainerConfig
from sdtool.sandbox.guarded import PATH, GuardedSandbox
from sdtool.sandbox.rootfs import TESTER, TESTER_UID, Progress, obtain_packages, obtain_rootfs
from sdtool.sandbox.units import units_directory

_HOME = "/opt/sdtool"
_PACKAGE = Path(__file__).resolve().parent.parent

# The modules are shown read-only: their bytecode is kept elsewhere, or each command compiles them.
_SDTOOL = f"""#!/bin/sh
export PYTHONPATH={_HOME}/lib:{_HOME}/packages PYTHONPYCACHEPREFIX=/tmp/sdtool-pycache-$(id -u)
exec python3 -P -m sdtool "$@"
"""

# Around systemd-run, as root in no unit, and around the command, in its unit: systemd takes the
# death by SIGTERM and its kin for a clean end, and systemd-run a lost bus. The shell knows better.
_RUN = """
exits=/run/sdtool-exits/$$
mkdir -p -m 1777 /run/sdtool-exits
unit=run-sdtool-$$.service
systemd-run --unit="$unit" --setenv=SDTOOL_EXITS="$exits" "$@"
status=$?
# systemd-run gives up when the bus goes, and the command goes on: its cgroup says so.
for top in /sys/fs/cgroup /sys/fs/cgroup/systemd; do
    while [ ! -s "$exits" ] && [ -d "$top/system.slice/$unit" ]; do sleep 0.1; done
done
if [ -s "$exits" ]; then
    read -r status < "$exits"
elif [ "$status" = 0 ]; then
    echo "sdtool: How the command ended is not known: the bus or the system went down." >&2
    status=69
fi
rm -f "$exits"
exit "$status"
"""

_COMMAND = """
trap : HUP INT QUIT PIPE TERM
exits=$SDTOOL_EXITS
unset SDTOOL_EXITS
"$@"
status=$?
echo "$status" 2> /dev/null > "$exits"
exit "$status"
"""

_UNIT_PATHS = ("/usr/local/lib/systemd/system", "/usr/local/lib/systemd/user")

_LOGIN_TIMEOUT = 20.0


def _say_nothing(sentence: str) -> None:
    """Keep progress to ourselves."""


class Container(GuardedSandbox):
    """A throwaway real system of a Debian suite, with the demo units and the command ``sdtool``.

    Commands run in it as units of their own, as root or as the user ``tester``. Its log is its
    console; the rest is in its journal.

    Args:
        suite: One of ``SUITES``.
        units: Directory of units that both managers find, the demo units' by default.
        bind: Directories of the machine that are there too, read-only: place -> directory.
        prepare: Shell commands, run in the root directory before the boot.
        cgroups: "unified", or "legacy" for a system that has cgroup v1 only.
        arguments: More arguments for systemd-nspawn(1).
        requirements: More Python packages for its ``python3``, in pip's words.
        on_progress: Told in a sentence of what takes long.
    """

    title = "container"
    scope = Scope.SYSTEM

    def __init__(
        self,
        suite: str = "trixie",
        *,
        units: Path | None = None,
        bind: Mapping[str, Path] = MappingProxyType({}),
        prepare: str = "",
        cgroups: str = "unified",
        arguments: Sequence[str] = (),
        requirements: Sequence[str] = (),
        on_progress: Progress = _say_nothing,
    ) -> None:
        super().__init__()
        self.suite = suite
        self._units = (units_directory() if units is None else units).resolve()
        self._bind = dict(bind)
        self._prepare_root = prepare
        self._cgroups = cgroups
        self._arguments = tuple(arguments)
        self._requirements = tuple(requirements)
        self._on_progress = on_progress
        self._in_use: list[int] = []

    def stop(self) -> None:
        """End the container and every process in it; harmless when it is not running."""
        super().stop()
        while self._in_use:
            os.close(self._in_use.pop())

    @property
    def environment(self) -> dict[str, str]:
        """What every command inside has in its environment, beside what its user brings."""
        return {"PATH": PATH, "LANG": "C.UTF-8", "PYTHONPATH": f"{_HOME}/packages"}

    def argv(
        self,
        command: Sequence[str],
        *,
        user: str = "root",
        terminal: bool = False,
        env: Mapping[str, str] | None = None,
        directory: str = "~",
        properties: Sequence[str] = (),
    ) -> list[str]:
        """Build the command line that runs ``command`` inside, as a unit of its own.

        It ends with the exit status of the command, 128 and the number of a signal that ended
        it, 255 where its whole unit was killed (systemd-run(1)), or 69 where nothing of that is
        known, because the bus or the system went down.

        Args:
            command: Program and arguments.
            user: Who it runs as.
            terminal: Give it a terminal of its own, passed through to ours.
            env: More variables for its environment.
            directory: Its working directory; ``~`` is the user's home.
            properties: More of its unit, "NAME=VALUE".

        Raises:
            Unavailable: The container is not running.
        """
        variables = {**self.environment, **(env or {})}
        if user == TESTER:
            variables["XDG_RUNTIME_DIR"] = f"/run/user/{TESTER_UID}"
        run = ["--quiet", "--wait", "--collect", "--pty" if terminal else "--pipe"]
        run += [f"--uid={user}", f"--property=WorkingDirectory={directory}"]
        # It ends with the command, whatever that leaves, and as it would in a shell.
        run += ["--property=TimeoutStopSec=1", "--property=IgnoreSIGPIPE=no"]
        run += [f"--property={setting}" for setting in properties]
        run += [f"--setenv={name}={value}" for name, value in variables.items()]
        # The manager would take $NAME in an argument for a variable.
        words = [word.replace("$", "$$") for word in ("sh", "-c", _COMMAND, "sh", *command)]
        return self.enter(["sh", "-c", _RUN, "sh", *run, "--", *words])

    def enter(self, command: Sequence[str]) -> list[str]:
        """Build the command line that runs ``command`` inside as root without any unit.

        It stays in the cgroup of its caller, and needs no manager that answers.

        Raises:
            Unavailable: The container is not running.
        """
        self.require_running()
        plain = [
            "env",
            "-i",
            f"PATH={PATH}",
            "LANG=C.UTF-8",
            f"TERM={os.environ.get('TERM', 'dumb')}",
        ]
        return ["nsenter", "--target", str(self.pid), "--all", "--", *plain, *command]

    def log_in(self) -> None:
        """Start the user manager of ``tester``, and let it linger, with the demo units in it.

        Raises:
            Unavailable: It did not come up.
        """
        runtime = f"/run/user/{TESTER_UID}"
        steps = f"loginctl enable-linger {TESTER} && systemctl start user@{TESTER_UID}.service"
        steps += f" && ln -sfn {_HOME}/lib/units {runtime}/sdtool-units"
        try:
            done = self.run(["sh", "-c", steps], timeout=_LOGIN_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"The user manager of {TESTER} did not come up in time.") from error
        if done.returncode != 0:
            raise Unavailable(
                f"The user manager of {TESTER} did not come up: {done.stderr.strip()}."
            )

    def _require_visible(self) -> None:
        """Check that nothing it is shown lies where the container's own /run will be."""
        for path in (cache.cache_directory(), self._units, _PACKAGE, *self._bind.values()):
            if path.resolve().is_relative_to("/run"):
                raise Unavailable(
                    f"A container cannot be shown {path}, which is below /run.",
                    hint="move it, or set XDG_CACHE_HOME where it is the cache",
                )

    def _prepare(self) -> tuple[str, str]:
        self._require_visible()
        rootfs = obtain_rootfs(self.suite, self._on_progress)
        packages = obtain_packages(rootfs, self._requirements, self._on_progress)
        for directory in (rootfs, packages):
            self._in_use.append(cache.use(directory))
        arguments = ["--private-network", "--resolv-conf=off", "--timezone=off"]
        arguments += [f"--hostname=sdtool-{self.suite}", *self._binds(packages), *self._arguments]
        config = ContainerConfig(
            rootfs=str(rootfs),
            prepare=f"{_install()}\n{self._prepare_root}",
            cgroups=self._cgroups,
            arguments=(*arguments, "systemd.show_status=0"),
        )
        return "sdtool.sandbox.container_guardian", config.to_argument()

    def _binds(self, packages: Path) -> list[str]:
        """Show the container sdtool, its dependencies, the demo units and what was asked for."""
        places = {f"{_HOME}/lib/sdtool": _PACKAGE, f"{_HOME}/packages": packages}
        units = (f"{_HOME}/lib/units", "/run/sdtool-units", *_UNIT_PATHS)
        places |= dict.fromkeys(units, self._units)
        places |= self._bind
        return [
            f"--bind-ro={_escape(str(path))}:{_escape(place)}" for place, path in places.items()
        ]

    def _await_service(self, deadline: float) -> None:
        """The system manager is ready when it says so."""


def _install() -> str:
    """The shell commands that put the command ``sdtool`` into a root directory."""
    return f"cat > usr/local/bin/sdtool << 'END'\n{_SDTOOL}END\nchmod 755 usr/local/bin/sdtool"


def _escape(path: str) -> str:
    """Quote a path for --bind=, where a colon separates."""
    return path.replace("\\", "\\\\").replace(":", "\\:")
