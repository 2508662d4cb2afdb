"""Who owns a port: every kind of socket, and every door through which a unit comes to have one."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.machine import children, eventually, read
from tests.system.bench import SCOPE, Bench, Client
from tests.system.situations import (
    Row,
    Situations,
    ask,
    data,
    find_port,
    holders,
    inodes,
    namespace,
    owners,
    sockets_of,
    unreadable,
)

TCP = {"protocol": "tcp", "type": "stream", "state": "LISTEN"}
UDP = {"protocol": "udp", "type": "dgram", "state": "UNCONN"}
V4 = {"family": "inet", "address": "127.0.0.1", "v6only": None}
V6 = {"family": "inet6"}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tcp": ("tcp=127.0.0.1", {**TCP, **V4}),
    "any": ("tcp=0.0.0.0", {**TCP, **V4, "address": "0.0.0.0"}),
    "tcp6": ("tcp=[::1]", {**TCP, **V6, "address": "::1"}),
    "dual": ("tcp=[::]", {**TCP, **V6, "address": "::", "v6only": False}),
    "v6only": ("tcp+v6only=[::]", {**TCP, **V6, "address": "::", "v6only": True}),
    "udp": ("udp=127.0.0.1", {**UDP, **V4}),
    "udp6": ("udp=[::1]", {**UDP, **V6, "address": "::1"}),
    "mptcp": ("mptcp=127.0.0.1", {**TCP, **V4, "protocol": "mptcp"}),
    "bound": ("tcp+bound=127.0.0.1", {**TCP, **V4, "state": "BOUND"}),
    "bound6": ("tcp+bound=[::1]", {**TCP, **V6, "address": "::1", "state": "BOUND"}),
}
"""Kinds of sockets: the payload's step, and what is true of the socket."""


def ss_holders(manager: Bench, port: int) -> set[int]:
    """Who listens on a port, by ss."""
    shown = manager.run(["ss", "-Hlntup", f"sport = :{port}"]).stdout
    return {int(pid) for pid in re.findall(r"pid=(\d+)", shown)}


GROUPS = {
    "tcp": ["tcp", "any", "tcp6", "dual", "v6only"],
    "udp": ["udp", "udp6"],
    "mptcp": ["mptcp"],
    "bound": ["bound", "bound6"],
}


@pytest.mark.parametrize(
    "group",
    ["tcp", "udp", "mptcp", pytest.param("bound", marks=pytest.mark.capability("bound sockets"))],
)
def test_socket_of_any_kind_has_its_unit(
    sdtool: Client, situations: Situations, manager: Bench, group: str
) -> None:
    """One owner with all that is true of its socket; ss agrees where it sees the socket."""
    ports = {kind: find_port() for kind in GROUPS[group]}
    unit = situations.start("kind", *(f"{KINDS[kind][0]}:{ports[kind]}" for kind in ports))
    main = situations.main_pid(unit)
    heard = set() if group == "bound" else {main}
    assert {kind: heard for kind in ports} == {
        kind: ss_holders(manager, port) for kind, port in ports.items()
    }

    entries = data(sdtool("port", *map(str, ports.values()), "--json"))

    protocol = "udp" if group == "udp" else "tcp"
    assert [("owned", port, protocol) for port in ports.values()] == [
        (entry["verdict"], entry["port"], entry["protocol"]) for entry in entries
    ]
    for kind, entry in zip(ports, entries, strict=True):
        (owner,) = entry["owners"]
        require_plain_owner(owner, unit, situations.scope, main)
        expected = {**KINDS[kind][1], "port": ports[kind], "uid": os.getuid()}
        assert expected == {key: owner["socket"][key] for key in expected}


