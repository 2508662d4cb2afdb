"""Situations of sockets, made in units by payload.py, and what sdtool says of them."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sdtool.sandbox import Sandbox
from tests.system.bench import SCOPE, Client, flag_of

PAYLOAD = Path(__file__).with_name("payload.py")
CROWD = Path(__file__).parents[1] / "bench" / "crowd.py"

Row = dict[str, Any]

# The machine sees the containers' ports where all namespaces are merged: it has its own numbers,
# and those from 18900 on are for tests/container.
_NUMBERS = itertools.cycle(range(18550, 18900) if SCOPE else range(18100, 18550))


def find_port() -> int:
    """Find a port that no test has used before, and that nothing blocks."""
    return next(number for number in _NUMBERS if _is_free(number))


def _is_free(port: int) -> bool:
    with ExitStack() as stack:
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = stack.enter_context(socket.socket(family))
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(("", port))
            except OSError:
                return False
    return True


class Situations:
    """Makes units with the payload, on one manager, and removes them at the end."""

    def __init__(self, manager: Sandbox, directory: Path, *, payload: str = str(PAYLOAD)) -> None:
        self.manager = manager
        self.flag = flag_of(manager)
        self.scope = str(manager.scope)
        self.is_root = os.geteuid() == 0
        self.directory = directory
        self._payload = payload
        self._stack = ExitStack()

    def close(self) -> None:
        """Undo what stopping the sdtool-* units does not."""
        self._stack.close()

    def run(self, *command: str) -> str:
        """Run a command that must not fail, where the manager is."""
        done = self.manager.run(command)
        assert 0 == done.returncode, f"{command}: {done.stderr}"
        return done.stdout

    def systemctl(self, *arguments: str) -> str:
        """Ask the manager something that must not fail."""
        return self.run("systemctl", self.flag, *arguments)

    def argv(self, *steps: str) -> list[str]:
        """The command line of the payload."""
        return ["/usr/bin/python3", "-B", self._payload, *steps]

    def start(self, name: str, *steps: str, properties: Sequence[str] = ()) -> str:
        """Start a service that makes these steps; it is ready when this returns.

        Returns:
            The unit's name.
        """
        unit = f"sdtool-t-{name}.service" if "." not in name else name
        settings = [f"--property={setting}" for setting in ("NotifyAccess=all", *properties)]
        run = ["systemd-run", self.flag, "--quiet", f"--unit={unit}", "--service-type=notify"]
        self.run(*run, *settings, *self.argv(*steps))
        return unit

    def start_scope(self, name: str, *steps: str, below: str = "") -> str:
        """Start a scope with the payload in it, below a slice; it is ready when this returns."""
        slices = [f"--slice={below}"] if below else []
        run = ["systemd-run", self.flag, "--quiet", "--scope", f"--unit={name}", *slices]
        self._stack.callback(self.manager.run, ["systemctl", self.flag, "stop", name])
        self.run(*run, *self.argv("daemon", *steps))
        return name

    def start_socket(self, name: str, *settings: str, steps: Sequence[str] = ()) -> str:
        """Start a .socket unit; its service, not started, makes these steps.

        Args:
            settings: Lines of the section [Socket]; with Accept=yes the service is a template.
        """
        socket_unit = f"sdtool-t-{name}.socket"
        instance = "@" if "Accept=yes" in settings else ""
        service = f"sdtool-t-{name}{instance}.service"
        words = " ".join(f'"{word}"' for word in self.argv(*steps))
        self.link(
            {
                socket_unit: "[Socket]\n" + "\n".join(settings) + "\n",
                service: f"[Service]\nType=notify\nNotifyAccess=all\nExecStart={words}\n",
            }
        )
        self._stack.callback(
            self.manager.run, ["systemctl", self.flag, "stop", f"sdtool-t-{name}*"]
        )
        self.systemctl("start", socket_unit)
        return socket_unit

    def link(self, files: Mapping[str, str]) -> None:
        """Have unit files that the manager finds, until the test ends."""
        for name, text in files.items():
            (self.directory / name).write_text(text)
        disable = ["systemctl", self.flag, "disable", "--runtime", *files]
        self._stack.callback(self.manager.run, disable)
        self.systemctl("link", "--runtime", *(str(self.directory / name) for name in files))

    def empty_store(self, unit: str) -> None:
        """Have the fd store of a unit emptied when the test ends, though it is preserved."""
        clean = ["systemctl", self.flag, "clean", "--what=fdstore", unit]
        self._stack.callback(self.manager.run, clean)

    def crowd(self, sockets: int, processes: int) -> str:
        """Have many sockets of many processes in a namespace of their own, until the test ends.

        Returns:
            The name of the unit that they are in.
        """
        unit = "sdtool-t-crowd.service"
        run = ["systemd-run", self.flag, "--quiet", "--pipe", f"--unit={unit}", "--collect"]
        run += ["--property=PrivateNetwork=yes", "--property=TasksMax=infinity"]
        pipe = subprocess.PIPE
        crowd = ["/usr/bin/python3", "-I", "-S", str(CROWD), str(sockets), str(processes)]
        process = subprocess.Popen(
            self.manager.argv([*run, *crowd]), stdin=pipe, stdout=pipe, text=True
        )
        # The end of its standard input is its end.
        self._stack.callback(process.communicate, timeout=60)
        assert process.stdout is not None
        assert "ready\n" == process.stdout.readline()
        return unit

    def refer(self, unit: str) -> None:
        """Keep the manager from forgetting a unit that is not active any more."""
        run = ["systemd-run", self.flag, "--quiet", "--unit=sdtool-t-witness"]
        self.run(*run, f"--property=After={unit}", "sleep", "infinity")

    def ask_from(self, *question: str, properties: Sequence[str]) -> list[Row]:
        """What sdtool answers when it runs in a unit with these properties."""
        settings = [f"--property={setting}" for setting in properties]
        settings += ["--same-dir", f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}"]
        run = ["systemd-run", self.flag, "--quiet", "--pipe", "--wait", "--collect", *settings]
        command = [sys.executable, "-m", "sdtool", *question, "--json", self.flag]
        done = self.manager.run([*run, "--unit=sdtool-t-asks", *command])
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return data(done)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "-P", name, unit).strip()

    def main_pid(self, unit: str) -> int:
        """The main process of a service."""
        return int(self.show(unit, "MainPID"))

    def systemd(self) -> int:
        """The manager's version."""
        return int(self.run("systemctl", "--version").split()[1])

    def add_namespace(self, name: str) -> str:
        """Make a network namespace with a name; its path."""
        self.run("ip", "netns", "add", name)
        self._stack.callback(self.manager.run, ["ip", "netns", "delete", name])
        return f"/run/netns/{name}"

    def add_nameless_namespace(self) -> str:
        """Make a network namespace that is mounted where nobody looks for names; its path."""
        path = self.directory / "namespace"
        path.touch()
        self._stack.callback(self.manager.run, ["umount", str(path)])
        self.run("unshare", f"--net={path}", "true")
        return str(path)

    def namespace_of(self, path: str) -> int:
        """The number of a network namespace, by a path to it."""
        return int(self.run("stat", "--dereference", "--format=%i", path))


