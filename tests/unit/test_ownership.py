"""Who made a socket, and who holds it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.ownership import (
    CREATOR_GONE,
    doubt_kernel,
    explain_no_owners,
    join,
    listens_on,
    managers_of,
    name_units_behind,
)
from sdtool.analysis.ports import socket_owners
from sdtool.model.ports import Via
from sdtool.model.sockets import (
    Creator,
    FdStore,
    Holder,
    HolderScan,
    ListenAddress,
    ManagersSockets,
    Socket,
    SocketSource,
    SocketUnit,
)
from sdtool.model.unit import ManagerRoots
from tests.unit.make import CGROUPS, GROUP, INIT, UNIT, joined, row, scan, socket

ROOTS = ManagerRoots()
LINK_LOCAL = {"family": "inet6", "address": "fe80::1"}
USER = "/user.slice/user-1000.slice/user@1000.service"


def owners(found: Socket) -> list[tuple[str | None, Via]]:
    """(unit, door) of each owner."""
    return [(owner.unit, owner.via) for owner in socket_owners(found)]


def listening(name: str, netns: int | None = None) -> SocketUnit:
    """A .socket unit that listens on the address of ``row``."""
    listen = ListenAddress(type="Stream", address="127.0.0.1:80")
    return SocketUnit(name=name, listens=(listen,), netns=netns)


def behind(
    found: Socket,
    *units: SocketUnit,
    stores: tuple[FdStore, ...] = (),
    held: frozenset[int] | None = frozenset({500}),
) -> Socket:
    """The socket with what the system's manager holds it for."""
    managers = ManagersSockets(manager="system", pid=1, units=units, stores=stores, held=held)
    return name_units_behind([found], managers)[0]


def test_creator_and_holders_are_two_facts() -> None:
    """Made in web.service, held by a process of another unit."""
    found = joined(row(), scan((500, 30, "/system.slice/other.service")))
    assert Creator(unit=UNIT, manager="system", control_group=GROUP) == found.creator
    assert (Holder(pid=30, comm="p30", unit="other.service", manager="system"),) == found.holders
    assert [("other.service", Via.HOLDER)] == owners(found)


def test_creator_that_is_gone_has_a_reason() -> None:
    """A dead cgroup id, and a kernel that names none, are told apart."""
    gone, unnamed = joined(row(cgroup_id=99)), joined(row(cgroup_id=None))
    assert (None, CREATOR_GONE) == (gone.creator, gone.creator_reason)
    assert "the kernel names no creating cgroup for it" == unnamed.creator_reason


@pytest.mark.parametrize(
    ("ids", "cgroups", "look", "word"),
    [
        ([7], None, None, "cgroup v1"),
        ([7], None, scan((500, 30, GROUP)), None),
        ([], None, None, None),
        ([None, None], CGROUPS, None, "names no creating cgroup"),
        ([None, 7], CGROUPS, None, None),
        ([], CGROUPS, None, None),
    ],
)
def test_kernel_that_names_nobody_is_told(
    ids: list[int | None],
    cgroups: dict[int, str] | None,
    look: HolderScan | None,
    word: str | None,
) -> None:
    """Where of no socket the creator or a holder is known, the units' ports are not either."""
    reason = explain_no_owners(join([row(cgroup_id=one) for one in ids], cgroups, look, ROOTS))
    assert (word is None) == (reason is None)
    assert (word or "") in (reason or "")


def test_holders_nobody_looked_for_are_unknown() -> None:
    """None is not the same as nobody."""
    found = joined(row())
    assert (None, False) == (found.holders, found.holders_complete)
    assert "nobody looked" in (found.holders_reason or "")
    assert [(UNIT, Via.CREATOR)] == owners(found)


def test_hidden_holders_carry_their_reason() -> None:
    """What a permission hides is unknown, and the creator stands in."""
    found = joined(row(), scan(complete=False, reason="1 process may not be looked into"))
    assert (None, "1 process may not be looked into") == (found.holders, found.holders_reason)
    assert [(UNIT, Via.CREATOR)] == owners(found)


