"""The container boots, serves, and leaves nothing behind, whatever of its chain is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtool.errors import Unavailable
from sdtool.sandbox import Container, cache
from sdtool.sandbox.rootfs import TESTER
from tests.container.conftest import Boot
from tests.container.system import System
from tests.machine import children, eventually, processes_of, read, traces

# A process that owns a container, with stubborn units and a command running in it.
OWNER = """
import json, subprocess, sys
from sdtool.sandbox import Container
container = Container(sys.argv[1]).start()
assert container.run(["systemctl", "start", "sdtool-ignores-term"]).returncode == 0
daemon = "trap '' TERM HUP; setsid sleep 600 & echo up; exec sleep 600"
command = subprocess.Popen(container.argv(["sh", "-c", daemon]), stdout=subprocess.PIPE)
command.stdout.readline()
name = container.control_group.split("/")[-3]
print(json.dumps([name, container._guardian.pid, container.pid]), flush=True)
sys.stdin.read()
container.stop()
print("stopped", flush=True)
"""


class Owner:
    """A container owned by another process."""

    def __init__(self, suite: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, suite],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.name, self.guardian, self.leader = json.loads(self.process.stdout.readline())
        (self.unshare,) = children(self.guardian)
        (self.nspawn,) = children(self.unshare)

    def close(self) -> str:
        """Close its standard input, which ends it, and return what it said last."""
        return self.process.communicate(timeout=30)[0]


@pytest.fixture
def owner(suite: str) -> Iterator[Owner]:
    """An owner, whose container is gone at the end of the test, come what may."""
    owner = Owner(suite)
    yield owner
    owner.process.kill()
    owner.process.communicate()
    eventually(lambda: traces(owner.name) == [])


def test_container_boots_and_leaves_nothing(suite: str) -> None:
    """A running system without a failed unit; while it runs and after it no mount is seen."""
    mounts = Path("/proc/self/mountinfo").read_text()
    with Container(suite) as container:
        name = container.control_group.split("/")[-3]
        state = container.run(["systemctl", "is-system-running"]).stdout
        comm = Path(f"/proc/{container.pid}/comm").read_text()
        assert mounts == Path("/proc/self/mountinfo").read_text()
    assert ("running\n", "systemd\n") == (state, comm)
    assert mounts == Path("/proc/self/mountinfo").read_text()
    assert [] == traces(name)


@pytest.mark.parametrize("victim", ["guardian", "unshare", "nspawn", "leader"])
def test_killed_link_takes_the_container_with_it(owner: Owner, victim: str) -> None:
    """SIGKILL of any process in the chain ends all; its owner lives and stops in peace."""
    os.kill(getattr(owner, victim), signal.SIGKILL)
    eventually(lambda: traces(owner.name) == [])
    assert "stopped\n" == owner.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_owner_takes_the_container_with_it(owner: Owner, number: signal.Signals) -> None:
    """The guardian sees its end, however it came."""
    owner.process.send_signal(number)
    owner.process.communicate(timeout=30)
    eventually(lambda: traces(owner.name) == [])


def test_owner_and_guardian_killed_at_once_are_swept_by_the_next(owner: Owner, suite: str) -> None:
    """No process and no mount is left; the empty cgroups go at the next start."""
    owner.process.send_signal(signal.SIGSTOP)  # else it cleans up
    os.kill(owner.guardian, signal.SIGKILL)
    owner.process.kill()
    owner.process.communicate(timeout=30)
    eventually(lambda: processes_of(owner.name) == [])
    with Container(suite):
        assert [] == traces(owner.name)


def test_two_containers_live_side_by_side(boot: Boot, healthy: System) -> None:
    """Each has its own pids, units and ports; a stop in one is none in the other."""
    other = boot()
    for system in (healthy, other):
        assert 0 == system.run(["systemctl", "start", "sdtool-graceful"]).status

    other.sdtool("stop", "sdtool-graceful")

    states = [
        system.run(["systemctl", "is-active", "sdtool-graceful"]).stdout.strip()
        for system in (healthy, other)
    ]
    assert ["active", "inactive"] == states


def test_command_is_a_unit_of_its_own(healthy: System) -> None:
    """Its user, home, directory, status and arguments with a dollar come through."""
    script = "echo $0 $HOME $PWD $USER $X; sed -n 's/^0:://p' /proc/self/cgroup; exit 7"
    options = {"user": TESTER, "env": {"X": "y"}}

    result = healthy.run(["sh", "-c", script, "$$a $b"], **options)

    words, group = result.stdout.splitlines()
    assert (7, "$$a $b /home/tester /home/tester tester y") == (result.status, words)
    assert group.startswith("/system.slice/run-")


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 3", 3),
        ("kill -TERM $$", 143),
        ("kill -INT $$", 130),
        ("kill -PIPE $$", 141),
        ("kill -KILL $$", 137),
        ("systemctl kill --signal=KILL $(sed 's,.*/,,' /proc/self/cgroup); sleep 9", 255),
        ("exec no-such-command", 127),
        ("trap '' TERM; sleep 500 & exit 4", 4),
        ("yes | head -1 > /dev/null", 0),
        ("systemctl restart dbus; systemctl daemon-reexec; sleep 2; exit 3", 3),
    ],
)
def test_command_ends_as_it_would_in_a_shell(boot: Boot, script: str, status: int) -> None:
    """Its own status, the signal's, or the word that it is not known; never a zero instead."""
    result = boot().run(["sh", "-c", script])

    assert status == result.status
    assert "Broken pipe" not in result.stderr
    assert result.seconds < 10


