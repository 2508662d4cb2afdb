"""The sandboxes boot, serve, and leave nothing behind however they end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtool.errors import Unavailable
from sdtool.sandbox import PrivateManager, log, units_directory
from sdtool.sandbox.cgroup import destroy, read_hierarchy, sweep
from sdtool.sandbox.journal import parse_record
from tests.machine import eventually, is_alive, read, traces

# A process that owns a sandbox and says what is in it; killing it is the tests' business.
OWNER = """
import json, subprocess, sys
from sdtool.sandbox import PrivateManager
manager = PrivateManager().start()
units = ["sdtool-ignores-term", "sdtool-forks", "sdtool-leaves-child"]
assert manager.run(["systemctl", "--user", "start", *units]).returncode == 0
manager.run(["systemctl", "--user", "stop", "sdtool-leaves-child"])
daemon = "trap '' TERM HUP; setsid sleep 600 & echo up; exec sleep 600"
command = subprocess.Popen(manager.argv(["sh", "-c", daemon]), stdout=subprocess.PIPE)
command.stdout.readline()
guardian = manager._guardian.pid
print(json.dumps([manager.control_group.split("/")[1], guardian]), flush=True)
sys.stdin.read()
manager.stop()
print("stopped", flush=True)
"""


class Owner:
    """A sandbox owned by another process, which runs ``code``."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.name, self.guardian = json.loads(self.process.stdout.readline())

    def end(self, number: int) -> None:
        """Send the owner a signal and wait for its death."""
        self.process.send_signal(number)
        self.close()

    def close(self) -> str:
        """Close its standard input, which ends it, and return what it said last."""
        return self.process.communicate(timeout=30)[0]


# An owner with a unit that has said more than is kept, and goes on.
CHATTY = """
import json, sys, time
from sdtool.sandbox import PrivateManager
manager = PrivateManager().start()
manager.run(["systemd-run", "--user", "yes"])
while "bytes of the log are left out" not in manager.log_text():
    time.sleep(0.01)
print(json.dumps([manager.control_group.split("/")[1], manager._guardian.pid]), flush=True)
sys.stdin.read()
manager.stop()
print("stopped", flush=True)
"""


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    """An owner with units and a command running, all kinds of stubborn ones among them."""
    owner = Owner(getattr(request, "param", OWNER))
    yield owner
    owner.process.kill()
    owner.process.communicate()
    eventually(lambda: traces(owner.name) == [])


def test_destroy_needs_no_cgroup_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an old kernel processes are killed one by one, even while they fork."""
    tree = read_hierarchy() / f"sdtool-test-{os.getpid()}"

    def write(file: Path, text: str) -> None:
        raise FileNotFoundError(file)

    forks = "for i in 1 2 3 4 5 6 7 8; do for j in 1 2 3 4 5 6 7 8; do sleep 20 & done; done; wait"
    script = f"echo 0 > {tree}/cgroup.procs; echo up; {forks}"
    tree.mkdir()
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert b"up\n" == parent.stdout.readline()
        monkeypatch.setattr("sdtool.sandbox.cgroup.write", write)
        assert destroy(tree, timeout=20)


def test_record_has_text_and_binary_fields() -> None:
    """A value with a newline in it comes with its length; what is cut off does no harm."""
    record = b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\nPRIORITY=6\nSYSLOG_IDENTIFIER=systemd\n"
    expected = {"MESSAGE": "a\nb", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "systemd"}
    assert expected == parse_record(record)
    assert {"A": "x", "B": "y"} == parse_record(b"A=x\nB\n\x09\0\0\0\0\0\0\0y")


def test_private_manager_boots_and_leaves_nothing() -> None:
    """While it runs nothing shows outside but processes and a cgroup; afterwards nothing."""
    mounts = Path("/proc/self/mountinfo").read_text()
    manager = PrivateManager()
    with manager:
        name = manager.control_group.split("/")[1]
        comm = Path(f"/proc/{manager.pid}/comm").read_text()
        running = manager.run(["systemctl", "--user", "is-system-running"])
        owner = manager.run(["busctl", "--user", "status", "org.freedesktop.systemd1"])
        assert mounts == Path("/proc/self/mountinfo").read_text()
        manager.run(["systemctl", "--user", "start", "sdtool-ignores-term"])
    assert ("systemd\n", "running\n") == (comm, running.stdout)
    assert 0 == owner.returncode
    assert mounts == Path("/proc/self/mountinfo").read_text()
    assert [] == traces(name, zombies=True)


def test_private_manager_runs_in_the_callers_namespaces(manager: PrivateManager) -> None:
    """Only the mount namespace is its own, so that every observer sees its processes."""
    kinds = [
        kind.name
        for kind in Path("/proc/self/ns").iterdir()
        if kind.readlink() != Path(f"/proc/{manager.pid}/ns/{kind.name}").readlink()
    ]
    assert ["mnt"] == kinds


def test_control_group_is_what_the_manager_says(manager: PrivateManager) -> None:
    """The manager's own property is the oracle."""
    answer = manager.run(["systemctl", "--user", "show", "--value", "--property=ControlGroup"])
    assert f"{manager.control_group}\n" == answer.stdout


