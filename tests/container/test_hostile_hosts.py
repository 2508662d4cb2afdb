"""Hosts where something is missing, broken or in the way: a true answer or a clear no, in time.

Every one of them is booted for it. ``LIMIT`` is what the interface promises: 5 s to say no.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from sdtool.sandbox.rootfs import TESTER, TESTER_UID
from tests.container.conftest import Boot
from tests.container.system import Result, System

LIMIT = 5.0

NO_BUS = "for unit in dbus.socket dbus.service; do ln -sf /dev/null etc/systemd/system/$unit; done"
BROKER = "ln -sf /usr/lib/systemd/system/dbus-broker.service etc/systemd/system/dbus.service"

COMMANDS = (
    ("list",),
    ("trace", "sdtool-graceful"),
    ("ports", "sdtool-graceful"),
    ("stop", "sdtool-graceful"),
)


def warm_up(system: System) -> None:
    """Have the modules compiled for both users: that is not what an answer's time is about."""
    for user in ("root", TESTER):
        for words in COMMANDS:
            system.sdtool_alone(*words, user=user)
    system.run(["systemctl", "start", "sdtool-graceful"])


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Hold a process with SIGSTOP, and let it go."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def check_no(result: Result, code: str = "Unavailable") -> None:
    """A clear no: in time, one sentence, no traceback."""
    assert result.seconds < LIMIT
    assert (69, [code]) == (result.status, [error["code"] for error in result.errors])
    assert result.errors[0]["message"].endswith(".")
    assert "Traceback" not in result.stderr


def check_doctor(result: Result, *, bus: bool, manager: bool) -> None:
    """Doctor answers in time, says which of the two is there, and what the other one costs."""
    assert result.seconds < LIMIT
    assert (0 if manager else 1) == result.status
    rows = {row["facility"]: row for row in result.data}
    assert [bus, manager] == [rows[name]["available"] for name in ("bus", "manager")]
    for row in rows.values():
        assert row["available"] == (row["costs"] is None)
        assert row["reason"]


def test_frozen_broker_costs_others_their_answer_only(boot: Boot) -> None:
    """Root goes round it through systemd's own socket; others are told within 5 s."""
    system = boot()
    warm_up(system)
    with frozen(system.main_pid("dbus.service")), ThreadPoolExecutor(max_workers=2) as pool:
        others = [pool.submit(system.sdtool_alone, *words, user=TESTER) for words in COMMANDS]
        roots = [system.sdtool_alone(*words) for words in COMMANDS]

    for refused in others:
        check_no(refused.result())
    for answered in roots:
        assert (0, True) == (answered.status, bool(answered.data))
        assert answered.seconds < LIMIT


def test_frozen_broker_is_told_by_doctor(boot: Boot) -> None:
    """The bus is out; root still has the manager, and others learn what that costs them."""
    system = boot()
    with frozen(system.main_pid("dbus.service")):
        roots = system.sdtool_alone("doctor")
        others = system.sdtool_alone("doctor", user=TESTER)

    check_doctor(roots, bus=False, manager=True)
    check_doctor(others, bus=False, manager=False)


def test_frozen_manager_is_told_within_five_seconds(boot: Boot) -> None:
    """PID 1 hears nobody: every command says so in time, root's too."""
    system = boot()
    warm_up(system)
    asked = [(*command, user) for command in COMMANDS for user in ("root", TESTER)]
    with frozen(system.container.pid), ThreadPoolExecutor(max_workers=3) as pool:
        waiting = [pool.submit(system.sdtool_alone, *words, user=user) for *words, user in asked]
        ports = system.sdtool_alone("port", "18080")
        doctor = system.sdtool_alone("doctor")
        results = [one.result() for one in waiting]

    for result in results:
        check_no(result)
    check_doctor(doctor, bus=True, manager=False)
    assert (0, "owned") == (ports.status, ports.data[0]["verdict"])


def test_no_bus_leaves_the_private_socket(boot: Boot) -> None:
    """Without any message bus root gets the same answers, and doctor says which way."""
    system = boot(prepare=NO_BUS)
    system.enter(["systemctl", "start", "sdtool-graceful"])

    listed = system.sdtool_alone("list", "sdtool-graceful")
    doctor = system.sdtool_alone("doctor")
    stopped = system.sdtool_alone("stop", "sdtool-graceful")
    others = system.sdtool_alone("list", user=TESTER)

    assert [["18080/tcp"]] == [row["ports"] for row in listed.data]
    assert (0, "clean") == (stopped.status, stopped.data[0]["verdict"])
    check_doctor(doctor, bus=False, manager=True)
    assert "private socket" in doctor.data[1]["reason"]
    check_no(others)