def require_plain_owner(owner: Row, unit: str, manager: str, main: int) -> None:
    """One process of a unit made the socket, here, and holds it."""
    found = owner["socket"]
    assert (unit, manager, None, "holder") == (
        owner["unit"],
        owner["manager"],
        owner["container"],
        owner["via"],
    )
    assert [main] == [holder["pid"] for holder in owner["holders"]]
    assert (unit, namespace(main), None, "sock_diag") == (
        found["creator"]["unit"],
        found["netns"],
        found["netns_name"],
        found["source"],
    )
    assert {found["inode"]} <= inodes(main)


def test_all_tables_have_the_same_listeners(sdtool: Client, situations: Situations) -> None:
    """``ports``, ``trace`` and ``list`` have each once, MPTCP too; none is only bound."""
    listening = [kind for kind in KINDS if not kind.startswith("bound")]
    ports = {kind: find_port() for kind in KINDS}
    unit = situations.start("all", *(f"{KINDS[kind][0]}:{ports[kind]}" for kind in KINDS))
    expected = sorted((KINDS[kind][1]["protocol"], ports[kind]) for kind in listening)

    rows = sockets_of(data(sdtool("ports", unit, "--json")), unit)
    (trace,) = data(sdtool("trace", unit, "--json"))
    (listed,) = data(sdtool("list", unit, "--json"))

    assert expected == sorted((row["protocol"], row["port"]) for row in rows)
    traced = [row for row in trace["sockets"] if row["state"] in ("LISTEN", "UNCONN")]
    assert expected == sorted((row["protocol"], row["port"]) for row in traced)
    shown = {f"{port}/{'udp' if name == 'udp' else 'tcp'}" for name, port in expected}
    assert sorted(shown) == sorted(text.replace("mptcp", "tcp") for text in listed["ports"])


def test_port_of_nobody_is_free_where_every_process_is_seen(sdtool: Client, port: int) -> None:
    """Where one may not be looked into, as another user's, it is unknown, and that is said."""
    hidden = unreadable()
    if SCOPE == "user":
        assert 1 in hidden
    done = sdtool("port", str(port), "--json")
    (entry,) = data(done)
    assert (1, []) == (done.returncode, entry["owners"] + entry["blocked_by"])
    if hidden:
        assert "unknown" == entry["verdict"]
        assert "may not be looked into" in entry["hint"]
        assert "CAP_SYS_PTRACE" in entry["hint"]
    else:
        assert "free" == entry["verdict"]
        assert entry["hint"].startswith("nothing has it in any network namespace")


# Several holders -----------------------------------------------------------------------------


def test_forked_workers_are_one_owner(sdtool: Client, situations: Situations, port: int) -> None:
    """With all its holders: the parent and four children."""
    unit = situations.start("forks", f"tcp=127.0.0.1:{port}", "fork=4")
    main = situations.main_pid(unit)
    entry = ask(sdtool, port)
    assert [(unit, "holder")] == owners(entry)
    assert ({main, *children(main)}, 5) == (holders(entry), len(entry["owners"][0]["holders"]))


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_shared_port_has_two_owners(
    sdtool: Client, situations: Situations, port: int, protocol: str
) -> None:
    """SO_REUSEPORT over two units: each with a socket of its own."""
    step = f"{protocol}+reuseport=127.0.0.1:{port}"
    units = [situations.start(name, step) for name in ("one", "two")]
    entry = ask(sdtool, port)
    assert [(unit, "holder") for unit in units] == owners(entry)
    assert {situations.main_pid(unit) for unit in units} == holders(entry)
    assert 2 == len({owner["socket"]["inode"] for owner in entry["owners"]})


