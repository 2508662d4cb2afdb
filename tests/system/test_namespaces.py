"""Ports in other network namespaces, whatever it is that keeps the namespace alive."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdtool.sources.mounts import read_mounts
from sdtool.sources.namespaces import look_into, read_mounted_namespaces, read_namespaces
from sdtool.sources.processes import read_netns
from tests.machine import eventually, read
from tests.system.bench import Bench, Client
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
)

root = pytest.mark.capability("namespaces")

PRIVATE = "PrivateNetwork=yes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A listener in a namespace that is not ours, and all that is to be said of it.

    Attributes:
        port: Of tcp, on every address.
        path: Where the namespace can be entered; None when nowhere.
        lived_in: Whether a process is in it.
    """

    unit: str
    port: int
    netns: int
    holder: int
    name: str | None = None
    via: str = "holder"
    path: str | None = None
    lived_in: bool = False


Places = Mapping[str, Place]


def place_private(situations: Situations, port: int) -> Place:
    """In the namespace that the manager made for the unit."""
    unit = situations.start("private", f"tcp=0.0.0.0:{port}", properties=[PRIVATE])
    main = situations.main_pid(unit)
    path = f"/proc/{main}/ns/net"
    netns = namespace(main)
    return Place(unit=unit, port=port, netns=netns, holder=main, path=path, lived_in=True)


def place_joined(situations: Situations, port: int) -> Place:
    """In the namespace of another unit."""
    host = situations.start("host", properties=[PRIVATE])
    joins = [PRIVATE, f"JoinsNamespaceOf={host}"]
    unit = situations.start("joined", f"tcp=0.0.0.0:{port}", properties=joins)
    main = situations.main_pid(unit)
    path = f"/proc/{situations.main_pid(host)}/ns/net"
    netns = situations.namespace_of(path)
    return Place(unit=unit, port=port, netns=netns, holder=main, path=path, lived_in=True)


def place_named(situations: Situations, port: int) -> Place:
    """In a namespace with a name, in which the process lives."""
    path = situations.add_namespace("sdtool-t-lived-in")
    setting = f"NetworkNamespacePath={path}"
    unit = situations.start("named", f"tcp=[::]:{port}", properties=[setting])
    main = situations.main_pid(unit)
    return Place(
        unit=unit,
        port=port,
        netns=situations.namespace_of(path),
        holder=main,
        name="sdtool-t-lived-in",
        path=path,
        lived_in=True,
    )


def place_mounted(situations: Situations, port: int) -> Place:
    """In a namespace with a name, in which nobody lives: the manager listens there."""
    path = situations.add_namespace("sdtool-t-empty")
    listen = f"ListenStream=0.0.0.0:{port}"
    unit = situations.start_socket("mounted", listen, f"NetworkNamespacePath={path}")
    return Place(
        unit=unit,
        port=port,
        netns=situations.namespace_of(path),
        holder=situations.manager.pid,
        name="sdtool-t-empty",
        via="socket-unit",
        path=path,
    )


def place_nameless(situations: Situations, port: int) -> Place:
    """The same, mounted at a path that is no name."""
    path = situations.add_nameless_namespace()
    listen = f"ListenStream=[::]:{port}"
    unit = situations.start_socket("nameless", listen, f"NetworkNamespacePath={path}")
    netns = situations.namespace_of(path)
    holder = situations.manager.pid
    return Place(
        unit=unit, port=port, netns=netns, holder=holder, via="socket-unit", path=path, name=path
    )


def place_descriptor(situations: Situations, port: int) -> Place:
    """In a namespace that only the socket keeps alive: its process came back from there."""
    unit = situations.start("back", "netns=new", f"tcp=0.0.0.0:{port}", "netns=back")
    netns = int(situations.show(unit, "StatusText"))
    return Place(unit=unit, port=port, netns=netns, holder=situations.main_pid(unit))


KINDS = {
    "private": place_private,
    "joined": place_joined,
    "named": place_named,
    "mounted": place_mounted,
    "nameless": place_nameless,
    "descriptor": place_descriptor,
}


@pytest.fixture
def places(situations: Situations) -> Places:
    """One of each kind."""
    return {kind: place(situations, find_port()) for kind, place in KINDS.items()}


def lived_in() -> set[int]:
    """The network namespaces that some process lives in."""
    return {
        int(re.sub(r"\D", "", str(found)))
        for process in Path("/proc").glob("[0-9]*")
        if (found := _link(process / "ns/net"))
    }


