"""What a private manager needs of the machine: root and a handful of programs.

Programs are looked for, packages are named: the hint is a command that Debian's users can
paste. Whether the kernel lets us make namespaces and cgroups shows only when they are made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from sdtool.errors import AccessDenied, Unavailable

_LIBRARY = ("/usr/lib/systemd", "/lib/systemd")


def find_systemd() -> str | None:
    """Find systemd's own executable, which is never on PATH."""
    return _first(f"{directory}/systemd" for directory in _LIBRARY)


def _first(paths: Iterable[str]) -> str | None:
    return next((path for path in paths if Path(path).exists()), None)


def _has_bus() -> bool:
    return bool(shutil.which("dbus-daemon") or shutil.which("dbus-broker"))


def _has_user_bus() -> bool:
    return _first(f"{directory}/user/dbus.socket" for directory in _LIBRARY) is not None


def _has_namespace_tools() -> bool:
    return all(map(shutil.which, ("nsenter", "setpriv", "unshare")))


_PACKAGES: tuple[tuple[str, Callable[[], bool]], ...] = (
    ("systemd", lambda: find_systemd() is not None and shutil.which("busctl") is not None),
    ("dbus", _has_bus),
    ("dbus-user-session", _has_user_bus),
    ("util-linux", _has_namespace_tools),
    ("python3", lambda: Path("/usr/bin/python3").exists()),  # the payloads' interpreter
)


def missing_packages() -> tuple[str, ...]:
    """Name the Debian packages whose programs are not here, none when all is well."""
    return tuple(package for package, is_here in _PACKAGES if not is_here())


def require_host() -> None:
    """Check that a private manager could run here.

    Raises:
        AccessDenied: We are not root.
        Unavailable: A package is missing.
    """
    if os.geteuid() != 0:
        raise AccessDenied(
            "A private systemd manager needs root for its mount namespace and its cgroup.",
            hint="run it as root, with sudo for example",
        )
    if missing := missing_packages():
        raise Unavailable(
            f"A private systemd manager needs what is not installed: {', '.join(missing)}.",
            hint=f"apt install {' '.join(missing)}",
        )
