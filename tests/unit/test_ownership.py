"""Who owns a cgroup, a socket, a port."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.ownership import (
    doubt_unfound,
    explain_no_creators,
    join,
    judge_port,
    listens_on,
    name_listeners,
    owns,
    read_container,
    read_path,
    socket_owners,
)
from sdtool.model.process import Container
from sdtool.model.sockets import (
    Creator,
    Holder,
    HolderScan,
    ListenAddress,
    PortSpec,
    PortVerdict,
    Socket,
    SocketFacts,
    SocketUnit,
    Via,
)
from sdtool.model.unit import CgroupOwner, ManagerRoots, Unit
from tests.unit.make import GROUP, UNIT, row, scan, socket, unit

ROOTS = ManagerRoots()
HEX = "0123456789abcdef" * 4
INIT = "/init.scope"
USER = "/user.slice/user-1000.slice/user@1000.service"

CGROUPS = {1: "/", 7: GROUP, 8: INIT, 9: "/system.slice/web.socket"}


def joined(
    rows: SocketFacts | list[SocketFacts],
    look: HolderScan | None = None,
    units: tuple[SocketUnit, ...] = (),
) -> Socket:
    """One socket with its owners."""
    (found,) = join([rows] if isinstance(rows, SocketFacts) else rows, CGROUPS, look, units, ROOTS)
    return found


def owners(found: Socket) -> list[tuple[str | None, Via]]:
    """(unit, door) of each owner."""
    return [(owner.unit, owner.via) for owner in socket_owners(found)]


# Cgroups -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", CgroupOwner()),
        ("/init.scope", CgroupOwner(unit="init.scope")),
        (GROUP, CgroupOwner(unit=UNIT, slice="system.slice")),
        (f"{GROUP}/worker/1", CgroupOwner(unit=UNIT, slice="system.slice")),
        (
            "/system.slice/system-getty.slice/getty@tty1.service",
            CgroupOwner(unit="getty@tty1.service", slice="system-getty.slice"),
        ),
        (
            "/user.slice/user-1000.slice/session-c2.scope",
            CgroupOwner(unit="session-c2.scope", slice="user-1000.slice", session="c2"),
        ),
        (
            f"{USER}/app.slice/a.service",
            CgroupOwner(unit="user@1000.service", user_unit="a.service", slice="app.slice"),
        ),
        (
            f"{USER}/init.scope",
            CgroupOwner(unit="user@1000.service", user_unit="init.scope", slice="user-1000.slice"),
        ),
        (USER, CgroupOwner(unit="user@1000.service", slice="user-1000.slice")),
        ("/system.slice", CgroupOwner(slice="system.slice")),
        ("/kubepods/pod1/abc", CgroupOwner()),
        ("/_cpu.service", CgroupOwner(unit="cpu.service")),
    ],
)
def test_path_is_read_as_logind_does(path: str, expected: CgroupOwner) -> None:
    """The unit is the first component below the slices, and again below a user manager."""
    assert expected == read_path(path, ROOTS)


def test_root_of_the_manager_is_cut_off() -> None:
    """In a container the system manager's units are below its own cgroup."""
    roots = ManagerRoots(system="/machine.slice/box")
    inside = read_path(f"/machine.slice/box{GROUP}", roots)
    assert CgroupOwner(unit=UNIT, slice="system.slice") == inside
    assert CgroupOwner() == read_path("/machine.slice/boxer/system.slice/x.service", roots)


def test_asked_user_manager_may_sit_anywhere() -> None:
    """A user manager's units are those below the cgroup that it names."""
    roots = ManagerRoots(user="/box/manager")
    found = read_path("/box/manager/app.slice/a.service/sub", roots)
    assert CgroupOwner(user_unit="a.service", slice="app.slice", asked=True) == found