def test_orphan_has_no_holder() -> None:
    """A TIME_WAIT row has no inode: no process can hold it, and we know that without looking."""
    found = joined(row(inode=None, state="TIME_WAIT"))
    assert ((), True) == (found.holders, found.holders_complete)


def test_holders_of_one_unit_are_one_owner() -> None:
    """Four workers on one socket."""
    found = joined(row(), scan(*((500, pid, GROUP) for pid in range(30, 34))))
    assert 4 == len(found.holders or ())
    assert [(UNIT, Via.HOLDER)] == owners(found)


def test_process_outside_every_unit_is_an_owner() -> None:
    """A listener started from nowhere has no unit but it does own the port."""
    assert [(None, Via.HOLDER)] == owners(joined(row(cgroup_id=99), scan((500, 30, "/"))))


def test_socket_unit_that_listens_is_named() -> None:
    """Held by the manager: the .socket unit whose Listen= it is."""
    unit = listening("web.socket")
    found = behind(joined(row(cgroup_id=8), scan((500, 1, INIT))), unit)
    assert "web.socket" == found.socket_unit
    assert [("web.socket", Via.SOCKET_UNIT)] == owners(found)


def test_socket_unit_and_its_service_both_own() -> None:
    """After the activation the manager still holds the socket beside the service."""
    found = behind(joined(row(cgroup_id=9), scan((500, 1, INIT), (500, 30, GROUP))))
    assert [("web.socket", Via.SOCKET_UNIT), (UNIT, Via.HOLDER)] == owners(found)


def test_neighbour_of_the_manager_is_not_the_manager() -> None:
    """Docker exec, say, puts a process into init.scope: nothing is held for a unit there."""
    found = behind(joined(row(cgroup_id=8), scan((500, 7, INIT))), listening("web.socket"))
    assert [("init.scope", Via.HOLDER)] == owners(found)


def test_store_that_is_told_comes_before_an_address() -> None:
    """A .socket may have the same one (ReusePort=)."""
    kept = (FdStore(unit="a.service", inodes=frozenset({500})),)
    made = joined(row(cgroup_id=99), scan((500, 1, INIT)))
    assert "a.service" == behind(made, listening("web.socket"), stores=kept).fd_store_unit


def test_kernel_is_doubted_where_others_live_in_the_root() -> None:
    """A socket on its way between processes is held by nobody either."""
    found = joined(row(protocol="udp", type="dgram", state="UNCONN", cgroup_id=1), scan())
    (doubted,) = doubt_kernel([found])
    assert [] == owners(doubted)
    assert "on its way" in (doubted.holders_reason or "")
    assert (joined(row()),) == doubt_kernel([joined(row())])


def test_socket_of_the_kernel_is_its_own_door() -> None:
    """VXLAN, WireGuard, nfsd: an inode, the root cgroup, and no holder."""
    found = joined(row(protocol="udp", type="dgram", state="UNCONN", cgroup_id=1), scan())
    assert [(None, Via.KERNEL)] == owners(found)


@pytest.mark.parametrize(
    ("listen", "fields", "expected"),
    [
        (("Stream", "127.0.0.1:80"), {}, True),
        (("Stream", "127.0.0.1:81"), {}, False),
        (("Stream", "0.0.0.0:80"), {}, False),
        (("Datagram", "127.0.0.1:80"), {}, False),
        (("Datagram", "127.0.0.1:80"), {"protocol": "udp", "type": "dgram"}, True),
        (("Stream", "[::]:80"), {"family": "inet6", "address": "::"}, True),
        (("Stream", "[fe80::1%eth0]:80"), LINK_LOCAL, True),
        (("Stream", "[fe80::1]:80%eth0"), LINK_LOCAL, True),
        (("Stream", "/run/web.sock"), {}, False),
        (("Stream", "@abstract"), {}, False),
        (("Stream", "/run/web.sock"), {"family": "unix", "path": "/run/web.sock"}, True),
        (("Stream", "@abstract"), {"family": "unix", "path": "@abstract"}, True),
        (("Stream", "/run/web.sock"), {"family": "unix", "path": None}, False),
        (
            ("SequentialPacket", "/run/web.sock"),
            {"family": "unix", "type": "seqpacket", "path": "/run/web.sock"},
            True,
        ),
        (("FIFO", "/run/80"), {}, False),
    ],
)
def test_listen_line_is_matched_by_address_and_type(
    listen: tuple[str, str], fields: dict[str, object], expected: bool
) -> None:
    """Addresses are written as "127.0.0.1:80" and "[::]:80"."""
    line = ListenAddress(type=listen[0], address=listen[1])
    assert expected == listens_on(line, socket(**fields))


