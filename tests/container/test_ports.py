"""Who owns a port where several users, containers and the kernel have some."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtool.sandbox import Container
from sdtool.sandbox.rootfs import TESTER
from tests.container.conftest import Boot
from tests.container.suites import AS_REAL, REQUIREMENTS
from tests.container.system import Result, System
from tests.container.test_all_managers import own, uid_of
from tests.system.situations import PAYLOAD, Row, Situations, holders, owners

PROGRAM = "/srv/payload.py"
OTHER = "other"
CAPABILITIES = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")

_NUMBERS = itertools.cycle(range(18900, 19000))


@pytest.fixture
def port() -> int:
    """A port for a test alone."""
    return next(_NUMBERS)


@pytest.fixture(scope="module")
def system(suite: str) -> Iterator[System]:
    """A system in which root may do what it may on a real machine, with two users' managers."""
    with Container(suite, requirements=REQUIREMENTS, arguments=AS_REAL) as container:
        system = System(container)
        assert 0 == system.run(["useradd", "--create-home", OTHER]).status
        for user in (TESTER, OTHER):
            started = system.run(["systemctl", "start", manager_of(system, user)])
            assert 0 == started.status, started.stderr
        yield system


@pytest.fixture(scope="module")
def world(system: System, tmp_path_factory: pytest.TempPathFactory) -> Situations:
    """Units with the sockets that a test is about, on the system's manager."""
    return situate(system, tmp_path_factory.mktemp("units"))


def situate(system: System, directory: Path) -> Situations:
    """Put the payload into a system."""
    write = ["sh", "-c", f"cat > {PROGRAM} && chmod 644 {PROGRAM}"]
    done = system.container.run(write, text=PAYLOAD.read_text())
    assert 0 == done.returncode, done.stderr
    return Situations(system.container, directory, payload=PROGRAM)


def manager_of(system: System, user: str) -> str:
    """The unit that runs a user's manager."""
    return f"user@{uid_of(system, user)}.service"


def start_own(system: System, user: str, unit: str, *steps: str) -> str:
    """Start a service of a user's own manager; it is ready when this returns."""
    begin = ["systemd-run", "--user", "-q", "--service-type=notify", f"--unit={unit}"]
    begin += ["--property=NotifyAccess=all", "/usr/bin/python3", "-B", PROGRAM]
    done = own(system, user, *begin, *steps)
    assert 0 == done.status, done.stderr
    return f"{unit}.service"


def entry_of(result: Result) -> Row:
    """The only answer."""
    (entry,) = result.data
    return entry


def ask(system: System, port: int, **options: Any) -> Row:
    """What ``port`` says of a TCP port."""
    return entry_of(system.sdtool("port", f"{port}/tcp", **options))


def listens(system: System, port: int, *inside: str) -> str:
    """What ss shows on a port, in a namespace maybe."""
    return system.run([*inside, "ss", "-Hlntup", f"sport = :{port}"]).stdout


# What a user learns of others ----------------------------------------------------------------


@pytest.mark.parametrize("user", ["root", OTHER])
def test_others_port_has_its_creator(
    system: System, world: Situations, port: int, user: str
) -> None:
    """Asked as tester: the unit by the kernel's word, and what it takes to see the holders."""
    unit = world.start(f"by-{user}", f"tcp=0.0.0.0:{port}", properties=[f"User={user}"])
    entry = ask(system, port, user=TESTER)
    (owner,) = entry["owners"]
    assert ("owned", unit, "creator", "system", []) == (
        entry["verdict"],
        owner["unit"],
        owner["via"],
        owner["manager"],
        owner["holders"],
    )
    assert (unit, None, False) == (
        owner["socket"]["creator"]["unit"],
        owner["socket"]["holders"],
        owner["socket"]["holders_complete"],
    )
    for capability in CAPABILITIES:
        assert capability in owner["socket"]["holders_reason"]


def test_others_user_unit_has_its_creator(system: System, world: Situations, port: int) -> None:
    """A unit of another user's manager is named, with that manager."""
    unit = start_own(system, OTHER, "sdtool-t-theirs", f"tcp=127.0.0.1:{port}")
    (owner,) = ask(system, port, user=TESTER)["owners"]
    expected = (unit, "creator", manager_of(system, OTHER))
    assert expected == (owner["unit"], owner["via"], owner["manager"])