def _link(path: Path) -> Path | None:
    try:
        return path.readlink()
    except OSError:
        return None


def where(socket: Row) -> tuple[int, int, str | None]:
    """Port and namespace of a socket."""
    return socket["port"], socket["netns"], socket["netns_name"]


@root
def test_situations_are_what_they_say(places: Places, manager: Bench) -> None:
    """By ss in each namespace that can be entered, and by the descriptors of the holder."""
    here = manager.run(["ss", "-Hlnt"]).stdout
    mounts = manager.run(["cat", "/proc/self/mountinfo"]).stdout
    for place in places.values():
        assert f":{place.port} " not in here
        assert place.netns != namespace()
        assert place.lived_in == (place.netns in lived_in())
        if place.path is None:
            assert f"net:[{place.netns}]" not in mounts
            assert 1 == len(inodes(place.holder) - all_inodes())
        else:
            enter = ["nsenter", f"--net={place.path}"]
            look = [*enter, "ss", "-Hlntp", f"sport = :{place.port}"]
            assert f"pid={place.holder}," in manager.run(look).stdout


def all_inodes() -> set[int]:
    """The inodes of the sockets of our own namespace: of the internet, unix and netlink."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "unix", "netlink")]
    return {int(word) for table in tables for word in table.split() if word.isdigit()}


@root
def test_port_has_its_owner_in_any_namespace(sdtool: Client, places: Places) -> None:
    """One question about one port, without saying where."""
    asked = [f"{place.port}/tcp" for place in places.values()]
    entries = dict(zip(places, data(sdtool("port", *asked, "--json")), strict=True))
    expected = {kind: ("owned", [(p.unit, p.via)], {p.holder}) for kind, p in places.items()}
    assert expected == {
        kind: (entry["verdict"], owners(entry), holders(entry)) for kind, entry in entries.items()
    }
    assert {kind: (p.port, p.netns, p.name) for kind, p in places.items()} == {
        kind: where(entry["owners"][0]["socket"]) for kind, entry in entries.items()
    }


@root
def test_ports_has_every_namespace(sdtool: Client, places: Places) -> None:
    """The whole table, and that of the units alone."""
    expected = {kind: [(p.port, p.netns, p.name)] for kind, p in places.items()}
    for units in ([], [place.unit for place in places.values()]):
        rows = data(sdtool("ports", *units, "--json"))
        assert expected == {
            kind: list(map(where, sockets_of(rows, p.unit))) for kind, p in places.items()
        }


@root
def test_trace_has_the_sockets_of_every_namespace(sdtool: Client, places: Places) -> None:
    """And nothing is said to be missing."""
    units = [place.unit for place in places.values()]
    traces = data(sdtool("trace", *units, "--json"))
    found = {
        kind: [where(s) for s in trace["sockets"] if s["family"] != "unix"]
        for kind, trace in zip(places, traces, strict=True)
    }
    assert {kind: [(p.port, p.netns, p.name)] for kind, p in places.items()} == found


@root
def test_list_has_the_ports_of_every_namespace(sdtool: Client, places: Places) -> None:
    """In the column PORTS."""
    rows = {row["name"]: row["ports"] for row in data(sdtool("list", "sdtool-t-*", "--json"))}
    expected = {place.unit: [f"{place.port}/tcp"] for place in places.values()}
    assert expected == {unit: rows[unit] for unit in expected}


@root
def test_process_without_its_main_thread_keeps_a_namespace_alive(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Its descriptors are those of a thread."""
    steps = ("netns=new", f"tcp=0.0.0.0:{port}", "netns=back", "leave")
    unit = situations.start("headless", *steps)
    main = situations.main_pid(unit)
    eventually(lambda: "State:\tZ" in read(Path(f"/proc/{main}/status")))
    entry = ask(sdtool, f"{port}/tcp")
    assert ("owned", [(unit, "holder")], {main}) == (
        entry["verdict"],
        owners(entry),
        holders(entry),
    )
    assert int(situations.show(unit, "StatusText")) == entry["owners"][0]["socket"]["netns"]