def test_user_manager_of_tester_lingers_and_has_the_demo_units(healthy: System) -> None:
    """The manager of tester runs without a login, and starts a demo unit."""
    started = healthy.run(["systemctl", "--user", "start", "sdtool-graceful"], user=TESTER)
    stopped = healthy.sdtool("stop", "--user", "sdtool-graceful", user=TESTER)

    assert (0, 0) == (started.status, stopped.status)


def test_container_that_does_not_boot_says_why(suite: str) -> None:
    """The error ends with what nspawn said."""
    with pytest.raises(Unavailable, match=r"did not come up.*no-such-option"):
        Container(suite, arguments=["--no-such-option"]).start()


def test_preparation_that_fails_says_why(suite: str) -> None:
    """So does that of the root directory."""
    with pytest.raises(Unavailable, match=r"did not come up.*no-such-command"):
        Container(suite, prepare="no-such-command").start()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdtool"


def test_cache_makes_a_directory_once(own_cache: Path) -> None:
    """The second one who asks gets what the first one made."""
    made = []

    def make(path: Path) -> None:
        made.append(path)
        (path / "file").write_text("content")

    first, second = (cache.obtain("kind-key", make) for _ in range(2))

    assert (first, 1) == (second, len(made))
    assert "content" == (first / "file").read_text()
    assert own_cache / "kind-key" == first != made[0]


def test_cache_keeps_nothing_that_failed_or_was_killed(own_cache: Path) -> None:
    """What a maker left that failed, or that was killed, is gone, and the next one makes it."""

    def fail(path: Path) -> None:
        (path / "half").touch()
        raise Unavailable("no.")

    own_cache.mkdir()
    (own_cache / ".unfinished-kind-key-abc").mkdir()
    with contextlib.suppress(Unavailable):
        cache.obtain("kind-key", fail)
    left = {path.name for path in own_cache.iterdir()}

    assert {"kind-key.lock"} == left
    assert [] == list(cache.obtain("kind-key", lambda path: None).iterdir())


