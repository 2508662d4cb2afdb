"""Lines of /proc/net recorded from a kernel 6.18, and what must survive odd ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.sockets import SocketFacts, SocketFilter, SocketSource, SocketStates
from sdtool.sources.procnet import parse_inet, read_sockets
from tests.unit.make import captured


def recorded(name: str, wanted: SocketFilter | None = None) -> list[SocketFacts]:
    """The sockets of a recorded file."""
    protocol, family = name.rstrip("6"), "inet6" if name.endswith("6") else "inet"
    data = captured(f"linux-6.18/net/{name}")
    return list(parse_inet(data, protocol, family, wanted or SocketFilter(), 1))


@pytest.mark.parametrize(
    ("name", "address", "port", "state", "inode"),
    [
        ("tcp", "127.0.0.1", 8001, "LISTEN", 13310073),
        ("tcp6", "::1", 8002, "LISTEN", 13310074),
        ("tcp6", "::", 8003, "LISTEN", 13310075),
        ("udp", "0.0.0.0", 8004, "UNCONN", 13310076),
        ("udp6", "::ffff:127.0.0.1", 8005, "UNCONN", 13310077),
    ],
)
def test_recorded_line_is_read(name: str, address: str, port: int, state: str, inode: int) -> None:
    """Addresses are words of the machine's byte order; neither creator nor cookie is told."""
    (row,) = recorded(name, SocketFilter(port=port, states=SocketStates.LISTENING))
    assert (address, port, state, inode) == (row.address, row.port, row.state, row.inode)
    assert (None, SocketSource.PROCFS, 1) == (row.cgroup_id, row.source, row.netns)


def test_owner_of_a_line_is_its_user() -> None:
    """The uid stands beside the inode."""
    uids = {
        row.port: row.uid for row in recorded("tcp", SocketFilter(states=SocketStates.LISTENING))
    }
    assert {8001: 0, 8006: 0, 8008: 1000} == uids


def test_connection_has_its_peer() -> None:
    """Both ends on the loopback device, one line each."""
    peers = {row.port: row.peer_port for row in recorded("tcp") if row.state == "ESTABLISHED"}
    assert {8001: 47516, 47516: 8001} == peers


def test_time_wait_says_how_long_still() -> None:
    """In clock ticks; nobody holds it."""
    (row,) = [row for row in recorded("tcp") if row.state == "TIME_WAIT"]
    assert (8008, None, 60_000_000) == (row.port, row.inode, row.expires_us)


def test_socket_that_does_not_listen_is_not_a_listener() -> None:
    """Of TCP only LISTEN, of UDP only what has no peer."""
    assert {"LISTEN"} == {
        row.state for row in recorded("tcp", SocketFilter(states=SocketStates.LISTENING))
    }
    assert {"UNCONN"} == {
        row.state for row in recorded("udp", SocketFilter(states=SocketStates.LISTENING))
    }


@given(st.binary(max_size=200))
def test_any_lines_are_read(data: bytes) -> None:
    """What is no line of a socket is passed over."""
    for row in parse_inet(b"head\n" + data, "tcp", "inet", SocketFilter(), None):
        assert 0 <= (row.port or 0)


@given(st.integers(0, 600), st.binary(max_size=30))
def test_damaged_line_harms_no_other(at: int, junk: bytes) -> None:
    """Each line stands for itself."""
    data = captured("linux-6.18/net/tcp")
    lines = data.split(b"\n")
    damaged = b"\n".join(
        (lines[0], data[:at].split(b"\n")[-1] + junk.replace(b"\n", b""), *lines[1:])
    )
    rows = parse_inet(damaged, "tcp", "inet", SocketFilter(), 1)
    assert {row.inode for row in recorded("tcp")} <= {row.inode for row in rows}


def test_process_that_is_gone_tells_nothing() -> None:
    """None: nobody looked; an empty answer would say that there is no socket."""
    for protocols in (("tcp",), ("udp",), ("unix",)):
        assert read_sockets([2**22 + 1], SocketFilter(protocols=protocols), None) is None


def test_process_that_is_there_tells_for_one_that_is_gone() -> None:
    """They are of one namespace: any of them will do."""
    assert read_sockets([2**22 + 1, "self"], SocketFilter(), None) is not None


@given(st.text("0123456789ABCDEF:- ", max_size=160))
def test_any_line_like_text_is_read(text: str) -> None:
    """Nearly right, and wrong: negative states, numbers that are too large."""
    list(parse_inet(b"head\n" + text.encode(), "tcp", "inet", SocketFilter(), None))