@root
def test_namespace_that_only_others_have_mounted_is_found(situations: Situations) -> None:
    """In a mount namespace that is neither PID 1's nor ours; and it can be entered."""
    path = situations.directory / "elsewhere"
    path.touch()
    script = f"unshare --net={path} true && exec sleep infinity"
    run = ["systemd-run", situations.flag, "--quiet", "--unit=sdtool-t-mounts"]
    situations.run(*run, "--property=PrivateMounts=yes", "sh", "-c", script)
    main = situations.main_pid("sdtool-t-mounts")
    # Until then a process of unshare(1) is in it, too.
    eventually(lambda: "sleep" in read(Path(f"/proc/{main}/comm")))
    assert read_mounts(main, "nsfs")
    known = {place.inode for place in read_namespaces().namespaces}
    (place,) = read_mounted_namespaces([main], known)
    assert str(path) == place.name
    assert [(place, place.inode)] == look_into([place], lambda: read_netns("thread-self"))


@root
def test_text_names_the_namespace(sdtool: Client, situations: Situations, port: int) -> None:
    """Who reads the answer is told that the port is not taken where they are."""
    place = place_named(situations, port)
    for command in (("port", f"{port}/tcp"), ("ports", place.unit), ("trace", place.unit)):
        assert "sdtool-t-lived-in" in sdtool(*command, "--color", "never").stdout