def test_sandbox_itself_holds_no_process(manager: PrivateManager) -> None:
    """A cgroup with processes of its own could not hand controllers to its children."""
    directory = read_hierarchy() / manager.control_group.split("/")[1]
    assert "" == (directory / "cgroup.procs").read_text()
    controllers = (directory / "cgroup.controllers").read_text().split()
    assert set(controllers) == set((directory / "cgroup.subtree_control").read_text().split())


def test_run_tells_what_the_command_did(manager: PrivateManager, tmp_path: Path) -> None:
    """Output, standard input, exit status and working directory are the command's own."""
    script = "cat; pwd; echo $0 >&2; exit 7"
    previous = Path.cwd()
    os.chdir(tmp_path)
    try:
        done = manager.run(["sh", "-c", script, "A=b c"], text="hello\n")
    finally:
        os.chdir(previous)
    expected = (7, f"hello\n{tmp_path}\n", "A=b c\n")
    assert expected == (done.returncode, done.stdout, done.stderr)


def test_run_joins_the_sandbox(manager: PrivateManager) -> None:
    """A command is in the sandbox's cgroup from its first instruction."""
    membership = manager.run(["cat", "/proc/self/cgroup"]).stdout.splitlines()
    client = str(Path(manager.control_group).parent / "client")
    assert [f"0::{client}"] == [line for line in membership if line.startswith("0::")]


def test_nothing_reaches_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Masks, links and persistent properties stay inside, and so do the payloads' traces."""
    monkeypatch.setenv("HOME", str(tmp_path))
    before = sorted(units_directory().rglob("*"))
    with PrivateManager() as manager:
        unit = f"{manager.environment['XDG_RUNTIME_DIR']}/sdtool-linked.service"
        manager.run(
            ["tee", unit], text="[Service]\nExecStart=true\n[Install]\nWantedBy=a.target\n"
        )
        done = [
            manager.run(["systemctl", "--user", *arguments]).returncode
            for arguments in (
                ["enable", unit],
                ["mask", "sdtool-slow.service"],
                ["set-property", "sdtool-graceful.service", "CPUWeight=50"],
                ["start", "sdtool-graceful.service"],
            )
        ]
    assert [0, 0, 0, 0] == done
    assert ([], before) == (list(tmp_path.rglob("*")), sorted(units_directory().rglob("*")))


def test_units_of_the_machines_users_do_not_start(tmp_path: Path) -> None:
    """What is enabled in /etc/systemd/user is hidden from the sandbox."""
    with PrivateManager() as manager:
        listing = manager.run(["sh", "-c", "ls -A /etc/systemd/user 2> /dev/null"])
    assert "" == listing.stdout


def test_log_text_has_what_manager_and_units_say() -> None:
    """It can be read while the manager runs and afterwards."""
    with PrivateManager() as manager:
        eventually(lambda: "systemd: Startup finished" in manager.log_text())
        manager.run(["systemd-run", "--user", "--wait", "sh", "-c", "echo out; printf err >&2"])
        eventually(lambda: "\nsh: err\n" in manager.log_text())
    assert "sh: out\n" in manager.log_text()