components = st.sampled_from(
    (
        *("system.slice", "a-b.slice", "_x.slice", ".slice", "slice", "a.slice.d", "payload"),
        *("a.service", "user@1000.service", "init.scope", "session-1.scope", "web.socket", ""),
    )
)
paths = st.lists(components, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(paths, st.sampled_from([None, "/", "/system.slice", "/user@1000.service"]))
def test_slice_is_never_a_unit_of_a_process(path: str, user_root: str | None) -> None:
    """A process in a slice itself is managed by nobody."""
    owner = read_path(path, ManagerRoots(user=user_root))
    for name in (owner.unit, owner.user_unit, owner.innermost):
        assert name is None or not name.endswith(".slice")
    assert owner.slice is None or owner.slice.endswith(".slice")


@given(st.text(max_size=40))
def test_any_path_is_read(path: str) -> None:
    """Names in the cgroup tree are anybody's choice."""
    read_path(path, ROOTS)
    read_container(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (GROUP, None),
        (f"/system.slice/docker-{HEX}.scope", Container(runtime="docker", id=HEX)),
        (f"/docker/{HEX}", Container(runtime="docker", id=HEX)),
        (f"/machine.slice/libpod-{HEX}.scope/container", Container(runtime="podman", id=HEX)),
        (f"/machine.slice/libpod-conmon-{HEX}.scope", None),
        (
            "/kubepods.slice/kubepods-burstable.slice/"
            "kubepods-burstable-pod01234567_89ab_cdef_0123_456789abcdef.slice/"
            f"cri-containerd-{HEX}.scope",
            Container(runtime="containerd", id=HEX, pod="01234567-89ab-cdef-0123-456789abcdef"),
        ),
        (
            "/machine.slice/systemd-nspawn@box.service",
            Container(runtime="nspawn", id="box"),
        ),
        ("/machine.slice/machine-box.scope", Container(runtime="nspawn", id="box")),
    ],
)
def test_container_is_told_by_its_path(path: str, expected: Container | None) -> None:
    """The names that runtimes give to cgroups."""
    assert expected == read_container(path)


@pytest.mark.parametrize(
    "path",
    [
        "/machine.slice/systemd-nspawn@box.service/payload/system.slice/web.service",
        "/machine.slice/machine-box.scope/payload/init.scope",
    ],
)
def test_name_of_a_container_ends_with_its_own_component(path: str) -> None:
    """A container with units of its own has further services and scopes below."""
    assert Container(runtime="nspawn", id="box") == read_container(path)


# Sockets -------------------------------------------------------------------------------------


def test_creator_and_holders_are_two_facts() -> None:
    """Made in web.service, held by a process of another unit."""
    found = joined(row(), scan((500, 30, "/system.slice/other.service")))
    assert Creator(unit=UNIT, manager="system", control_group=GROUP) == found.creator
    assert (Holder(pid=30, comm="p30", unit="other.service", manager="system"),) == found.holders
    assert [("other.service", Via.HOLDER)] == owners(found)


def test_creator_that_is_gone_has_a_reason() -> None:
    """A dead cgroup id, and a kernel that names none, are told apart."""
    gone, unnamed = joined(row(cgroup_id=99)), joined(row(cgroup_id=None))
    assert (None, "the cgroup that created it is gone") == (gone.creator, gone.creator_reason)
    assert "the kernel names no creating cgroup for it" == unnamed.creator_reason


@pytest.mark.parametrize(
    ("ids", "cgroups", "word"),
    [
        ([7], None, "cgroup v1"),
        ([], None, "cgroup v1"),
        ([None, None], CGROUPS, "Linux 5.9"),
        ([None, 7], CGROUPS, None),
        ([99], CGROUPS, None),
        ([], CGROUPS, None),
    ],
)
def test_kernel_that_names_no_creator_is_told(
    ids: list[int | None], cgroups: dict[int, str] | None, word: str | None
) -> None:
    """On cgroup v1 and where no socket has an id; one that is gone is another matter."""
    reason = explain_no_creators([row(cgroup_id=one) for one in ids], cgroups)
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
    unit = SocketUnit(
        name="web.socket", listens=(ListenAddress(type="Stream", address="127.0.0.1:80"),)
    )
    found = joined(row(cgroup_id=8), scan((500, 1, INIT)), (unit,))
    assert "web.socket" == found.socket_unit
    assert [("web.socket", Via.SOCKET_UNIT)] == owners(found)