@root
def test_same_port_in_two_namespaces_has_two_owners(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """All are merged into one entry, in which each socket says where it is."""
    here = situations.start("here", f"tcp=0.0.0.0:{port}")
    there = place_private(situations, port)
    entry = ask(sdtool, f"{port}/tcp")
    assert [(here, "holder"), (there.unit, "holder")] == owners(entry)
    assert {here: namespace(), there.unit: there.netns} == {
        owner["unit"]: owner["socket"]["netns"] for owner in entry["owners"]
    }


@root
def test_question_from_inside_a_namespace_is_about_all(situations: Situations, port: int) -> None:
    """Asked in a unit with PrivateNetwork=yes: what is in the machine's own is seen from there."""
    unit = situations.start("outside", f"tcp=127.0.0.1:{port}")
    (entry,) = situations.ask_from("port", f"{port}/tcp", properties=[PRIVATE])
    assert ("owned", [(unit, "holder")]) == (entry["verdict"], owners(entry))
    assert namespace() == entry["owners"][0]["socket"]["netns"]


@root
@pytest.mark.capability("bound sockets")
def test_bound_and_datagram_sockets_are_found_elsewhere(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Bound without listening, and UDP: by their states, in another namespace."""
    steps = (f"tcp+bound=0.0.0.0:{port}", f"udp=[::]:{port}")
    unit = situations.start("kinds", *steps, properties=[PRIVATE])
    entries = data(sdtool("port", str(port), "--json"))
    assert {"tcp": "BOUND", "udp": "UNCONN"} == {
        entry["protocol"]: entry["owners"][0]["socket"]["state"] for entry in entries
    }
    assert [[(unit, "holder")]] * 2 == [owners(entry) for entry in entries]


@root
def test_connection_blocks_in_its_namespace(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """TIME_WAIT elsewhere: blocked, with the namespace in which it is so."""
    address = f"127.0.0.1:{port}"
    closes = ("close=listening", "close=accepted", "close=connected")
    steps = (f"tcp={address}", f"connect={address}", "accept", *closes)
    unit = situations.start("wait", *steps, properties=[PRIVATE])
    entry = ask(sdtool, f"{port}/tcp")
    (block,) = entry["blocked_by"]
    assert ("blocked", []) == (entry["verdict"], entry["owners"])
    assert ("TIME_WAIT", namespace(situations.main_pid(unit))) == (block["state"], block["netns"])
    assert 0 < block["expires_us"] <= 60_000_000


@root
@pytest.mark.parametrize("kind", ["private", "named", "descriptor"])
def test_stop_sees_the_port_released(
    sdtool: Client, situations: Situations, port: int, kind: str
) -> None:
    """The ports of a unit in another namespace go with it, and none is said to be held."""
    place = KINDS[kind](situations, port)
    (report,) = data(sdtool("stop", place.unit, "--json"))
    assert [("tcp", port)] == [(row["protocol"], row["port"]) for row in report["ports_released"]]
    assert ("clean", []) == (report["verdict"], report["ports_held"])


@root
def test_stop_sees_the_port_held_elsewhere(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """A child that stays has the port of its namespace, and keeps the namespace."""
    properties = [PRIVATE, "KillMode=process"]
    unit = situations.start("left", f"tcp=0.0.0.0:{port}", "fork=1", properties=properties)
    situations.refer(unit)
    (report,) = data(sdtool("stop", unit, "--json"))
    entry = ask(sdtool, f"{port}/tcp")
    assert ("leftover", []) == (report["verdict"], report["ports_released"])
    assert [("tcp", port)] == [(row["protocol"], row["port"]) for row in report["ports_held"]]
    assert [(unit, "holder")] == owners(entry)


# Without the privilege to look ---------------------------------------------------------------


def start_hidden(situations: Situations, port: int) -> str:
    """A listener in a new network namespace, into which nobody but root may go.

    An ordinary user has made it in a user namespace, outside of which it has no privilege in it.
    """
    new = "netns=new" if situations.is_root else "netns=user"
    unit = situations.start("hidden", new, f"tcp=0.0.0.0:{port}")
    assert namespace() != int(situations.show(unit, "StatusText"))
    return unit


@pytest.mark.capability("root")
@pytest.mark.parametrize("comes_back", [True, False])
def test_strangers_namespace_makes_a_port_unknown(
    sdtool_as_nobody: Client, situations: Situations, port: int, comes_back: bool
) -> None:
    """Never free or somebody else's, and what is missing is named."""
    steps = ("netns=new", f"tcp=0.0.0.0:{port}", *(["netns=back"] * comes_back))
    unit = situations.start("hidden", *steps)
    assert namespace() != int(situations.show(unit, "StatusText"))

    done = sdtool_as_nobody("port", f"{port}/tcp", "--json")

    (entry,) = data(done)
    assert (1, "unknown", []) == (done.returncode, entry["verdict"], entry["owners"])
    assert re.search(r"CAP_SYS_(ADMIN|PTRACE)", entry["hint"])


def test_own_namespace_has_its_port_seen(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """Its own user may not enter it either, and sees by /proc what listens there."""
    unit = start_hidden(situations, port)
    entry = ask(sdtool, f"{port}/tcp")
    (trace,) = data(sdtool("trace", unit, "--json"))
    (row,) = sockets_of(data(sdtool("ports", unit, "--json")), unit)
    assert ("owned", [(unit, "holder")]) == (entry["verdict"], owners(entry))
    assert {situations.main_pid(unit)} == holders(entry)
    assert [port] == [s["port"] for s in trace["sockets"] if s["family"] != "unix"]
    assert (port, int(situations.show(unit, "StatusText"))) == (row["port"], row["netns"])


def test_own_namespace_has_the_same_in_list_and_ports(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """What one table shows without a doubt is not unknown in the other."""
    unit = start_hidden(situations, port)
    (listed,) = data(sdtool("list", unit, "--json"))
    done = sdtool("ports", unit, "--json")
    assert (0, []) == (done.returncode, json.loads(done.stdout)["errors"])
    shown = [f"{row['port']}/tcp" for row in sockets_of(data(done), unit)]
    assert ([f"{port}/tcp"], None) == (listed["ports"], listed["ports_reason"])
    assert shown == listed["ports"]


def test_own_namespace_has_a_reason_for_what_is_not_seen(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """What /proc does not show there may be more than is told; root is told all there is."""
    unit = start_hidden(situations, port)
    (trace,) = data(sdtool("trace", unit, "--json"))
    if situations.is_root:
        assert trace["sockets_reason"] is None
    else:
        assert "CAP_SYS_ADMIN" in trace["sockets_reason"]


# Hard days -----------------------------------------------------------------------------------

TIMES = 20


def test_storm_of_namespaces_disturbs_nothing(
    sdtool: Client, situations: Situations, port: int
) -> None:
    """While processes and namespaces come and go: every table is whole, no row is foreign."""
    stable = situations.start("stable", f"tcp=127.0.0.1:{port}", "fork=2")
    storm = situations.start("storm", "storm=1")
    expected = [(stable, port, namespace())]
    for _ in range(TIMES):
        done = sdtool("ports", "--json")
        assert (0, "") == (done.returncode, done.stderr)
        rows = data(done)
        found = [(row["unit"], row["socket"]["port"], row["socket"]["netns"]) for row in rows]
        assert expected == [row for row in found if row[0] == stable]
        assert expected == [row for row in found if row[1] == port]
        seen = {row["unit"] for row in rows if row["unit"] and row["unit"].startswith("sdtool-t-")}
        assert seen <= {stable, storm}
    assert "active" == situations.show(storm, "ActiveState")
