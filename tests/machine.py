"""What the tests ask of the machine itself: processes, what a sandbox has left, a condition."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def read(file: Path) -> str:
    """Read a file of /proc, "" when its process is gone."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1] not in {"", "Z", "X"}


def children(pid: int) -> list[int]:
    """The children of a process's main thread."""
    return [int(child) for child in read(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def processes_of(name: str, *, zombies: bool = False) -> list[str]:
    """List the processes that are in a sandbox's cgroups or see its mounts.

    Zombies count where the guardian could reap them; orphans of an owner that died are for the
    machine's init, which may take its time.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        mentions = name in read(process / "cgroup") + read(process / "mountinfo")
        if mentions and (zombies or is_alive(int(process.name))):
            found.append(read(process / "stat"))
    return found


def traces(name: str, *, zombies: bool = False) -> list[str]:
    """List all that is left of a sandbox: cgroups of any hierarchy, processes, sockets, files."""
    found = [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(name)]
    found += processes_of(name, zombies=zombies)
    if name in read(Path("/proc/net/unix")):
        found.append("/proc/net/unix")
    for directory in ("/run/systemd/nspawn", "/run/systemd/machines", "/var/lib/machines"):
        found += [str(path) for path in Path(directory).glob(f"*{name}*")]
    return found


def eventually(condition: Callable[[], object], *, timeout: float = 10.0) -> None:
    """Wait until a condition holds; fail when it does not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def end_demo_units(run: Callable[[list[str]], object], manager: str) -> None:
    """Stop the demo units by force, left-over processes too, and forget their failures.

    Args:
        run: Runs a command where the manager is.
        manager: "--user" or "--system".
    """
    for verb in (["stop", "--no-block"], ["kill", "--signal=KILL"], ["stop"], ["reset-failed"]):
        # --all: a unit that is inactive may have left processes behind.
        run(["systemctl", manager, *verb, "--all", "sdtool-*"])


def read_line(terminal: int) -> str:
    """The next line of a terminal, which may come in pieces."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(terminal, 64)
    return line.decode().replace("\r", "")