def test_cache_waits_for_another_maker(own_cache: Path) -> None:
    """Two at the same time: one makes it, the other waits for it."""
    code = "import sys, time; from pathlib import Path; from sdtool.sandbox import cache\n"
    code += "def make(path): print('making', flush=True); sys.stdin.read(); (path / 'x').touch()\n"
    code += "print(len(list(cache.obtain('kind-key', make).iterdir())))"
    argv = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as one:
        assert one.stdout is not None
        assert "making\n" == one.stdout.readline()
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as two:
            eventually(lambda: waits_for_lock(two.pid))
            assert "1\n" == one.communicate(timeout=10)[0]
            assert "1\n" == two.communicate(timeout=10)[0]


def waits_for_lock(pid: int) -> bool:
    """Whether a process waits for a flock(2), by /proc/locks."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f" {pid} " in line for line in lines)


def test_cache_removes_what_nobody_used_for_a_month(own_cache: Path) -> None:
    """An old key goes when a new one is made, but not one in use, nor one of another kind."""
    old = time.time() - 40 * 24 * 3600
    for name in ("kind-old", "kind-new", "kind-used", "other-old"):
        directory = own_cache / name
        directory.mkdir(parents=True)
        os.utime(directory, (old, old))
    os.utime(own_cache / "kind-new")
    in_use = os.open(own_cache / "kind-used", os.O_RDONLY)
    fcntl.flock(in_use, fcntl.LOCK_SH)

    cache.obtain("kind-key", lambda path: None)

    os.close(in_use)
    left = {path.name for path in own_cache.iterdir() if path.is_dir()}
    assert {"kind-key", "kind-new", "kind-used", "other-old"} == left


def test_killed_build_leaves_no_process_and_no_mount(own_cache: Path, suite: str) -> None:
    """SIGKILL of who builds a root file system takes mmdebstrap and its mounts with it."""
    code = "import sys; from sdtool.sandbox.rootfs import obtain_rootfs\n"
    code += "obtain_rootfs(sys.argv[1], print)"
    keyrings = set(Path("/tmp").glob("mmdebstrap*"))
    with subprocess.Popen([sys.executable, "-c", code, suite], stdout=subprocess.DEVNULL) as build:
        eventually(lambda: list(own_cache.glob(".unfinished-*/content/etc")), timeout=60)
        build.kill()

    def mentions() -> list[Path]:
        files = [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/mountinfo")]
        return [file for file in files if str(own_cache) in read(file)]

    eventually(lambda: mentions() == [])
    assert keyrings == set(Path("/tmp").glob("mmdebstrap*"))


def test_sandbox_command_takes_a_suite(suite: str) -> None:
    """``sdtool sandbox --container SUITE -- CMD``: its output and its status."""
    command = [sys.executable, "-m", "sdtool", "sandbox", "--container", suite, "--", "sh", "-c"]
    done = subprocess.run(
        [*command, "hostname; exit 3"], capture_output=True, text=True, check=False
    )

    assert (3, f"sdtool-{suite}\n") == (done.returncode, done.stdout)


def test_closed_streams_keep_the_status(suite: str) -> None:
    """CMD finds /dev/null where sdtool found nothing: its start needs open streams."""
    script = '"$0" -m sdtool sandbox --container "$1" -- sh -c "exit 3" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable, suite], check=False)

    assert 3 == done.returncode


def test_unknown_suite_is_a_usage_error() -> None:
    """One sentence with the suites there are."""
    command = [sys.executable, "-m", "sdtool", "sandbox", "--container", "lenny"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert 2 == done.returncode
    assert (
        "sdtool: lenny is no suite.\n(one of bookworm, trixie, sid; -- goes before a command)\n"
        == done.stderr
    )


def test_missing_packages_are_one_apt_line(own_cache: Path) -> None:
    """Without the programs: exit 69, and the line that installs all of them."""
    hide = "for tool in systemd-nspawn mmdebstrap; do mount --bind /dev/null $(command -v $tool); "
    hide += "done"
    script = (
        f"{hide}; PATH=/nonexistent:$PATH; exec {sys.executable} -m sdtool sandbox --container"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", script], capture_output=True, text=True, check=False
    )
    assert 69 == done.returncode
    assert "apt install systemd-container mmdebstrap" in done.stderr
