"""The root file systems of containers: a minimal Debian with systemd, made once by mmdebstrap(1).

Each is kept in the cache under its suite and a key of everything it is made from, and is never
booted itself: a container writes to a layer of its own above it. Beside them are kept sdtool's
dependencies for the suite's Python, installed by uv(1), which resolves for another Python than
the one that runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sdtool.errors import InvalidArgument, Unavailable
from sdtool.sandbox import cache
from sdtool.sandbox.guardian import DIES_WITH_US
from sdtool.sandbox.requirements import find_uv, require_container, require_root_for_container

Progress = Callable[[str], None]
"""Called with a sentence before something that takes long."""

SUITES = ("bookworm", "trixie", "sid")
"""Debian's suites that a container can be of, with systemd 252, 257 and the newest."""

TESTER = "tester"
"""The ordinary user in every container; its password is its name, and root's is "root"."""

TESTER_UID = 1000

_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "dbus-broker",
    "dbus-user-session",
    "libpam-systemd",
    "polkitd",
    "python3",
    "iproute2",
    "procps",
)

# What only a real machine needs, would reach for the network, or makes the boot slow.
_MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "remote-fs.target",
    "sys-fs-fuse-connections.mount",
    "systemd-firstboot.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-pstore.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-update-utmp.service",
)

# Both message buses are there; dbus-daemon is the one in use until its link is put back.
_CUSTOMISE = f"""
set -eu
cd "$1"
for unit in {" ".join(_MASKED)}; do ln -sf /dev/null "etc/systemd/system/$unit"; done
ln -sf /lib/systemd/system/multi-user.target etc/systemd/system/default.target
rm -f etc/systemd/system/dbus.service etc/systemd/user/dbus.service
rm -f etc/systemd/user/sockets.target.wants/* etc/resolv.conf etc/hostname etc/machine-id
: > etc/fstab
mkdir -p etc/systemd/journald.conf.d
cat > etc/systemd/journald.conf.d/sdtool.conf << END
[Journal]
Storage=volatile
RateLimitBurst=0
END
chroot . useradd --uid {TESTER_UID} --create-home --shell /bin/bash {TESTER}
printf 'root:root\\n{TESTER}:{TESTER}\\n' | chroot . chpasswd
"""

_OPTIONS = (
    "--variant=minbase",
    f"--include={','.join(_PACKAGES)}",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    f"--customize-hook={_CUSTOMISE}",
)

# An archive that was frozen some time ago is as good as a fresh one here.
_SID_OPTIONS = ('--aptopt=Acquire::Check-Valid-Until "false"',)

# A build that is killed takes its processes and mounts with it.
_ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--")

_ERROR_LINES = 3


def obtain_rootfs(suite: str, on_progress: Progress) -> Path:
    """Return the root directory of a suite, built if it is not in the cache; never to write in.

    Raises:
        AccessDenied: We are not root.
        InvalidArgument: There is no such suite.
        Unavailable: A package is missing, or the build failed.
    """
    if suite not in SUITES:
        hint = f"one of {', '.join(SUITES)}; -- goes before a command"
        raise InvalidArgument(f"{suite} is no suite.", hint=hint)
    require_root_for_container()
    options = [*_OPTIONS, *(_SID_OPTIONS if suite == "sid" else ())]
    name = f"{suite}-{_key(options)}"
    found = cache.find(name)
    require_container(build=found is None)
    if found is not None:
        return found
    on_progress(f"Building a root file system of {suite}, once; this takes about half a minute.")
    command = [*DIES_WITH_US, *_ISOLATED, "mmdebstrap", *options, suite]

    def build(path: Path) -> None:
        try:
            _run(
                "mmdebstrap", [*command, str(path)], env={**os.environ, "TMPDIR": str(path.parent)}
            )
        except Unavailable as error:
            hint = "it downloads from deb.debian.org, and needs about 600 MB of space"
            raise Unavailable(str(error), hint=hint) from error

    return cache.obtain(name, build)


def obtain_packages(rootfs: Path, extra: Sequence[str], on_progress: Progress) -> Path:
    """Return a directory with sdtool's dependencies for the Python of a root file system.

    Args:
        extra: More requirements, in pip's words.

    Raises:
        AccessDenied: We are not root.
        Unavailable: They are not in the cache, and uv is missing or failed.
    """
    version = _read_python_version(rootfs)
    requirements = sorted({*_own_requirements(), *extra})
    name = f"python{version}-{_key(requirements)}"
    found = cache.find(name)
    if found is not None:
        return found
    require_container(build=True)
    on_progress(f"Installing sdtool's dependencies for Python {version}, once.")
    command = [*DIES_WITH_US, find_uv() or "uv", "pip", "install", "--quiet"]
    command += ["--python-version", version]
    # Copies: a directory of the cache must not share files with uv's own.
    command += ["--python", sys.executable, "--link-mode=copy", "--target"]
    return cache.obtain(name, lambda path: _run("uv", [*command, str(path), *requirements]))


def _own_requirements() -> list[str]:
    """What sdtool itself requires, without its extras."""
    stated = importlib.metadata.requires("sdtool") or []
    return [requirement for requirement in stated if "extra ==" not in requirement]


def _read_python_version(rootfs: Path) -> str:
    """The version of a root file system's /usr/bin/python3, "3.13"."""
    return (rootfs / "usr/bin/python3").readlink().name.removeprefix("python")


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _run(program: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Run a build.

    Args:
        env: Its environment, our own by default.

    Raises:
        Unavailable: It failed; the message ends with its last lines.
    """
    done = subprocess.run(
        command,
        env=env,
        umask=0o022,  # other users than the maker's are to read it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(("E:", "Err:", "error:"))] or lines
        raise Unavailable(f"{program} failed: {'; '.join(said[-_ERROR_LINES:]) or 'wordless'}.")