def test_dbus_broker_is_as_good_as_dbus_daemon(boot: Boot) -> None:
    """The other message bus: the same reads and the same stop, as root and as tester."""
    system = boot(prepare=BROKER)
    system.container.log_in()
    bus = system.run(["systemctl", "show", "-P", "Id", "dbus.service"]).stdout
    system.run(["systemctl", "start", "sdtool-forks"])
    system.run(["systemctl", "--user", "start", "sdtool-graceful"], user=TESTER)

    listed = system.sdtool("list", "sdtool-forks", user=TESTER)
    stopped = system.sdtool("stop", "sdtool-forks")
    own = system.sdtool("stop", "sdtool-graceful", "--user", user=TESTER)

    assert "dbus-broker.service\n" == bus
    assert [4] == [row["processes"] for row in listed.data]
    assert (1, "killed") == (stopped.status, stopped.data[0]["verdict"])
    assert (0, "clean") == (own.status, own.data[0]["verdict"])


NOT_BOOTED = "mount -t tmpfs none /run"
NO_SYSTEMD = (
    f"{NOT_BOOTED}; mount -t tmpfs none /usr/lib/systemd; mount -t tmpfs none /etc/systemd"
)


@pytest.mark.parametrize("hide", [NOT_BOOTED, NO_SYSTEMD], ids=["not-booted", "no-systemd"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_machine_without_systemd_is_told(
    healthy: System, hide: str, command: tuple[str, ...]
) -> None:
    """Installed but not booted, and not there at all: not booted with systemd, and a hint."""
    words = " ".join(command)

    result = healthy.enter(["unshare", "-m", "sh", "-euc", f"{hide}; exec sdtool {words} --json"])

    check_no(result, "NotBooted")
    assert "not booted with systemd" in result.errors[0]["message"]


def test_machine_without_systemd_still_has_ports_and_processes(healthy: System) -> None:
    """What the kernel alone can tell is told: who listens, and that nothing manages a process."""
    script = f"{NO_SYSTEMD}; for c in ports 'pid 1' doctor; do sdtool $c --json; echo $?; done"

    result = healthy.enter(["unshare", "-m", "sh", "-c", script])

    assert ["0", "0", "1"] == result.stdout.splitlines()[1::2]
    assert result.seconds < LIMIT


def test_hidden_processes_are_unknown_not_absent(healthy: System) -> None:
    """With hidepid a user sees no process of others: they are counted, not described."""
    healthy.run(["systemctl", "start", "sdtool-graceful"])
    hidden = {"user": TESTER, "properties": ["ProtectProc=invisible"]}

    (row,) = healthy.sdtool("list", "sdtool-graceful", **hidden).data
    (trace,) = healthy.sdtool("trace", "sdtool-graceful", **hidden).data
    (port,) = healthy.sdtool("port", "18080/tcp", **hidden).data
    proc = healthy.facility("proc", **hidden)

    assert (1, ["18080/tcp"]) == (row["processes"], row["ports"])
    assert "owned" == port["verdict"]
    (owner,) = port["owners"]
    assert ("creator", None) == (owner["via"], owner["socket"]["holders"])
    assert "hidepid" in owner["socket"]["holders_reason"]
    assert (False, True) == (proc["available"], "hides" in proc["reason"])
    assert ["hidepid" in process["unread_reason"] for process in trace["processes"]] == [True]


@pytest.mark.parametrize("user", ["root", TESTER])
def test_list_without_netlink_asks_proc_for_the_ports(healthy: System, user: str) -> None:
    """Who holds a socket still tells whose it is; to others nothing does, and why is said."""
    healthy.run(["systemctl", "start", "sdtool-graceful"])
    deaf = {"properties": ["RestrictAddressFamilies=~AF_NETLINK"], "user": user}

    (row,) = healthy.sdtool("list", "sdtool-graceful", **deaf).data

    assert (1, None) == (row["processes"], row["processes_reason"])
    if user == "root":
        assert ["18080/tcp"] == row["ports"]
    else:
        assert (None, True) == (row["ports"], "/proc/net" in row["ports_reason"])


@pytest.mark.parametrize(
    "options", [(), ("--user",), ("--all-managers",)], ids=["system", "user", "all"]
)
def test_list_among_other_cgroups_counts_nothing(
    healthy: System, options: tuple[str, ...]
) -> None:
    """A mount namespace that shows a part of the hierarchy: null with the reason, not 0."""
    become = f"runuser -u {TESTER} -- env XDG_RUNTIME_DIR=/run/user/{TESTER_UID}"
    command = " ".join([become if "--user" in options else "", "sdtool list --json", *options])
    script = f"mount --bind /sys/fs/cgroup/system.slice /sys/fs/cgroup; exec {command}"

    result = healthy.enter(["unshare", "-m", "sh", "-euc", script])

    assert (0, True) == (result.status, bool(result.data))
    for row in result.data:
        assert (None, None) == (row["processes"], row["ports"])
        assert "not those of the manager" in row["processes_reason"]
        assert row["processes_reason"] == row["ports_reason"]


def test_root_of_a_user_namespace_is_not_taken_for_the_machines(healthy: System) -> None:
    """It has every capability there is, and none over the processes outside."""
    weak = {"properties": ["PrivateUsers=yes"]}
    privileges = healthy.facility("privileges", **weak)
    assert (False, True) == (privileges["available"], "CAP_SYS_PTRACE" in privileges["reason"])


def test_root_without_ptrace_says_what_it_cannot_see(healthy: System) -> None:
    """Root without CAP_SYS_PTRACE: the owner by its creator, the holders null with the reason."""
    healthy.run(["systemctl", "start", "sdtool-graceful"])
    weak = {"properties": ["CapabilityBoundingSet=~CAP_SYS_PTRACE"]}

    (port,) = healthy.sdtool("port", "18080/tcp", **weak).data
    stopped = healthy.sdtool("stop", "sdtool-graceful", **weak)
    privileges = healthy.facility("privileges", **weak)

    (owner,) = port["owners"]
    assert ("owned", "sdtool-graceful.service") == (port["verdict"], owner["unit"])
    assert (0, "clean") == (stopped.status, stopped.data[0]["verdict"])
    assert (False, True) == (privileges["available"], "CAP_SYS_PTRACE" in privileges["reason"])


@pytest.mark.capability("cgroup v1")
@pytest.mark.parametrize("suite", ["bookworm"])  # systemd 256 and newer boots on cgroup2 only
def test_cgroup_v1_is_answered_without_cgroup2(boot: Boot) -> None:
    """On cgroup v1 units, processes and stops are told; doctor says what is missing."""
    system = boot(cgroups="legacy")
    system.run(["systemctl", "start", "sdtool-forks", "sdtool-graceful"])
    main = system.enter(["systemctl", "show", "-P", "MainPID", "sdtool-graceful"]).stdout.strip()

    row, web = system.sdtool("list", "sdtool-forks", "sdtool-graceful").data
    theirs = system.sdtool("list", "sdtool-graceful", user=TESTER).data[0]
    table = system.run(["sdtool", "list", "sdtool-*"], user=TESTER).stdout
    (trace,) = system.sdtool("trace", "sdtool-forks").data
    (pid,) = system.sdtool("pid", main).data
    (port,) = system.sdtool("port", "18080/tcp").data
    (listener,) = system.sdtool("ports", "sdtool-graceful").data
    others = system.sdtool("ports", "sdtool-graceful", user=TESTER)
    idle = ("multi-user.target", "sdtool-slow", "sdtool-activated.socket")
    none = system.sdtool("ports", *idle, user=TESTER)
    facilities = {one["facility"]: one for one in system.sdtool("doctor").data}
    stopped = system.sdtool("stop", "sdtool-forks")

    graceful = "sdtool-graceful.service"
    assert 4 == row["processes"] == len(trace["processes"])
    assert (1, None, ["18080/tcp"]) == (web["processes"], web["processes_reason"], web["ports"])
    assert (None, True) == (theirs["ports"], "cgroup v1" in theirs["ports_reason"])
    assert [f"(ports are not known: {theirs['ports_reason']})"] == table.splitlines()[3:]
    assert [graceful] * 3 == [pid["unit"], port["owners"][0]["unit"], listener["unit"]]
    assert (False, True) == (
        facilities["cgroups"]["available"],
        "v1" in facilities["cgroups"]["reason"],
    )
    assert False is facilities["sock_diag"]["available"]
    assert (69, []) == (others.status, others.data)
    assert f"Whether {graceful} listens is not known" in others.errors[0]["message"]
    assert (0, [], []) == (none.status, none.data, none.errors)
    assert (1, "killed") == (stopped.status, stopped.data[0]["verdict"])


@pytest.mark.capability("cgroup v1")
@pytest.mark.parametrize("suite", ["bookworm"])
def test_cgroup_v1_protects_sdtool_from_itself(boot: Boot) -> None:
    """A stop of the unit that sdtool runs in is refused there too."""
    command = "sdtool stop sdtool-t-self --json > /tmp/answer; echo $? >> /tmp/answer; sleep 100"
    system = boot(cgroups="legacy")

    run = ["systemd-run", "--unit=sdtool-t-self", "sh", "-c", command.replace("$", "$$")]
    system.enter(run)
    system.enter(
        ["sh", "-c", "for i in $(seq 50); do grep -qx 4 /tmp/answer && break; sleep .1; done"]
    )

    active = system.enter(["systemctl", "is-active", "sdtool-t-self"]).stdout
    answer = system.enter(["cat", "/tmp/answer"]).stdout
    assert ("active\n", True) == (active, "sdtool itself runs in it" in answer)


def test_port_in_a_hidden_namespace_is_not_called_free(healthy: System) -> None:
    """Root looks into it; to an ordinary user it is closed: unknown, with the reason."""
    serve = ["/opt/sdtool/lib/units/bin/serve", "127.0.0.1:18099/tcp"]
    unit = ["systemd-run", "--quiet", "--unit=sdtool-t-own-net", "--service-type=notify"]
    made = healthy.enter([*unit, "--property=PrivateNetwork=yes", *serve])
    assert 0 == made.status, made.stderr

    roots = healthy.sdtool("port", "18099/tcp")
    others = healthy.sdtool("port", "18099/tcp", user=TESTER)

    assert (0, "owned") == (roots.status, roots.data[0]["verdict"])
    assert ["sdtool-t-own-net.service"] == [owner["unit"] for owner in roots.data[0]["owners"]]
    assert (1, "unknown") == (others.status, others.data[0]["verdict"])
    assert "/proc/net does not tell who created it" in others.data[0]["hint"]