def test_log_keeps_the_beginning_and_the_end() -> None:
    """What lies between is left out in whole lines, counted, and takes no memory."""
    with PrivateManager() as manager:
        manager.run(["systemd-run", "--user", "--wait", "seq", "1000000"])
        eventually(lambda: "\nseq: 1000000\n" in manager.log_text())
        assert manager._log_fd is not None
        file, text = os.fstat(manager._log_fd), manager.log_text()
    lines = text.splitlines()
    (note,) = [line for line in lines if line.startswith("sdtool: ")]
    numbers = [int(line[5:]) for line in lines if line.startswith("seq: ")]
    dropped = file.st_size - len(text) + len(f"{note}\n")
    assert f"sdtool: {dropped} bytes of the log are left out here" == note
    assert (1, 1000000) == (numbers[0], numbers[-1])
    assert [] == [line for line in lines if not line.startswith(("seq: ", "systemd", "sdtool: "))]
    assert file.st_size > 2 * (log.HEAD + log.TAIL) > file.st_blocks * 512 - (1 << 20)


def test_log_breaks_endless_lines() -> None:
    """A unit that never ends its line does not fill the guardian's memory."""
    with PrivateManager() as manager:
        script = "head -c 300000 /dev/zero | tr '\\0' '~'"
        manager.run(["systemd-run", "--user", "--wait", "sh", "-c", script])
    pieces = [line for line in manager.log_text().splitlines() if line.startswith("sh: ~")]
    assert 300000 == sum(piece.count("~") for piece in pieces)
    assert max(map(len, pieces)) < 150000


def test_stop_twice_is_harmless_and_start_again_works() -> None:
    """One object can own several sandboxes, one after the other."""
    manager = PrivateManager()
    manager.stop()
    with manager:
        first = manager.control_group
    manager.stop()
    assert (0, "") == (manager.pid, manager.control_group)
    with manager:
        assert first != manager.control_group
        assert 0 == manager.run(["true"]).returncode
    with pytest.raises(Unavailable):
        manager.run(["true"])


def test_two_managers_live_side_by_side(manager: PrivateManager) -> None:
    """A sweep takes the sandboxes of the dead, never those of the living."""
    with PrivateManager() as other:
        assert 0 == other.run(["systemctl", "--user", "is-system-running"]).returncode
    assert 0 == manager.run(["systemctl", "--user", "is-system-running"]).returncode


def test_owner_killed_leaves_nothing(owner: Owner) -> None:
    """After SIGKILL of the owner its guardian ends units, left-overs, daemons and commands."""
    assert [] != traces(owner.name)
    owner.end(signal.SIGKILL)
    eventually(lambda: traces(owner.name) == [])