@pytest.mark.parametrize("user", ["root", TESTER])
def test_waiting_socket_unit_is_named_to_everybody(
    system: System, world: Situations, port: int, user: str
) -> None:
    """Which .socket listens is no secret, though who holds it is."""
    name = f"sdtool-t-wait-{user}"
    listen = f"--socket-property=ListenStream=127.0.0.1:{port}"
    world.run("systemd-run", "-q", f"--unit={name}", listen, "sleep", "infinity")
    entry = ask(system, port, user=user)
    assert ("owned", [(f"{name}.socket", "socket-unit")]) == (entry["verdict"], owners(entry))
    assert ({1} if user == "root" else set()) == holders(entry)


def test_passed_socket_is_unknown_to_others(system: System, world: Situations, port: int) -> None:
    """Its creator's cgroup is gone and its holder hidden: unknown, and root knows."""
    giver = world.start("give", f"tcp=127.0.0.1:{port}", "give=@sdtool-t-give")
    taker = world.start("take", "take=@sdtool-t-give")
    world.systemctl("stop", giver)
    entry = ask(system, port, user=TESTER)
    assert ("unknown", []) == (entry["verdict"], entry["owners"])
    assert "CAP_SYS_PTRACE" in entry["hint"]
    assert [(taker, "holder")] == owners(ask(system, port))


def test_others_unix_socket_is_nobodys_to_others(system: System, world: Situations) -> None:
    """The kernel names no cgroup for it: no unit, no holders, and why; root has both."""
    unit = world.start("unix", "stream=@sdtool-t-others")
    found = {}
    for user in ("root", TESTER):
        rows = system.sdtool("ports", "--unix", user=user).data
        (found[user],) = [row for row in rows if row["socket"]["path"] == "@sdtool-t-others"]
    hidden = found[TESTER]["socket"]
    assert (unit, None) == (found["root"]["unit"], found[TESTER]["unit"])
    assert (None, None, 0) == (hidden["holders"], hidden["creator"], hidden["uid"])
    assert hidden["creator_reason"]
    for capability in CAPABILITIES:
        assert capability in hidden["holders_reason"]


@pytest.mark.parametrize("user", ["root", OTHER])
def test_others_namespace_is_unknown(
    system: System, world: Situations, port: int, user: str
) -> None:
    """A port in it is not free, and belongs to nobody else; root has its unit."""
    if user == "root":
        private = ["PrivateNetwork=yes"]
        unit = world.start("hidden", f"tcp=0.0.0.0:{port}", properties=private)
    else:
        unit = start_own(system, user, "sdtool-t-hidden", "netns=user", f"tcp=0.0.0.0:{port}")
    assert "" == listens(system, port)
    result = system.sdtool("port", f"{port}/tcp", user=TESTER)
    entry = entry_of(result)
    assert (1, "unknown", []) == (result.status, entry["verdict"], entry["owners"])
    assert "CAP_SYS_" in entry["hint"]
    assert [(unit, "holder")] == owners(ask(system, port))


def test_others_namespace_makes_tables_say_so(
    system: System, world: Situations, port: int
) -> None:
    """PORTS of such a unit is null, its trace has a reason; root has the port in both."""
    private = ["PrivateNetwork=yes"]
    unit = world.start("table", f"tcp=0.0.0.0:{port}", properties=private)
    (listed,) = system.sdtool("list", unit, user=TESTER).data
    (traced,) = system.sdtool("trace", unit, user=TESTER).data
    assert (None, True) == (listed["ports"], bool(listed["ports_reason"]))
    assert ([], True) == (traced["sockets"], bool(traced["sockets_reason"]))
    (listed,) = system.sdtool("list", unit).data
    assert [f"{port}/tcp"] == listed["ports"]


def test_plain_units_keep_their_ports_in_a_strangers_list(
    system: System, world: Situations, port: int
) -> None:
    """That one unit's namespace is hidden hides no port of another one."""
    world.start("cave", properties=["PrivateNetwork=yes"])
    unit = world.start("meadow", f"tcp=127.0.0.1:{port}")
    (listed,) = system.sdtool("list", unit, user=TESTER).data
    assert [f"{port}/tcp"] == listed["ports"]