def test_socket_unit_and_its_service_both_own() -> None:
    """After the activation the manager still holds the socket beside the service."""
    found = joined(row(cgroup_id=9), scan((500, 1, INIT), (500, 30, GROUP)))
    assert [("web.socket", Via.SOCKET_UNIT), (UNIT, Via.HOLDER)] == owners(found)


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
        (("Stream", "[fe80::1%eth0]:80"), {"family": "inet6", "address": "fe80::1"}, True),
        (("Stream", "/run/web.sock"), {}, False),
        (("Stream", "@abstract"), {}, False),
        (("FIFO", "/run/80"), {}, False),
    ],
)
def test_listen_line_is_matched_by_address_and_type(
    listen: tuple[str, str], fields: dict[str, object], expected: bool
) -> None:
    """Addresses are written as "127.0.0.1:80" and "[::]:80"."""
    line = ListenAddress(type=listen[0], address=listen[1])
    assert expected == listens_on(line, row(**fields))


@given(st.text(max_size=30))
def test_any_listen_line_is_read(address: str) -> None:
    """A Listen= of tomorrow is at worst not ours."""
    assert not listens_on(ListenAddress(type="Stream", address=address + "!"), row())


# Ports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "state", "expected"),
    [
        ("tcp", "LISTEN", True),
        ("tcp", "BOUND", True),
        ("tcp", "ESTABLISHED", False),
        ("tcp", "TIME_WAIT", False),
        ("mptcp", "LISTEN", True),
        ("udp", "UNCONN", True),
        ("udp", "ESTABLISHED", True),
    ],
)
def test_accepted_connection_owns_no_port(protocol: str, state: str, expected: bool) -> None:
    """Only who listens, or has bound it, does."""
    assert expected == owns(row(protocol=protocol, state=state))


def test_port_with_a_holder_is_owned() -> None:
    """The unit, the door and the socket."""
    look = scan((500, 30, GROUP))
    (answer,) = judge_port(PortSpec(port=80), [row()], [joined(row(), look)])
    assert (80, "tcp", PortVerdict.OWNED) == (answer.port, answer.protocol, answer.verdict)
    assert [UNIT] == [owner.unit for owner in answer.owners]


def test_port_of_both_protocols_has_two_answers() -> None:
    """DNS: one unit may have tcp, another udp."""
    rows = [row(), row(protocol="udp", type="dgram", state="UNCONN")]
    answers = judge_port(PortSpec(port=80), rows, [joined(one) for one in rows])
    assert ["tcp", "udp"] == [answer.protocol for answer in answers]


def test_mptcp_counts_as_tcp() -> None:
    """A port is taken for tcp by an MPTCP listener."""
    rows = [row(protocol="mptcp")]
    (answer,) = judge_port(PortSpec(port=80, protocol="tcp"), rows, [joined(rows)])
    assert ("tcp", PortVerdict.OWNED) == (answer.protocol, answer.verdict)


@pytest.mark.parametrize("protocol", [None, "tcp", "udp"])
def test_port_without_a_socket_is_free(protocol: str | None) -> None:
    """And it is said where was looked."""
    (answer,) = judge_port(PortSpec(port=80, protocol=protocol), [], [])
    assert (protocol, PortVerdict.FREE, ()) == (answer.protocol, answer.verdict, answer.owners)
    assert "namespace" in (answer.hint or "")


def test_port_of_old_connections_is_blocked() -> None:
    """TIME_WAIT: nobody owns it, and it says how long still."""
    old = row(
        state="TIME_WAIT",
        inode=None,
        cgroup_id=None,
        expires_us=59_888_000,
        peer_address="::1",
        peer_port=4000,
    )
    (answer,) = judge_port(PortSpec(port=80), [old], [joined(old)])
    assert PortVerdict.BLOCKED == answer.verdict
    (block,) = answer.blocked_by
    assert ("TIME_WAIT", 59_888_000, "[::1]:4000", None) == (
        block.state,
        block.expires_us,
        block.peer,
        block.unit,
    )
    assert "in 60 s" in (answer.hint or "")