def test_protocols_and_families_are_apart(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """An entry for tcp and one for udp; two units share tcp by their address family."""
    tcp = situations.start("tcp", f"tcp=127.0.0.1:{port}")
    tcp6 = situations.start("tcp6", f"tcp+v6only=[::]:{port}")
    udp = situations.start("udp", f"udp=127.0.0.1:{port}")
    entries = {entry["protocol"]: entry for entry in data(sdtool("port", str(port), "--json"))}
    assert {"tcp": [(tcp, "holder"), (tcp6, "holder")], "udp": [(udp, "holder")]} == {
        protocol: owners(entry) for protocol, entry in entries.items()
    }


PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "delegated": (("cgroup=inner",), ("Delegate=yes",)),
    "private users": ((), ("PrivateUsers=yes",)),
}
if SCOPE == "system":  # a user's manager cannot change the user
    PLACES |= {"user": ((), ("User=nobody",)), "dynamic user": ((), ("DynamicUser=yes",))}
"""Where and as whom a service may run: steps and properties."""


@pytest.mark.parametrize("place", PLACES)
def test_owner_is_found_wherever_it_runs(
    sdtool: Client, situations: Situations, port: int, place: str
) -> None:
    """In a sub-cgroup, in a user namespace, as another user."""
    steps, properties = PLACES[place]
    unit = situations.start("place", *steps, f"tcp=127.0.0.1:{port}", properties=properties)
    main = situations.main_pid(unit)
    entry = ask(sdtool, port)
    assert ([(unit, "holder")], {main}) == (owners(entry), holders(entry))


# Sockets that went from hand to hand ---------------------------------------------------------


def give_and_take(situations: Situations, port: int) -> tuple[str, str]:
    """Two units that both hold a listener (SCM_RIGHTS): who made it, and who was given it."""
    giver = situations.start("give", f"tcp=127.0.0.1:{port}", "give=@sdtool-t-give")
    taker = situations.start("take", "take=@sdtool-t-give")
    return giver, taker


def test_passed_socket_belongs_to_its_maker_who_holds_it(
    sdtool: Client, situations: Situations, manager: Bench, port: int
) -> None:
    """Others are not looked for, which would cost more, and it is said that there may be some."""
    giver, taker = give_and_take(situations, port)
    main = situations.main_pid(giver)
    assert {main, situations.main_pid(taker)} == ss_holders(manager, port)

    entry = ask(sdtool, port)

    (owner,) = entry["owners"]
    found = owner["socket"]
    assert ("owned", giver, "holder") == (entry["verdict"], owner["unit"], owner["via"])
    assert [main] == [holder["pid"] for holder in owner["holders"]]
    assert (giver, None) == (found["creator"]["unit"], found["creator_reason"])
    assert found["holders_complete"] is False
    assert found["holders_reason"]