def situate_table(system: System, world: Situations, port: int, kind: str) -> str:
    """A unit whose ports a stranger may see, may not see, or which has none."""
    if kind == "passed":
        giver = world.start("table-give", f"tcp=127.0.0.1:{port}", "give=@sdtool-t-table")
        unit = world.start("table-take", "take=@sdtool-t-table")
        world.systemctl("stop", giver)
        return unit
    if kind == "activated":
        unit = "sdtool-t-table-activated.service"
        run = ["systemd-run", world.flag, "--quiet", f"--unit={unit}", "--service-type=notify"]
        listen = f"--socket-property=ListenStream=127.0.0.1:{port}"
        world.run(*run, "--property=NotifyAccess=all", listen, *world.argv())
        world.systemctl("start", unit)
        return unit
    private = ["PrivateNetwork=yes"] * (kind == "private")
    steps = [f"tcp=0.0.0.0:{port}"] * (kind != "none")
    headless = ["leave"] * (kind == "headless")
    return world.start(f"table-{kind}", *steps, *headless, properties=private)


@pytest.mark.parametrize("kind", ["plain", "private", "passed", "activated", "headless", "none"])
def test_tables_agree_on_what_a_stranger_does_not_know(
    system: System, world: Situations, port: int, kind: str
) -> None:
    """PORTS of ``list`` is null where ``ports`` has an error, and else they show the same."""
    unit = situate_table(system, world, port, kind)
    for user in ("root", TESTER):
        (listed,) = system.sdtool("list", unit, user=user).data
        result = system.sdtool("ports", unit, user=user)
        shown = [f"{row['socket']['port']}/tcp" for row in result.data]
        doubts = [error["message"] for error in result.errors]
        if listed["ports"] is None:
            assert ([], 1, True) == (shown, len(doubts), bool(listed["ports_reason"]))
        else:
            assert (shown, []) == (listed["ports"], doubts)
        if user == "root":
            assert [f"{port}/tcp"] * (kind != "none") == listed["ports"]


def test_root_knows_that_a_port_is_free(system: System, world: Situations, port: int) -> None:
    """Every namespace and every process was looked at, of those that a container shows."""
    result = system.sdtool("port", str(port))
    entry = entry_of(result)
    assert (1, "free", []) == (result.status, entry["verdict"], entry["owners"])
    assert "that this pid namespace shows" in entry["hint"]


def test_forbidden_call_leaves_a_port_unknown(boot: Boot, tmp_path: Path, port: int) -> None:
    """Where a filter forbids pidfd_getfd, root cannot enter what only a descriptor holds."""
    steps = ("netns=new", f"tcp=0.0.0.0:{port}", "netns=back")
    system = boot(arguments=["--system-call-filter=~pidfd_getfd"])
    situate(system, tmp_path).start("descriptor", *steps)
    entry = ask(system, port)
    assert ("unknown", []) == (entry["verdict"], entry["owners"])
    assert "pidfd_getfd" in entry["hint"]


# What root learns of users' managers ---------------------------------------------------------


def test_units_of_users_managers_are_told_apart(
    system: System, world: Situations, port: int
) -> None:
    """The same unit of two users, on one port with two addresses: each with its manager."""
    addresses = {TESTER: "127.0.0.1", OTHER: "127.0.0.2"}
    for user, address in addresses.items():
        unit = start_own(system, user, "sdtool-t-same", f"tcp={address}:{port}")
    expected = {
        address: (unit, manager_of(system, user), "holder") for user, address in addresses.items()
    }
    entry = ask(system, port)
    assert expected == {
        o["socket"]["address"]: (o["unit"], o["manager"], o["via"]) for o in entry["owners"]
    }
    rows = [row for row in system.sdtool("ports").data if row["socket"]["port"] == port]
    assert {key: value[:2] for key, value in expected.items()} == {
        row["socket"]["address"]: (row["unit"], row["manager"]) for row in rows
    }