@pytest.mark.parametrize("owner", [CHATTY], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_owner_of_a_chatty_unit_leaves_nothing(owner: Owner, number: int | None) -> None:
    """A unit that talks without a pause does not make the guardian deaf."""
    if number is None:
        assert "stopped\n" == owner.close()
    else:
        owner.end(number)
    eventually(lambda: traces(owner.name) == [])


@pytest.mark.parametrize("owner", [CHATTY], indirect=True)
def test_guardian_of_a_chatty_unit_hears_signals(owner: Owner) -> None:
    """Its SIGTERM too comes before what the unit says."""
    os.kill(owner.guardian, signal.SIGTERM)
    eventually(lambda: traces(owner.name) == [])


def test_owner_terminated_leaves_nothing(owner: Owner) -> None:
    """SIGTERM, which an owner may not handle, is no different."""
    owner.end(signal.SIGTERM)
    eventually(lambda: traces(owner.name) == [])


def test_guardian_terminated_leaves_nothing(owner: Owner) -> None:
    """The guardian cleans up when it is asked to end; its owner's stop has nothing to do."""
    os.kill(owner.guardian, signal.SIGTERM)
    eventually(lambda: not list(read_hierarchy().glob(owner.name)))
    assert ("stopped\n", []) == (owner.close(), traces(owner.name))


def test_guardian_ignores_what_a_terminal_sends(owner: Owner) -> None:
    """Ctrl-C and a hang-up are for the owner to answer."""
    os.kill(owner.guardian, signal.SIGINT)
    os.kill(owner.guardian, signal.SIGHUP)
    assert ("stopped\n", []) == (owner.close(), traces(owner.name))


def test_guardian_killed_is_noticed_by_the_owner(owner: Owner) -> None:
    """What the manager's death leaves of the sandbox goes before the owner is done."""
    os.kill(owner.guardian, signal.SIGKILL)
    eventually(lambda: traces(owner.name) == [])
    assert (True, "stopped\n") == (is_alive(owner.process.pid), owner.close())


def test_guardian_killed_is_cleaned_up_by_stop(owner: Owner) -> None:
    """The owner ends what its guardian could not."""
    os.kill(owner.guardian, signal.SIGKILL)
    assert ("stopped\n", []) == (owner.close(), traces(owner.name))


def test_guardian_and_owner_killed_are_swept_at_the_next_start(owner: Owner) -> None:
    """The manager dies with the guardian; the next sandbox takes away the rest."""
    owner.process.send_signal(signal.SIGSTOP)  # else it cleans up
    eventually(lambda: " T " in read(Path(f"/proc/{owner.process.pid}/stat")))
    os.kill(owner.guardian, signal.SIGKILL)
    owner.end(signal.SIGKILL)
    eventually(lambda: not is_alive(owner.guardian))
    assert [] != traces(owner.name)
    with PrivateManager():
        assert [] == traces(owner.name)


# A process of a cgroup that no SIGKILL ends: a debugger holds it on its way out, until our
# standard input closes. PTRACE_SEIZE with PTRACE_O_TRACEEXIT, see ptrace(2).
HOLD = """
import ctypes, os, signal, sys
child = os.fork()
if child == 0:
    open(sys.argv[1], "w").write("0")
    signal.pause()
while str(child) not in open(sys.argv[1]).read().split():
    os.sched_yield()
assert ctypes.CDLL(None).ptrace(0x4206, child, 0, 0x40) == 0
print(child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def undead() -> Iterator[tuple[Path, int]]:
    """The cgroup of a dead guardian's sandbox and the process in it that cannot be killed."""
    beyond_pid_max = (1 << 22) + os.getpid()
    name = f"sdtool-sandbox-{beyond_pid_max}-1-{Path('/proc/self/ns/pid').stat().st_ino}"
    tree = read_hierarchy() / name
    tree.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tree / "cgroup.procs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as debugger:
        assert debugger.stdout is not None
        yield tree, int(debugger.stdout.readline())
    destroy(tree, timeout=10)


def test_undead_sandbox_is_reported(
    undead: tuple[Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    """What the kernel cannot kill stays, and the log names it and its processes."""
    tree, pid = undead
    assert tree in sweep()
    assert f"The cgroup {tree} stays: its processes {pid} cannot be killed." in caplog.text


def test_undead_sandboxes_cost_little(undead: tuple[Path, int]) -> None:
    """A start gives them a moment, a stop leaves them to the next start."""
    tree, _ = undead
    begun = time.monotonic()
    sweep()
    swept = time.monotonic()
    with PrivateManager():
        pass
    assert tree.exists()
    assert (True, True) == (swept - begun < 2, time.monotonic() - swept < 5)


def test_guardian_stopped_does_not_stop_the_owner_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guardian that does not react is killed, and its work done by the owner."""
    monkeypatch.setattr("sdtool.sandbox.guarded._STOP_TIMEOUT", 0.5)
    with PrivateManager() as manager:
        name = manager.control_group.split("/")[1]
        assert manager._guardian is not None
        manager._guardian.send_signal(signal.SIGSTOP)
    assert [] == traces(name)


def test_manager_that_exits_is_cleaned_up_at_once() -> None:
    """``systemctl exit`` inside ends the sandbox, and a command is refused."""
    with PrivateManager() as manager:
        name = manager.control_group.split("/")[1]
        manager.run(["systemctl", "--user", "exit"])
        eventually(lambda: traces(name) == [])
        assert 0 != manager.run(["true"]).returncode


def in_mount_namespace(setup: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python after a shell has changed the mounts of a namespace of its own."""
    script = f'set -e; {setup}; exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


START = """
import json
from sdtool.errors import SdtoolError
from sdtool.sandbox import PrivateManager
try:
    PrivateManager().start(timeout=5).stop()
except SdtoolError as error:
    print(json.dumps([error.code, str(error), error.hint]))
"""


def test_missing_packages_are_named() -> None:
    """The hint installs just what is missing."""
    setup = "cd /usr/lib/systemd/user; mount -t tmpfs none /usr/lib/systemd/user"
    code, message, hint = json.loads(in_mount_namespace(setup, START).stdout)
    assert ("Unavailable", "apt install dbus-user-session") == (code, hint)
    assert "dbus-user-session" in message


def test_manager_that_does_not_come_up_says_why() -> None:
    """The message names the status and ends with the log."""
    systemd = Path("/usr/lib/systemd/systemd")
    script = "#!/bin/sh\\necho no such luck >&2; exit 9\\n"
    setup = f"mount -t tmpfs none /mnt; printf '{script}' > /mnt/sh; chmod +x /mnt/sh"
    setup += f"; mount --bind /mnt/sh {systemd}"
    code, message, _ = json.loads(in_mount_namespace(setup, START).stdout)
    reason = "the manager ended with status 9 (log: no such luck)"
    expected = f"The private manager did not come up: {reason}."
    assert ("Unavailable", expected) == (code, message)


def test_manager_that_is_not_ready_in_time_is_ended() -> None:
    """The time a start may take is bounded, and nothing of it stays."""
    setup = "mount -t tmpfs none /mnt; printf '#!/bin/sh\\nexec sleep 600\\n' > /mnt/sh"
    setup += "; chmod +x /mnt/sh; mount --bind /mnt/sh /usr/lib/systemd/systemd"
    done = in_mount_namespace(setup, START.replace("timeout=5", "timeout=1"))
    code, message, _ = json.loads(done.stdout)
    expected = "The private manager did not come up: it was not ready in time."
    assert ("Unavailable", expected) == (code, message)


def test_read_only_cgroups_are_a_denial() -> None:
    """In an unprivileged container the error names the cgroup and the way out."""
    mount = read_hierarchy()
    done = in_mount_namespace(f"mount -o remount,bind,ro {mount}", START)
    code, message, hint = json.loads(done.stdout)
    assert ("AccessDenied", True) == (code, "Read-only file system" in message)
    assert "privileged" in hint


@pytest.mark.parametrize("start", ["PrivateManager(units=Path('/')).start()", "find_manager()"])
def test_ordinary_users_are_told_to_be_root(start: str) -> None:
    """Without root and without a user manager there is nothing to offer."""
    code = f"""
import json, os
from pathlib import Path
from sdtool.errors import AccessDenied
from sdtool.sandbox import PrivateManager, find_manager
os.environ.pop("XDG_RUNTIME_DIR", None)
os.setgid(65534), os.setuid(65534)
try:
    {start}
except AccessDenied as error:
    print(json.dumps([str(error), error.hint]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, hint = json.loads(done.stdout)
    assert (True, True) == ("root" in message, "as root" in hint)


# What a guest leaves in its host: files, units, processes.
INVENTORY = """
cd "$XDG_RUNTIME_DIR"; find . -name '*sdtool*' ! -path './sdtool-home*' | sort
systemctl --user list-units --all --plain --no-legend '*sdtool*'
systemctl --user list-unit-files --no-legend '*sdtool*'
find /sys/fs/cgroup$1 -name '*sdtool*.s*'
"""

BORROW = """
import subprocess, sys
from sdtool.errors import SdtoolError
from sdtool.sandbox import find_manager
manager = find_manager()
print(type(manager).__name__)
try:
    manager.start()
except SdtoolError as error:
    sys.exit(f"{error.code} {error.subject} {error}")
try:
    units = ["sdtool-ignores-term", "sdtool-leaves-child", "sdtool-template@one"]
    units += ["sdtool-exec-stop-hangs", "sdtool-activated.socket"]
    assert manager.run(["systemctl", "--user", "start", *units]).returncode == 0
    manager.run(["systemctl", "--user", "start", "sdtool-crash-loop"])
    manager.run(["systemctl", "--user", "stop", "sdtool-leaves-child"])
    print("up", flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted")
finally:
    manager.stop()
print("down")
"""


def test_units_may_be_anywhere(tmp_path: Path) -> None:
    """A colon in their path separates nothing, as it would in systemd's own variable."""
    units = tmp_path / "a:b"
    units.mkdir()
    (units / "there.service").write_text("[Service]\nExecStart=/bin/true\n")
    with PrivateManager(units=units) as manager:
        assert 0 == manager.run(["systemctl", "--user", "start", "there.service"]).returncode


@pytest.fixture
def host(tmp_path: Path) -> Iterator[PrivateManager]:
    """A user manager that knows nothing of the demo units: one to borrow."""
    with PrivateManager(units=tmp_path) as manager:
        manager.run(["sh", "-c", 'rm "$XDG_RUNTIME_DIR/sdtool-units"'])
        yield manager


def inventory(host: PrivateManager) -> list[str]:
    """List what there is of the demo in a host."""
    return host.run(["sh", "-c", INVENTORY, "sh", host.control_group]).stdout.splitlines()


def borrow(host: PrivateManager) -> subprocess.Popen[str]:
    """Start a guest in the host, and wait until its units run or it has failed."""
    guest = subprocess.Popen(
        host.argv([sys.executable, "-c", BORROW]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert guest.stdout is not None
    assert "BorrowedManager\n" == guest.stdout.readline()
    return guest


@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_borrowed_manager_removes_everything(host: PrivateManager, number: int | None) -> None:
    """Units, links, failures, left-over processes and slices go, after a Ctrl-C too."""
    before = inventory(host)
    guest = borrow(host)
    assert guest.stdout is not None
    assert "up\n" == guest.stdout.readline()
    assert len(before) < len(inventory(host))
    if number is not None:
        guest.send_signal(number)
    said, errors = guest.communicate(timeout=30)
    expected = "down\n" if number is None else "interrupted\ndown\n"
    assert (expected, "", 0) == (said, errors, guest.returncode)
    assert before == inventory(host)


def test_borrowed_manager_removes_what_a_killed_one_left(host: PrivateManager) -> None:
    """The next demo finds the last one's units by their links and starts afresh."""
    before = inventory(host)
    killed = borrow(host)
    assert killed.stdout is not None
    assert "up\n" == killed.stdout.readline()
    killed.kill()
    killed.communicate()
    assert before != inventory(host)
    guest = borrow(host)
    assert guest.stdout is not None
    assert "up\n" == guest.stdout.readline()
    assert ("down\n", "") == guest.communicate(timeout=30)
    assert before == inventory(host)


def test_sandbox_is_not_borrowed(manager: PrivateManager) -> None:
    """A sandbox that has the demo units already offers a new one inside it."""
    code = "from sdtool.sandbox import find_manager\nwith find_manager() as it: print(it.pid)"
    done = manager.run([sys.executable, "-c", code])
    assert (0, True, "") == (done.returncode, int(done.stdout) != manager.pid, done.stderr)


def test_borrowed_manager_refuses_a_second_demo(host: PrivateManager) -> None:
    """Two demos would stop each other's units."""
    first = borrow(host)
    assert first.stdout is not None
    assert "up\n" == first.stdout.readline()
    second = borrow(host)
    assert "Another sdtool demo" in second.communicate(timeout=30)[1]
    assert "down\n" == first.communicate(timeout=30)[0]


def test_borrowed_manager_leaves_strangers_alone(host: PrivateManager) -> None:
    """A unit of the same name that is the user's own is refused, and goes on running."""
    unit = "[Service]\nExecStart=sleep 600\n"
    script = (
        'd="$XDG_CONFIG_HOME/systemd/user"; mkdir -p "$d"; cat > "$d/sdtool-slow.service";'
        "systemctl --user daemon-reload; systemctl --user start sdtool-slow"
    )
    host.run(["sh", "-c", script], text=unit)
    before = inventory(host)
    guest = borrow(host)
    _, errors = guest.communicate(timeout=30)
    assert errors.startswith("NotConfigured sdtool-slow.service ")
    active = host.run(["systemctl", "--user", "is-active", "sdtool-slow"])
    assert (before, "active\n") == (inventory(host), active.stdout)


def test_more_speakers_than_descriptors_do_not_end_a_sandbox() -> None:
    """Each unit has a connection to the journal: those beyond the limit wait for their turn."""
    unit = "systemd-run --user --quiet sh -c 'echo I am $$0; sleep 1' $i"
    with PrivateManager() as manager:
        assert manager._guardian is not None
        resource.prlimit(manager._guardian.pid, resource.RLIMIT_NOFILE, (30, 30))
        manager.run(["sh", "-c", f"for i in $(seq 30); do {unit}; done"])
        eventually(lambda: manager.log_text().count("\nsh: I am") == 30)
