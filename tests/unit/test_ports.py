"""Who owns a port, or what keeps it from being bound."""

from __future__ import annotations

import pytest

from sdtool.analysis.ownership import CREATOR_GONE
from sdtool.analysis.ports import doubt_unfound, judge_port, name_listeners
from sdtool.model.ports import PortSpec, PortVerdict
from sdtool.model.sockets import Holder, owns_port
from sdtool.model.unit import Unit
from tests.unit.make import GROUP, UNIT, joined, row, scan, socket, unit


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
    assert expected == owns_port(row(protocol=protocol, state=state))


def test_port_with_a_holder_is_owned() -> None:
    """The unit, the door and the socket."""
    look = scan((500, 30, GROUP))
    (answer,) = judge_port(PortSpec(port=80), [joined(row(), look)])
    assert (80, "tcp", PortVerdict.OWNED) == (answer.port, answer.protocol, answer.verdict)
    assert [UNIT] == [owner.unit for owner in answer.owners]


def test_port_of_both_protocols_has_two_answers() -> None:
    """DNS: one unit may have tcp, another udp."""
    rows = [row(), row(protocol="udp", type="dgram", state="UNCONN")]
    answers = judge_port(PortSpec(port=80), [joined(one) for one in rows])
    assert ["tcp", "udp"] == [answer.protocol for answer in answers]


def test_mptcp_counts_as_tcp() -> None:
    """A port is taken for tcp by an MPTCP listener."""
    rows = [row(protocol="mptcp")]
    (answer,) = judge_port(PortSpec(port=80, protocol="tcp"), [joined(one) for one in rows])
    assert ("tcp", PortVerdict.OWNED) == (answer.protocol, answer.verdict)


@pytest.mark.parametrize("protocol", [None, "tcp", "udp"])
def test_port_without_a_socket_is_free(protocol: str | None) -> None:
    """And it is said where was looked."""
    (answer,) = judge_port(PortSpec(port=80, protocol=protocol), [])
    assert (protocol, PortVerdict.FREE, ()) == (answer.protocol, answer.verdict, answer.owners)
    assert "nothing has it" in (answer.hint or "")


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
    (answer,) = judge_port(PortSpec(port=80), [joined(old)])
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
    (answer,) = judge_port(PortSpec(port=80), [joined(client, scan((500, 3, GROUP)))])
    assert (PortVerdict.BLOCKED, [UNIT]) == (answer.verdict, [b.unit for b in answer.blocked_by])


def test_port_with_neither_creator_nor_holder_is_unknown() -> None:
    """It is taken, and who has it is hidden: both reasons are said."""
    hidden = row(cgroup_id=99)
    look = scan(complete=False, reason="needs root")
    (answer,) = judge_port(PortSpec(port=80), [joined(hidden, look)])
    assert PortVerdict.UNKNOWN == answer.verdict
    assert f"{CREATOR_GONE}; needs root" == answer.hint


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