@pytest.mark.parametrize(
    ("units", "fields", "expected"),
    [
        ({"a.socket": "eth0"}, {"device": "eth0"}, "a.socket"),
        ({"a.socket": "eth0"}, {"device": "eth1"}, None),
        ({"a.socket": "eth0"}, {"device": "if7"}, None),
        ({"a.socket": "eth0"}, {}, None),
        ({"a.socket": None}, {"device": "eth0"}, None),
        ({"a.socket": "eth0"}, {"source": SocketSource.PROCFS}, "a.socket"),
        ({"a.socket": "eth0", "b.socket": "eth1"}, {"device": "eth0"}, None),
    ],
)
def test_socket_unit_is_of_its_device(
    units: dict[str, str | None], fields: dict[str, object], expected: str | None
) -> None:
    """BindToDevice=; one that was renamed may bear the name of another unit's by now."""
    made = joined(row(cgroup_id=8, **fields), scan((500, 1, INIT)))
    known = [replace(listening(name), device=device) for name, device in units.items()]
    assert expected == behind(made, *known).socket_unit


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("[fe80::1%eth0]:80", "web.socket"),
        ("[fe80::1]:80%eth0", "web.socket"),
        ("[fe80::1]:80%eth1", None),
    ],
)
def test_socket_unit_is_of_the_device_of_its_address(address: str, expected: str | None) -> None:
    """A link-local address binds to its link."""
    made = joined(row(cgroup_id=8, device="eth0", **LINK_LOCAL), scan((500, 1, INIT)))
    listen = ListenAddress(type="Stream", address=address)
    assert expected == behind(made, SocketUnit(name="web.socket", listens=(listen,))).socket_unit


def test_what_a_service_made_is_of_no_socket_unit() -> None:
    """SO_REUSEPORT lets it have a .socket's address; in the only store it must be its own."""
    made = joined(row(), scan((500, 1, INIT)))
    assert (None, None) == (
        behind(made, listening("web.socket")).socket_unit,
        behind(made, listening("web.socket")).fd_store_unit,
    )
    store = FdStore(unit=UNIT, inodes=None)
    assert UNIT == behind(made, listening("web.socket"), stores=(store,)).fd_store_unit


@given(st.text(max_size=30))
def test_any_listen_line_is_read(address: str) -> None:
    """A Listen= of tomorrow is at worst not ours."""
    assert not listens_on(ListenAddress(type="Stream", address=address + "!"), socket())


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([("a.socket", None)], "a.socket"),
        ([("a.socket", 1)], "a.socket"),
        ([("a.socket", 2)], None),
        ([("a.socket", 2), ("b.socket", 1)], "b.socket"),
        ([("a.socket", 1), ("b.socket", 1)], None),
        ([], None),
    ],
)
def test_socket_unit_is_of_the_same_namespace(
    units: list[tuple[str, int | None]], expected: str | None
) -> None:
    """One address can be in several namespaces; where two units fit nobody can say."""
    made = joined(row(cgroup_id=8), scan((500, 1, INIT)))
    assert expected == behind(made, *(listening(*unit) for unit in units)).socket_unit


@pytest.mark.parametrize(
    ("stores", "expected"),
    [
        ([("a.service", {500})], "a.service"),
        ([("a.service", {501})], None),
        ([("a.service", {501}), ("b.service", {500})], "b.service"),
        ([("a.service", None)], "a.service"),
        ([("a.service", None), ("b.service", None)], None),
        ([], None),
    ],
)
def test_fd_store_is_named_where_it_is_certain(
    stores: list[tuple[str, set[int] | None]], expected: str | None
) -> None:
    """By the inode; where the manager does not tell it, only one store can be meant."""
    kept = tuple(
        FdStore(unit=unit, inodes=None if inodes is None else frozenset(inodes))
        for unit, inodes in stores
    )
    found = behind(joined(row(cgroup_id=99), scan((500, 1, INIT))), stores=kept)
    assert expected == found.fd_store_unit
    door = (expected, Via.FD_STORE) if expected else ("init.scope", Via.HOLDER)
    assert [door] == owners(found)


