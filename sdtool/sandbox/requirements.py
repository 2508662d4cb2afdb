"""What a sandbox needs of the machine: root and a handful of programs.

Programs are looked for, packages are named: the hint is a command that Debian's users can
paste. Whether the kernel lets us make namespaces and cgroups shows only when they are made.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sdtool.errors import AccessDenied, Unavailable

_LIBRARY = ("/usr/lib/systemd", "/lib/systemd")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def find_systemd() -> str | None:
    """Find systemd's own executable, which is never on PATH."""
    return _first(f"{directory}/systemd" for directory in _LIBRARY)


def find_uv() -> str | None:
    """Find uv(1): beside our Python, where pip installs it, or on PATH."""
    return _first([str(Path(sys.executable).with_name("uv"))]) or shutil.which("uv")


def _first(paths: Iterable[str]) -> str | None:
    return next((path for path in paths if Path(path).exists()), None)


def _has_bus() -> bool:
    return bool(shutil.which("dbus-daemon") or shutil.which("dbus-broker"))


def _has_user_bus() -> bool:
    return _first(f"{directory}/user/dbus.socket" for directory in _LIBRARY) is not None


def _has_namespace_tools() -> bool:
    return all(map(shutil.which, ("nsenter", "setpriv", "unshare")))


Packages = Mapping[str, Callable[[], bool]]

_PRIVATE: Packages = {
    "systemd": lambda: find_systemd() is not None and shutil.which("busctl") is not None,
    "dbus": _has_bus,
    "dbus-user-session": _has_user_bus,
    "util-linux": _has_namespace_tools,
    "python3": lambda: Path("/usr/bin/python3").exists(),  # the payloads' interpreter
}

_CONTAINER: Packages = {
    "systemd-container": lambda: shutil.which("systemd-nspawn") is not None,
    "util-linux": _has_namespace_tools,
}

_BUILD: Packages = {
    "mmdebstrap": lambda: shutil.which("mmdebstrap") is not None,
    "debian-archive-keyring": lambda: Path(_KEYRING).exists(),
}


def missing_packages(packages: Packages) -> tuple[str, ...]:
    """Name the Debian packages whose programs are not here, none when all is well."""
    return tuple(package for package, is_here in packages.items() if not is_here())


def require_private() -> None:
    """Check that a private manager could run here.

    Raises:
        AccessDenied: We are not root.
        Unavailable: A package is missing.
    """
    _require_root("A private systemd manager needs root for its mount namespace and its cgroup.")
    _require("A private systemd manager", _PRIVATE)


def require_container(*, build: bool) -> None:
    """Check that a container could run here.

    Args:
        build: Its root file system or its Python packages have to be made first.

    Raises:
        AccessDenied: We are not root.
        Unavailable: A package is missing; all that are missing are named at once.
    """
    require_root_for_container()
    pip = ("uv",) if build and find_uv() is None else ()
    _require("A container", {**_CONTAINER, **_BUILD} if build else _CONTAINER, pip)


def require_root_for_container() -> None:
    """Check that we are root.

    Raises:
        AccessDenied: We are not.
    """
    _require_root("A container needs root for its namespaces and its cgroup.")


def _require_root(sentence: str) -> None:
    if os.geteuid() != 0:
        raise AccessDenied(sentence, hint="run it as root, with sudo for example")


def _require(what: str, packages: Packages, pip: tuple[str, ...] = ()) -> None:
    apt = missing_packages(packages)
    if apt or pip:
        commands = [
            f"{tool} install {' '.join(names)}"
            for tool, names in (("apt", apt), ("pip", pip))
            if names
        ]
        raise Unavailable(
            f"{what} needs what is not installed: {', '.join((*apt, *pip))}.",
            hint=" && ".join(commands),
        )