def test_users_waiting_socket_unit_is_descended_to(
    system: System, world: Situations, port: int
) -> None:
    """The .socket of the user's manager, not user@UID.service."""
    listen = f"--socket-property=ListenStream=127.0.0.1:{port}"
    begin = ["systemd-run", "--user", "-q", "--unit=sdtool-t-duo", listen, "sleep", "infinity"]
    assert 0 == own(system, TESTER, *begin).status
    (owner,) = ask(system, port)["owners"]
    manager = manager_of(system, TESTER)
    assert ("sdtool-t-duo.socket", manager, "socket-unit") == (
        owner["unit"],
        owner["manager"],
        owner["via"],
    )
    main = int(system.run(["systemctl", "show", "-P", "MainPID", manager]).stdout)
    assert [main] == [holder["pid"] for holder in owner["holders"]]


def test_socket_units_of_one_name_are_told_apart(
    system: System, world: Situations, port: int
) -> None:
    """The system's and a user's: a trace has only that of its manager, a table has both."""
    name, theirs = "sdtool-t-both", next(_NUMBERS)
    setting = "--socket-property=ListenStream=127.0.0.1:{}".format
    begin = ["systemd-run", "-q", f"--unit={name}"]
    world.run(*begin, setting(port), "sleep", "infinity")
    command = [*begin, "--user", setting(theirs), "sleep", "infinity"]
    assert 0 == own(system, TESTER, *command).status
    unit = f"{name}.socket"

    (trace,) = system.sdtool("trace", unit).data
    rows = [row for row in system.sdtool("ports").data if row["unit"] == unit]
    asked = system.sdtool("ports", unit).data

    assert [port] == [row["port"] for row in trace["sockets"]]
    expected = {port: "system", theirs: manager_of(system, TESTER)}
    assert expected == {row["socket"]["port"]: row["manager"] for row in rows}
    assert 2 == len(rows)
    assert [(port, "system")] == [(row["socket"]["port"], row["manager"]) for row in asked]


# Published ports of containers ---------------------------------------------------------------

ID = "fedcba9876543210" * 4
SCOPE = f"docker-{ID}.scope"
OUTSIDE, INSIDE = "10.77.0.1", "10.77.0.2"


@pytest.fixture(scope="module")
def docker(world: Situations) -> Situations:
    """A bridge of a kind between our namespace and that of a container."""
    world.run("ip", "netns", "add", "sdtool-t-box")
    inside = ("ip", "-n", "sdtool-t-box")
    world.run("ip", "link", "add", "ve0", "type", "veth", "peer", "ve1", "netns", "sdtool-t-box")
    world.run("ip", "address", "add", f"{OUTSIDE}/24", "dev", "ve0")
    world.run(*inside, "address", "add", f"{INSIDE}/24", "dev", "ve1")
    world.run("ip", "link", "set", "ve0", "up")
    world.run(*inside, "link", "set", "ve1", "up")
    return world


def publish(docker: Situations, protocol: str, port: int, address: str, target: str) -> int:
    """Have docker-proxy in docker.service listen on a port; its pid."""
    docker.systemctl("reset-failed")
    docker.manager.run(["systemctl", "stop", "docker.service"])
    proxy = f"docker-proxy -proto {protocol} -host-ip 0.0.0.0 -host-port {port}"
    words = f"{proxy} -container-ip {address} -container-port {target}"
    steps = (f"argv={words}", "comm=docker-proxy", f"{protocol}=0.0.0.0:{port}")
    docker.start("docker.service", *steps)
    pid = docker.main_pid("docker.service")
    shown = docker.run("cat", f"/proc/{pid}/cmdline").split("\0")
    assert words.split() == shown[:-1]
    return pid


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_published_port_names_the_container(
    system: System, docker: Situations, port: int, protocol: str
) -> None:
    """docker-proxy owns it, and beside it stands the unit that listens in the container."""
    target = next(_NUMBERS)
    enter = "netns=/run/netns/sdtool-t-box"
    docker.manager.run(["systemctl", "stop", SCOPE])
    docker.start_scope(SCOPE, enter, f"{protocol}={INSIDE}:{target}")
    pid = publish(docker, protocol, port, INSIDE, str(target))
    assert f"pid={pid}," in listens(system, port)
    assert "python3" in listens(system, target, "ip", "netns", "exec", "sdtool-t-box")

    entry = entry_of(system.sdtool("port", f"{port}/{protocol}"))

    (owner,) = entry["owners"]
    assert ("docker.service", "holder", {pid}) == (owner["unit"], owner["via"], holders(entry))
    assert {
        "address": INSIDE,
        "port": target,
        "protocol": protocol,
        "unit": SCOPE,
        "container": {"runtime": "docker", "id": ID, "pod": None},
    } == owner["published"]