def test_port_used_by_a_client_names_the_client() -> None:
    """An outgoing connection from this port blocks it: the client's unit is to blame."""
    client = row(state="ESTABLISHED", peer_address="10.0.0.1", peer_port=443)
    (answer,) = judge_port(PortSpec(port=80), [client], [joined(client, scan((500, 3, GROUP)))])
    assert (PortVerdict.BLOCKED, [UNIT]) == (answer.verdict, [b.unit for b in answer.blocked_by])


def test_port_with_neither_creator_nor_holder_is_unknown() -> None:
    """It is taken, and who has it is hidden: both reasons are said."""
    hidden = row(cgroup_id=99)
    look = scan(complete=False, reason="needs root")
    (answer,) = judge_port(PortSpec(port=80), [hidden], [joined(hidden, look)])
    assert PortVerdict.UNKNOWN == answer.verdict
    assert "the cgroup that created it is gone; needs root" == answer.hint


def holder(pid: int, unit: str) -> Holder:
    """A process of a system unit that holds a socket."""
    return Holder(pid=pid, comm="x", unit=unit, manager="system")


def test_listeners_are_sorted_by_unit_then_port() -> None:
    """Those without a unit come last."""
    look = {
        pid: (Holder(pid=pid, comm="x", unit=unit, manager="system"),)
        for pid, unit in [(1, "b"), (2, "a")]
    }
    rows = [
        socket(port=90, holders=look[1]),
        socket(port=80, creator_reason="gone"),
        socket(port=70, holders=look[1]),
        socket(port=99, holders=look[2]),
    ]
    named = [(entry.unit, entry.socket.port) for entry in name_listeners(rows)]
    assert [("a", 99), ("b", 70), ("b", 90), (None, 80)] == named


def test_shared_socket_is_listed_for_each_owner() -> None:
    """SO_REUSEPORT or a passed descriptor: a line for each unit."""
    both = (
        Holder(pid=1, comm="x", unit="b", manager="system"),
        Holder(pid=2, comm="x", unit="a", manager="system"),
    )
    assert ["a", "b"] == [entry.unit for entry in name_listeners([socket(holders=both)])]


OWNED = (socket(holders=(holder(1, "a"),)), socket(holders=(), holders_complete=True))
HIDDEN = socket(creator_reason="cgroup v1", holders_reason="needs root")
RUNS = unit(control_group=GROUP)
LISTENS = unit("web.socket", sub_state="listening")


def test_socket_of_nobody_known_may_be_any_running_units() -> None:
    """Of those of which none was found; the sentence says why it is not known."""
    rows = name_listeners([*OWNED, HIDDEN, HIDDEN])
    (doubt,) = doubt_unfound([RUNS, unit("a", control_group="/a")], {"a"}, rows)
    assert UNIT == doubt.subject
    why = "the owner of 2 sockets is not known: cgroup v1; needs root"
    assert f"Whether {UNIT} listens is not known: {why}." == str(doubt)


def test_unit_without_sockets_is_no_doubt_where_all_have_owners() -> None:
    """Sockets with an owner say nothing about others, nor do those known to have none."""
    assert () == doubt_unfound([RUNS, LISTENS], (), name_listeners(OWNED))


@pytest.mark.parametrize(
    ("asked", "doubtful"),
    [
        (RUNS, True),
        (unit(active_state="inactive"), False),
        (unit(active_state="failed"), False),
        (unit(active_state="failed", control_group=GROUP), True),
        (unit("multi-user.target"), False),
        (unit("system.slice", control_group="/system.slice"), False),
        (unit("session-1.scope", control_group="/session-1.scope"), True),
        (LISTENS, True),
        (unit("web.socket", active_state="activating"), True),
        (unit("web.socket", active_state="inactive"), False),
        (unit("web.socket", active_state="failed"), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else f"{value.name}-{value.active_state}",
)
def test_only_a_unit_that_can_listen_is_doubtful(asked: Unit, doubtful: bool) -> None:
    """It has a cgroup for its processes, left-over ones too, or the manager listens for it."""
    assert doubtful == bool(doubt_unfound([asked], (), name_listeners([HIDDEN])))