@pytest.mark.parametrize(
    ("unit", "held"),
    [
        (replace(listening("web.socket"), device="eth0"), {500}),
        (replace(listening("web.socket"), namespace_path="/run/netns/remade"), {500}),
        (replace(listening("web.socket"), is_inactive=True), {500}),
        (None, set()),
        (None, None),
    ],
)
def test_fd_store_is_no_refuge_for_what_is_not_understood(
    unit: SocketUnit | None, held: set[int] | None
) -> None:
    """A .socket names its port, though it does not fit; or the manager has let go of it."""
    found = behind(
        joined(row(cgroup_id=99), scan((500, 1, INIT))),
        *([unit] if unit else []),
        stores=(FdStore(unit="a.service", inodes=None),),
        held=None if held is None else frozenset(held),
    )
    assert (None, None) == (found.fd_store_unit, found.socket_unit)


def test_socket_unit_says_what_it_starts() -> None:
    """So that of a service it is known that it may have got a socket."""
    unit = replace(listening("web.socket"), triggers=("web.service",))
    made = joined(row(cgroup_id=8), scan((500, 1, INIT)))
    assert ("web.socket", ("web.service",)) == (
        behind(made, unit).socket_unit,
        behind(made, unit).activates,
    )
    assert None is behind(made, replace(unit, is_inactive=True)).socket_unit


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "unix", "protocol": "unix", "path": "/run/systemd/private"},
        {"state": "ESTABLISHED", "peer_address": "10.0.0.1", "peer_port": 9},
    ],
)
def test_fd_store_is_no_guess(fields: dict[str, object]) -> None:
    """A manager has sockets of its own, and keeps the connections of Accept=yes."""
    kept = (FdStore(unit="a.service", inodes=None),)
    found = behind(joined(row(cgroup_id=99, **fields), scan((500, 1, INIT))), stores=kept)
    assert (None, None) == (found.fd_store_unit, found.behind_manager)


@pytest.mark.parametrize(
    ("path", "elsewhere", "expected"),
    [(None, False, "web.socket"), (None, True, None), ("/run/netns/x", False, None)],
)
def test_socket_unit_of_an_unknown_namespace_is_here_or_nowhere(
    path: str | None, elsewhere: bool, expected: str | None
) -> None:
    """Where the manager is hidden it is taken to be where we are; a lost mount is nowhere."""
    made = joined(row(cgroup_id=8, elsewhere=elsewhere), scan((500, 1, INIT)))
    unit = replace(listening("web.socket"), namespace_path=path)
    assert expected == behind(made, unit).socket_unit


def test_manager_is_asked_about_what_it_holds() -> None:
    """Each once: the system's, and a user's."""
    user = f"{USER}/init.scope"
    look = scan((500, 1, INIT), (500, 2, user), (500, 3, GROUP))
    assert ["system", "user@1000.service"] == managers_of([joined(row(cgroup_id=8), look)])
    assert [] == managers_of([joined(row())])


def test_mptcp_listener_is_one_socket() -> None:
    """Its TCP part has the same inode; another TCP socket is another one."""
    rows = [row(), row(protocol="mptcp", cookie=2), row(inode=501, cookie=3)]
    found = [(one.protocol, one.inode) for one in join(rows, CGROUPS, None, ROOTS)]
    assert [("mptcp", 500), ("tcp", 501)] == found


def test_holder_outside_our_pid_namespace_may_be_there() -> None:
    """Nobody seen is nobody only where everybody can be seen."""
    found = joined(row(), scan(outside=True))
    assert (None, False) == (found.holders, found.holders_complete)
    assert "pid namespace" in (found.holders_reason or "")