def test_published_port_where_nobody_listens(
    system: System, docker: Situations, port: int
) -> None:
    """What docker-proxy says is told, and that no unit is known there."""
    target = next(_NUMBERS)
    publish(docker, "tcp", port, "10.77.0.99", str(target))
    (owner,) = ask(system, port)["owners"]
    expected = {"address": "10.77.0.99", "port": target, "protocol": "tcp"}
    assert "docker.service" == owner["unit"]
    assert {**expected, "unit": None, "container": None} == owner["published"]


@pytest.fixture
def resolver(system: System, docker: Situations) -> Iterator[str]:
    """A unit that is the name server and answers nothing: questions wait where it listens.

    Those that are asked in the container's network namespace come there too.
    """
    unit = docker.start("resolver", f"udp={OUTSIDE}:53")
    there = "test -e /etc/resolv.conf || touch /etc/resolv.conf"
    use = f"cp /etc/resolv.conf /srv/kept; echo nameserver {OUTSIDE} > /etc/resolv.conf"
    assert 0 == system.shell(f"{there}; {use}").status
    yield unit
    assert 0 == system.shell("cat /srv/kept > /etc/resolv.conf").status
    docker.systemctl("stop", unit)


def count_questions(system: System) -> int:
    """The bytes of questions that wait at the name server."""
    return int(listens(system, 53).split()[2])


NO_ADDRESSES = {
    "long": "é" * 100,
    "local": "localhost",
    "name": "attacker.example",
    "near": "10.77.0.2.attacker.example",
}


@pytest.mark.parametrize("kind", NO_ADDRESSES)
def test_forged_proxy_has_no_name_looked_up(
    system: System, docker: Situations, port: int, resolver: str, kind: str
) -> None:
    """What -container-ip says is no address: nothing is published, and nobody hears of it."""
    pid = publish(docker, "tcp", port, NO_ADDRESSES[kind], "80")

    result = system.sdtool("port", f"{port}/tcp")

    assert (0, []) == (result.status, result.errors)
    assert 0 == count_questions(system)
    assert result.seconds < 5
    entry = entry_of(result)
    (owner,) = entry["owners"]
    assert ("docker.service", "holder", {pid}) == (owner["unit"], owner["via"], holders(entry))
    assert owner["published"] is None
    # A question would have been seen: one that is asked in the container is.
    enter = ["ip", "netns", "exec", "sdtool-t-box"]
    system.run([*enter, "timeout", "1", "getent", "ahosts", NO_ADDRESSES["name"]])
    assert count_questions(system) > 0


@pytest.mark.parametrize("target", ["x", "99999999", "-1"])
def test_forged_proxy_publishes_nothing(
    system: System, docker: Situations, port: int, target: str
) -> None:
    """Words that are no address are no answer, and no bug."""
    pid = publish(docker, "tcp", port, "10.77.0.2", target)
    entry = ask(system, port)
    (owner,) = entry["owners"]
    assert ("docker.service", "holder", {pid}) == (owner["unit"], owner["via"], holders(entry))
    assert owner["published"] is None


# The kernel's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_kernels_port_is_nobodys_inside(
    system: System, world: Situations, port: int, named: bool
) -> None:
    """A VXLAN listens without any process; one outside of the container could hold it as well."""
    name = f"sdtool-t-vx{int(named)}"
    into = []
    if named:
        world.run("ip", "netns", "add", name)
        into = ["ip", "netns", "exec", name]
    kind = ["type", "vxlan", "id", str(port), "dstport", str(port)]
    world.run(*into, "ip", "link", "add", "sdtool-vx", *kind)
    world.run(*into, "ip", "link", "set", "sdtool-vx", "up")
    shown = listens(system, port, *into)
    assert (True, False) == (f":{port} " in shown, "users:" in shown)

    entry = entry_of(system.sdtool("port", f"{port}/udp"))

    assert ("unknown", []) == (entry["verdict"], entry["owners"])
    assert "no process of this pid namespace holds it" in entry["hint"]