def test_all_holders_are_named_when_asked_for(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """--all-holders looks at every process: who was given it owns the port too."""
    giver, taker = give_and_take(situations, port)

    (entry,) = data(sdtool("port", f"{port}/tcp", "--all-holders", "--json"))

    assert {(giver, "holder"), (taker, "holder")} == set(owners(entry))
    assert {situations.main_pid(giver), situations.main_pid(taker)} == holders(entry)


@pytest.mark.capability("bound sockets")
def test_bound_beside_a_listener_is_found_when_asked_for(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Who listens has the port; what is merely bound, elsewhere or before, is told by the flag."""
    listens = situations.start("listens", f"tcp=127.0.0.1:{port}")
    bound = situations.start("bound", f"tcp+bound=127.0.0.2:{port}")

    entry = ask(sdtool, port)
    (every,) = data(sdtool("port", f"{port}/tcp", "--all-holders", "--json"))

    assert [(listens, "holder")] == owners(entry)
    assert {(listens, "LISTEN"), (bound, "BOUND")} == {
        (owner["unit"], owner["socket"]["state"]) for owner in every["owners"]
    }


def test_passed_socket_belongs_to_its_taker_alone(
    sdtool: Client, situations: Situations, manager: Bench, port: int
) -> None:
    """With its maker gone: nobody else is named, and it is said why not the maker."""
    giver, taker = give_and_take(situations, port)
    situations.systemctl("stop", giver)
    main = situations.main_pid(taker)
    assert {main} == ss_holders(manager, port)

    entry = ask(sdtool, port)

    (owner,) = entry["owners"]
    found = owner["socket"]
    assert ("owned", taker, "holder") == (entry["verdict"], owner["unit"], owner["via"])
    assert [main] == [holder["pid"] for holder in owner["holders"]]
    assert (None, True) == (found["creator"], bool(found["creator_reason"]))
    # Who may look into every process knows that there is no other one.
    assert (not unreadable()) == found["holders_complete"]


def test_socket_from_a_cgroup_that_is_gone_has_its_holder(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Its process has moved back from where it made the socket."""
    steps = ("cgroup=inner", f"tcp=127.0.0.1:{port}", "cgroup=back")
    unit = situations.start("moved", *steps, properties=["Delegate=yes"])
    entry = ask(sdtool, port)
    (owner,) = entry["owners"]
    assert (unit, "holder") == (owner["unit"], owner["via"])
    assert {situations.main_pid(unit)} == holders(entry)
    assert owner["socket"]["creator"] is None
    assert "gone" in owner["socket"]["creator_reason"]


def test_process_without_its_main_thread_keeps_its_port(
    sdtool: Client, situations: Situations, manager: Bench, port: int
) -> None:
    """Another thread has it: its unit is the owner as before, and never the kernel."""
    unit = situations.start("headless", f"tcp=127.0.0.1:{port}", "leave")
    main = situations.main_pid(unit)
    eventually(lambda: "State:\tZ" in read(Path(f"/proc/{main}/status")))
    assert f":{port} " in manager.run(["ss", "-Hlnt", f"sport = :{port}"]).stdout
    assert 2 == len(list(Path(f"/proc/{main}/task").iterdir()))

    entry = ask(sdtool, port)
    rows = data(sdtool("ports", unit, "--json"))
    (listed,) = data(sdtool("list", unit, "--json"))
    (trace,) = data(sdtool("trace", unit, "--json"))

    # Without its main thread a process is root's to look into, whoever it belongs to.
    door = "holder" if situations.is_root else "creator"
    assert ("owned", [(unit, door)]) == (entry["verdict"], owners(entry))
    assert ({main} if situations.is_root else set()) == holders(entry)
    assert [(unit, port)] == [(row["unit"], row["socket"]["port"]) for row in rows]
    assert [f"{port}/tcp"] == listed["ports"]
    assert [port] == [s["port"] for s in trace["sockets"] if s["family"] != "unix"]


def test_leftover_process_is_named_with_its_unit(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """The unit is inactive, and a child of its own has the port still."""
    steps = (f"tcp=127.0.0.1:{port}", "fork=1")
    unit = situations.start("left", *steps, properties=["KillMode=process"])
    situations.refer(unit)
    (child,) = children(situations.main_pid(unit))
    situations.systemctl("stop", unit)
    entry = ask(sdtool, port)
    assert "inactive" == situations.show(unit, "ActiveState")
    assert ([(unit, "holder")], {child}) == (owners(entry), holders(entry))


STORE = ("FileDescriptorStoreMax=4", "Restart=always", "RestartSec=600")


def stored(situations: Situations, name: str, port: int) -> str:
    """A service that put its listener into the fd store and waits to be started again."""
    unit = situations.start(name, f"tcp=127.0.0.1:{port}", "store", properties=STORE)
    situations.systemctl("kill", "--signal=KILL", unit)
    eventually(lambda: situations.show(unit, "SubState") == "auto-restart")
    assert "1" == situations.show(unit, "NFileDescriptorStore")
    return unit


def count_storing_units(situations: Situations) -> int:
    """How many services have something in the manager's fd store."""
    shown = situations.systemctl("show", "--all", "--property=NFileDescriptorStore", "*.service")
    return sum(line not in ("", "NFileDescriptorStore=0") for line in shown.splitlines())


TELLS_STORES = 254
"""The version of systemd from which on it says what is in the fd store of a service."""


@pytest.mark.parametrize("count", [1, 2])
def test_stored_descriptor_belongs_to_its_service(
    sdtool: Client, situations: Situations, manager: Bench, count: int
) -> None:
    """Between two runs; where systemd cannot say whose it is, only that the manager has it."""
    ports = {find_port(): f"store{index}" for index in range(count)}
    units = {port: stored(situations, name, port) for port, name in ports.items()}
    storing = count_storing_units(situations)
    # A system has the journal's streams in store; other managers have what is stored here.
    assert storing >= count if SCOPE == "system" else storing == count
    for port, unit in units.items():
        assert {manager.pid} == ss_holders(manager, port)
        entry = ask(sdtool, port)
        if storing == 1 or situations.systemd() >= TELLS_STORES:
            assert ("owned", [(unit, "fd-store")]) == (entry["verdict"], owners(entry))
        else:
            assert ("owned", [("init.scope", "holder")]) == (entry["verdict"], owners(entry))
            assert entry["hint"]
        assert {manager.pid} == holders(entry)


def test_preserved_store_of_a_dead_service_is_its_own(
    sdtool: Client, situations: Situations, manager: Bench, port: int
) -> None:
    """FileDescriptorStorePreserve=yes, from systemd 254 on: it is stopped, and has the port."""
    service = "sdtool-t-preserve.service"
    words = " ".join(situations.argv(f"tcp=127.0.0.1:{port}", "store"))
    lines = ("Type=notify", "NotifyAccess=all", f"ExecStart={words}", "FileDescriptorStoreMax=4")
    text = "\n".join(("[Service]", *lines, "FileDescriptorStorePreserve=yes", ""))
    situations.link({service: text})
    situations.empty_store(service)
    situations.refer(service)
    situations.systemctl("start", service)
    situations.systemctl("stop", service)
    assert "inactive" == situations.show(service, "ActiveState")

    entry = ask(sdtool, port)
    rows = data(sdtool("ports", service, "--json"))

    if situations.systemd() >= TELLS_STORES:
        assert {manager.pid} == ss_holders(manager, port)
        assert ("owned", [(service, "fd-store")]) == (entry["verdict"], owners(entry))
        assert [(service, port, service)] == [
            (row["unit"], row["socket"]["port"], row["socket"]["fd_store_unit"]) for row in rows
        ]
    else:
        # An older one does not know the setting: what is stopped has nothing.
        assert set() == ss_holders(manager, port)
        assert ([], []) == (entry["owners"], rows)


# .socket units -------------------------------------------------------------------------------

LISTENS = {
    "tcp": "ListenStream=127.0.0.1:{}",
    "number": "ListenStream={}",
    "tcp6": "ListenStream=[::1]:{}",
    "udp": "ListenDatagram=127.0.0.1:{}",
}


@pytest.mark.parametrize("listen", LISTENS)
def test_socket_unit_owns_what_waits(
    sdtool: Client, situations: Situations, manager: Bench, port: int, listen: str
) -> None:
    """Not activated: the .socket, held by the manager; activated: the service as well."""
    unit = situations.start_socket("wait", LISTENS[listen].format(port))
    assert {manager.pid} == ss_holders(manager, port)
    waiting = ask(sdtool, port)
    service = unit.replace(".socket", ".service")
    situations.systemctl("start", service)
    running = ask(sdtool, port)

    assert ("owned", [(unit, "socket-unit")]) == (waiting["verdict"], owners(waiting))
    assert {manager.pid} == holders(waiting)
    assert unit == waiting["owners"][0]["socket"]["socket_unit"]
    assert [(service, "holder"), (unit, "socket-unit")] == owners(running)
    held = {o["unit"]: {holder["pid"] for holder in o["holders"]} for o in running["owners"]}
    assert {unit: {manager.pid}, service: {situations.main_pid(service)}} == held


def test_socket_unit_listens_on_its_device(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """BindToDevice=, which is written as part of the address."""
    unit = situations.start_socket("device", f"ListenStream={port}", "BindToDevice=lo")
    entry = ask(sdtool, port)
    assert [(unit, "socket-unit")] == owners(entry)
    assert ["lo"] == [owner["socket"]["device"] for owner in entry["owners"]]
    assert f" *%lo:{port} " in sdtool("port", str(port), "--color", "never").stdout


def test_stopped_socket_unit_owns_nothing(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Its service runs on, and has the port alone."""
    unit = situations.start_socket("stopped", f"ListenStream=127.0.0.1:{port}")
    service = unit.replace(".socket", ".service")
    situations.systemctl("start", service)
    situations.systemctl("stop", unit)
    entry = ask(sdtool, port)
    assert [(service, "holder")] == owners(entry)
    assert {situations.main_pid(service)} == holders(entry)


def test_accepting_socket_unit_owns_alone(
    sdtool: Client, situations: Situations, manager: Bench, port: int
) -> None:
    """Accept=yes: the instances have connections, which own nothing."""
    unit = situations.start_socket("accept", f"ListenStream=127.0.0.1:{port}", "Accept=yes")
    instances = ("list-units", "--state=running", "--plain", "--no-legend", "sdtool-t-accept@*")
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        eventually(lambda: situations.systemctl(*instances))
        entry = ask(sdtool, port)
    assert [(unit, "socket-unit")] == owners(entry)
    assert {manager.pid} == holders(entry)
    assert ["LISTEN"] == [owner["socket"]["state"] for owner in entry["owners"]]


@pytest.mark.parametrize("other", ["127.0.0.2:{}", "[::1]:{}"])
def test_socket_units_of_one_port_are_not_mixed_up(
    sdtool: Client, situations: Situations, port: int, other: str
) -> None:
    """Two .socket units listen on the same number, on two addresses."""
    listens = {"left": f"127.0.0.1:{port}", "right": other.format(port)}
    units = {
        listen: situations.start_socket(name, f"ListenStream={listen}")
        for name, listen in listens.items()
    }
    entry = ask(sdtool, port)
    found = {socket_address(owner["socket"]): owner["unit"] for owner in entry["owners"]}
    assert units == found


def socket_address(row: Row) -> str:
    """A socket's ADDRESS:PORT."""
    address = f"[{row['address']}]" if ":" in row["address"] else row["address"]
    return f"{address}:{row['port']}"


# Connections ---------------------------------------------------------------------------------

CLOSED = ("close=listening", "close=accepted")

BLOCKS: dict[str, tuple[tuple[str, ...], str]] = {
    "time wait": ((*CLOSED, "close=connected"), "TIME_WAIT"),
    "orphan": (CLOSED, "FIN_WAIT2"),
    "accepted": (CLOSED[:1], "ESTABLISHED"),
}
"""What is closed after a connection was accepted on the port, and what it is then."""


@pytest.mark.parametrize("what", BLOCKS)
def test_connection_blocks_the_port(
    sdtool: Client, situations: Situations, manager: Bench, port: int, what: str
) -> None:
    """Nobody listens, and it cannot be bound: with the time left, or with who has it."""
    closes, state = BLOCKS[what]
    address = f"127.0.0.1:{port}"
    unit = situations.start("block", f"tcp={address}", f"connect={address}", "accept", *closes)
    (shown,) = manager.run(["ss", "-Hant", f"sport = :{port}"]).stdout.splitlines()

    done = sdtool("port", str(port), "--json")

    (entry,) = data(done)
    (block,) = entry["blocked_by"]
    assert (1, "blocked", []) == (done.returncode, entry["verdict"], entry["owners"])
    assert (state, shown.split()[4]) == (block["state"], block["peer"])
    assert (namespace(), None) == (block["netns"], block["netns_name"])
    assert entry["hint"]
    if what == "accepted":
        assert (unit, None) == (block["unit"], block["expires_us"])
        assert [situations.main_pid(unit)] == [holder["pid"] for holder in block["holders"]]
    else:
        assert 0 < block["expires_us"] <= 60_000_000
        assert not block["holders"]


def test_blocked_port_is_told_beside_an_owner_of_the_other_protocol(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Who cannot bind TCP is not put off with a service that has the port of UDP."""
    address = f"127.0.0.1:{port}"
    closes, state = BLOCKS["time wait"]
    situations.start("block", f"tcp={address}", f"connect={address}", "accept", *closes)
    unit = situations.start("datagrams", f"udp={address}")
    done = sdtool("port", str(port), "--json")
    blocked, owned = data(done)
    assert (1, "tcp", "blocked") == (done.returncode, blocked["protocol"], blocked["verdict"])
    assert [state] == [block["state"] for block in blocked["blocked_by"]]
    assert ("udp", [(unit, "holder")]) == (owned["protocol"], owners(owned))


def test_connection_outside_every_unit_is_known_as_such(sdtool: Client, port: int) -> None:
    """Its process is named: there is no doubt whose it is."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.1", port))
        client.connect(server.getsockname())
        (block,) = ask(sdtool, port)["blocked_by"]
    assert [os.getpid()] == [holder["pid"] for holder in block["holders"]]
    assert block["unit_reason"] is None


def test_outgoing_connection_blocks_its_source_port(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """With the unit that made it; the unit that it goes to has nothing to do with it."""
    target = find_port()
    server = situations.start("server", f"tcp=127.0.0.1:{target}")
    step = f"connect=127.0.0.1:{port}>127.0.0.1:{target}"
    unit = situations.start("client", step)
    entry, listening = ask(sdtool, port), ask(sdtool, target)
    (block,) = entry["blocked_by"]
    assert ("blocked", []) == (entry["verdict"], owners(entry))
    assert (unit, "ESTABLISHED", f"127.0.0.1:{target}") == (
        block["unit"],
        block["state"],
        block["peer"],
    )
    assert [situations.main_pid(unit)] == [holder["pid"] for holder in block["holders"]]
    assert [(server, "holder")] == owners(listening)


def test_accepted_connections_own_nothing(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """With a listener on the port, its connections are neither owners nor in the way."""
    address = f"127.0.0.1:{port}"
    server = situations.start("server", f"tcp={address}", f"connect={address}", "accept")
    situations.start("client", f"connect={address}")
    entry = ask(sdtool, port)
    assert ("owned", [(server, "holder")]) == (entry["verdict"], owners(entry))
    assert ([], ["LISTEN"]) == (
        entry["blocked_by"],
        [owner["socket"]["state"] for owner in entry["owners"]],
    )


# Containers by their cgroup ------------------------------------------------------------------

ID = "0123456789abcdef" * 4
POD = "8f7e6d5c-4b3a-2918-0706-f5e4d3c2b1a0"
POD_SLICE = f"kubepods-besteffort-pod{POD.replace('-', '_')}.slice"

CONTAINERS: dict[str, tuple[str, str, Mapping[str, str | None]]] = {
    "docker": (f"docker-{ID}", "", {"runtime": "docker", "id": ID, "pod": None}),
    "podman": (f"libpod-{ID}", "", {"runtime": "podman", "id": ID, "pod": None}),
    "pod": (f"cri-containerd-{ID}", POD_SLICE, {"runtime": "containerd", "id": ID, "pod": POD}),
    "crio pod": (f"crio-{ID}", POD_SLICE, {"runtime": "crio", "id": ID, "pod": POD}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_container_is_named_beside_its_scope(
    sdtool: Client, situations: Situations, port: int, kind: str
) -> None:
    """Runtime, id and pod are in the names of the cgroups that runtimes make."""
    name, below, expected = CONTAINERS[kind]
    unit = situations.start_scope(f"{name}.scope", f"tcp=127.0.0.1:{port}", below=below)
    entry = ask(sdtool, port)
    (owner,) = entry["owners"]
    assert (unit, "holder", expected) == (owner["unit"], owner["via"], owner["container"])
    assert [(unit, expected)] == [(h["unit"], h["container"]) for h in owner["holders"]]
    assert expected == owner["socket"]["creator"]["container"]


# Without sock_diag, and with very many -------------------------------------------------------

NO_NETLINK = "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"


def test_proc_answers_where_netlink_may_not_be_spoken(situations: Situations) -> None:
    """The holder is found by /proc; what is not there may be bound all the same."""
    asked = {kind: find_port() for kind in ("tcp", "tcp6", "udp", "udp6", "bound")}
    absent = find_port()
    unit = situations.start("plain", *(f"{KINDS[kind][0]}:{port}" for kind, port in asked.items()))
    main = situations.main_pid(unit)

    ports = map(str, [*asked.values(), absent])
    rows = situations.ask_from("port", *ports, properties=[NO_NETLINK])

    found = dict(zip([*asked, "absent"], rows, strict=True))
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        (owner,) = found[kind]["owners"]
        assert (unit, "holder", "procfs") == (
            owner["unit"],
            owner["via"],
            owner["socket"]["source"],
        )
        assert [main] == [holder["pid"] for holder in owner["holders"]]
        assert {owner["socket"]["inode"]} <= inodes(main)
        expected = KINDS[kind][1]
        keys = ("family", "protocol", "type", "address", "state")
        assert [expected[key] for key in keys] == [owner["socket"][key] for key in keys]
    # Root may copy its descriptor, and name the namespace of the copy.
    if situations.is_root:
        (owner,) = found["bound"]["owners"]
        assert (unit, "pidfd_getfd") == (owner["unit"], owner["socket"]["source"])
    for kind in ("absent", *(["bound"] if not situations.is_root else [])):
        assert ("unknown", []) == (found[kind]["verdict"], found[kind]["owners"])
        assert found[kind]["hint"]


def test_two_thousand_sockets_are_all_there(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """In one unit, on one port: each once, each with its holder."""
    number = 2000
    unit = situations.start("many", f"many={number}:{port}", properties=["LimitNOFILE=4096"])
    main = situations.main_pid(unit)
    entry = ask(sdtool, f"{port}/tcp")
    rows = sockets_of(data(sdtool("ports", unit, "--json")), unit)
    assert ("owned", {(unit, "holder")}) == (entry["verdict"], set(owners(entry)))
    assert {main} == holders(entry)
    assert (number, number) == (len(rows), len({row["address"] for row in rows}))
    assert inodes(main) >= {row["inode"] for row in rows}
    assert {(main,)} == {tuple(holder["pid"] for holder in row["holders"]) for row in rows}


if SCOPE is None:  # once is enough of what takes so many processes

    def test_crowded_namespace_is_read_in_time(sdtool: Client, situations: Situations) -> None:
        """20,000 sockets of 1,000 processes: the table has all that listen, within 10 s."""
        unit = situations.crowd(20_000, 1_000)
        enter = ("nsenter", f"--net=/proc/{situations.main_pid(unit)}/ns/net", "ss", "-Hn")
        assert 20_000 <= len(situations.run(*enter, "-atu").splitlines())
        listening = situations.run(*enter, "-ltu").splitlines()

        began = time.monotonic()
        done = sdtool("ports", "--json")
        seconds = time.monotonic() - began

        assert (0, "") == (done.returncode, done.stderr)
        found = sockets_of(data(done), unit)
        expected = sorted((line.split()[0], line.split()[4]) for line in listening)
        assert expected == sorted((row["protocol"], socket_address(row)) for row in found)
        assert {1} == {len(row["holders"]) for row in found}
        assert {not unreadable()} == {row["holders_complete"] for row in found}
        assert seconds < 10