def namespace(pid: int | str = "self") -> int:
    """The number of a process's network namespace."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def data(done: subprocess.CompletedProcess[str]) -> list[Row]:
    """What an envelope on stdout answers."""
    return list(json.loads(done.stdout)["data"])


def ask(sdtool: Client, port: int | str, *more: str) -> Row:
    """What ``port`` says of one port: the only entry."""
    (entry,) = data(sdtool("port", str(port), *more, "--json"))
    return dict(entry)


def owners(entry: Row) -> list[tuple[str | None, str]]:
    """The unit and the door of each owner, sorted."""
    return sorted(((o["unit"], o["via"]) for o in entry["owners"]), key=str)


def holders(entry: Row) -> set[int]:
    """The processes that hold an entry's sockets."""
    return {holder["pid"] for owner in entry["owners"] for holder in owner["holders"]}


def sockets_of(rows: Sequence[Row], unit: str) -> list[Row]:
    """The sockets of a unit in the rows of ``ports``."""
    return [row["socket"] for row in rows if row["unit"] == unit]


def inodes(*pids: int) -> set[int]:
    """The inodes of all sockets that processes hold, by /proc."""
    return {
        int(link.removeprefix("socket:[").rstrip("]"))
        for pid in pids
        for link in _links(Path(f"/proc/{pid}/fd"))
        if link.startswith("socket:[")
    }


def unreadable() -> set[int]:
    """The processes whose descriptors we may not see, by trying it with each."""
    processes = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid for pid in processes if not _is_readable(pid)}


def _is_readable(pid: int) -> bool:
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                descriptor.readlink()
    except PermissionError:
        return False
    except (FileNotFoundError, ProcessLookupError):
        pass  # it is gone
    return True


def _links(descriptors: Path) -> Iterator[str]:
    for descriptor in descriptors.iterdir():
        try:
            yield str(descriptor.readlink())
        except OSError:
            continue
