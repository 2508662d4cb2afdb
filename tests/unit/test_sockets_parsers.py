"""Netlink replies recorded from a kernel 6.18, and what must survive damaged ones."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdtool.model.sockets import SocketFacts
from sdtool.sources.netlink import (
    ATTRIBUTE,
    NLMSG_DONE,
    NLMSGHDR,
    SOCK_DIAG_BY_FAMILY,
    parse_attributes,
    parse_messages,
)
from sdtool.sources.sockets import (
    MESSAGE,
    UNIX_MESSAGE,
    Query,
    parse_message,
    parse_unix_message,
    parse_unix_name,
)
from tests.unit.make import captured

CGROUP = 93600
"""Id of the cgroup that all recorded sockets were made in."""

NETNS = 4026531840


def recorded(name: str, protocol: str = "tcp") -> list[SocketFacts]:
    """The rows of a recorded dump."""
    messages = parse_messages(captured(f"linux-6.18/sock_diag/{name}.bin"))
    return [
        parse_message(payload, protocol, NETNS)
        for kind, _, payload in messages
        if kind == SOCK_DIAG_BY_FAMILY
    ]


@pytest.mark.parametrize(
    ("name", "protocol", "family", "address", "port", "state", "v6only"),
    [
        ("tcp4-listen", "tcp", "inet", "127.0.0.1", 8001, "LISTEN", None),
        ("tcp6-listen", "tcp", "inet6", "::", 8002, "LISTEN", False),
        ("tcp6-v6only", "tcp", "inet6", "::1", 8003, "LISTEN", True),
        ("udp4", "udp", "inet", "0.0.0.0", 8004, "UNCONN", None),
        ("udp6-v6only", "udp", "inet6", "::", 8005, "UNCONN", True),
        ("mptcp4-listen", "mptcp", "inet", "127.0.0.1", 8006, "LISTEN", None),
        ("mptcp4-subflow", "tcp", "inet", "127.0.0.1", 8006, "LISTEN", None),
        ("tcp4-bound", "tcp", "inet", "127.0.0.1", 8007, "BOUND", None),
    ],
)
def test_recorded_socket_is_read(
    name: str,
    protocol: str,
    family: str,
    address: str,
    port: int,
    state: str,
    v6only: bool | None,
) -> None:
    """One socket of each kind, with the cgroup that created it."""
    (row,) = recorded(name, protocol)
    assert (family, protocol, address, port) == (row.family, row.protocol, row.address, row.port)
    assert (state, v6only, CGROUP) == (row.state, row.v6only, row.cgroup_id)
    assert (None, None, None) == (row.peer_address, row.peer_port, row.expires_us)
    assert ({"udp": "dgram"}.get(protocol, "stream"), NETNS, 0) == (row.type, row.netns, row.uid)
    assert row.inode is not None


def test_mptcp_listener_and_its_subflow_differ_in_the_cookie() -> None:
    """They share inode and address: only the cookie tells them apart."""
    (listener,), (subflow,) = recorded("mptcp4-listen", "mptcp"), recorded("mptcp4-subflow")
    assert listener.inode == subflow.inode
    assert listener.cookie != subflow.cookie


def test_accepted_connection_has_the_listeners_cgroup() -> None:
    """And a peer, which the listener has not."""
    listener, accepted = recorded("tcp4-accepted")
    assert ("LISTEN", "ESTABLISHED") == (listener.state, accepted.state)
    assert ("127.0.0.1", 40914) == (accepted.peer_address, accepted.peer_port)
    assert listener.cgroup_id == accepted.cgroup_id
    assert listener.inode != accepted.inode


def test_time_wait_has_a_timer_and_nobody() -> None:
    """No inode, no cgroup; it says in how many milliseconds it goes."""
    (row,) = recorded("tcp4-time-wait")
    assert ("TIME_WAIT", None, None, 59_888_000) == (
        row.state,
        row.inode,
        row.cgroup_id,
        row.expires_us,
    )


def test_empty_dump_is_one_message() -> None:
    """NLMSG_DONE with an errno of 0."""
    ((kind, _, payload),) = parse_messages(captured("linux-6.18/sock_diag/empty.bin"))
    assert (NLMSG_DONE, 0) == (kind, int.from_bytes(payload[:4], "little"))


def test_failed_dump_carries_its_errno_in_the_end() -> None:
    """ENOENT for a family that the kernel does not know, in NLMSG_DONE and not NLMSG_ERROR."""
    ((kind, _, payload),) = parse_messages(captured("linux-6.18/sock_diag/failed.bin"))
    assert (NLMSG_DONE, -errno.ENOENT) == (kind, struct.unpack("=i", payload)[0])


def test_destroyed_socket_is_known_by_its_cookie() -> None:
    """The notification has neither inode nor cgroup: the cookie of the dump is all there is."""
    (before,) = recorded("tcp4-listen")
    (after,) = recorded("destroyed")
    assert (before.cookie, before.port) == (after.cookie, after.port)
    assert (None, None) == (after.inode, after.cgroup_id)


# Requests ------------------------------------------------------------------------------------


def test_query_has_the_layout_of_the_kernel() -> None:
    """A struct inet_diag_req_v2 of 56 bytes."""
    data = Query("tcp", socket.AF_INET6, states=1 << 10).pack()
    assert 56 == len(data)
    assert (socket.AF_INET6, 6, 1 << 10) == (
        data[0],
        data[1],
        int.from_bytes(data[4:8], "little"),
    )
    assert b"\xff" * 8 == data[-8:]


def test_both_families_are_asked_for_in_one_request() -> None:
    """The older struct inet_diag_req, of 60 bytes: TCP alone has it."""
    query = Query("tcp", states=1 << 10)
    data = query.pack()
    assert (60, 18) == (len(data), query.kind)
    assert (0, b"\xff" * 8, 1 << 10) == (
        data[0],
        data[44:52],
        int.from_bytes(data[52:56], "little"),
    )


def test_protocol_over_255_goes_into_an_attribute() -> None:
    """MPTCP is 262: 255 in the field, the number behind it."""
    data = Query("mptcp", socket.AF_INET).pack()
    assert 255 == data[1]
    assert {3: struct.pack("=I", 262)} == parse_attributes(data[56:])


@given(st.integers(1, 65535))
def test_port_is_filtered_in_the_kernel(port: int) -> None:
    """By a bytecode program: source port equals, jump to the end or past it."""
    ((kind, program),) = parse_attributes(
        Query("udp", socket.AF_INET, port=port).pack()[56:]
    ).items()
    assert (1, (11, 8, 12, 0, 0, port)) == (kind, struct.unpack("=BBHBBH", program))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_cgroups_are_filtered_in_the_kernel(ids: list[int]) -> None:
    """Each condition jumps to the end when it holds, the last one beyond it when not."""
    (program,) = parse_attributes(
        Query("udp", socket.AF_INET, cgroups=tuple(ids)).pack()[56:]
    ).values()
    conditions = list(struct.iter_unpack("=BBHQ", program))
    assert ids == [condition[3] for condition in conditions]
    for index, (code, yes, no, _) in enumerate(conditions):
        left = len(program) - 12 * index
        assert (13, left) == (code, yes)
        assert no == (12 if index < len(ids) - 1 else 16)


# AF_UNIX -------------------------------------------------------------------------------------


def test_recorded_unix_sockets_are_read() -> None:
    """Type, state and name; a name may hold whatever it likes, an accepted one has its own."""
    messages = parse_messages(captured("linux-6.18/sock_diag/unix.bin"))
    rows = [parse_unix_message(p, NETNS) for kind, _, p in messages if kind == SOCK_DIAG_BY_FAMILY]
    assert [
        ("stream", "ESTABLISHED", "/tmp/u-stream.sock"),
        ("stream", "ESTABLISHED", None),
        ("stream", "LISTEN", "/tmp/u-stream.sock"),
        ("dgram", "UNCONN", "/tmp/u-dgram.sock"),
        ("seqpacket", "LISTEN", "/tmp/u-seq.sock"),
        ("stream", "LISTEN", '@odd\n0000: 1 "pid=1"\x1b\udcff'),
    ] == [(row.type, row.state, row.path) for row in rows]
    assert {("unix", "unix", None, None)} == {
        (row.family, row.protocol, row.port, row.cgroup_id) for row in rows
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"", None),
        (b"\0", "@"),
        (b"\0a\0b", "@a\0b"),
        (b"/run/x.sock\0", "/run/x.sock"),
        (b"/run/x.sock", "/run/x.sock"),
        (b"relative\0junk", "relative"),
    ],
)
def test_unix_name_is_read(name: bytes, expected: str | None) -> None:
    """A path ends at its first NUL, an abstract name at its length."""
    assert expected == parse_unix_name(name)


# Damage --------------------------------------------------------------------------------------

DUMPS = [
    captured(f"linux-6.18/sock_diag/{name}.bin")
    for name in ("tcp4-listen", "tcp6-v6only", "tcp4-accepted", "mptcp4-listen")
]


@given(st.binary(max_size=300))
@example(b"\x00" * 16)
@example(b"\x10\x00\x00\x00" * 4)
def test_any_bytes_are_split_into_messages(data: bytes) -> None:
    """Nothing but messages that lie within the data, and always an end."""
    found = list(parse_messages(data))
    assert sum(NLMSGHDR.size + len(payload) for _, _, payload in found) <= len(data)


@given(st.sampled_from(DUMPS), st.data())
def test_truncated_dump_loses_only_its_tail(dump: bytes, data: st.DataObject) -> None:
    """What came whole is read, the broken rest is dropped."""
    cut = data.draw(st.integers(0, len(dump)))
    whole = list(parse_messages(dump))
    assert list(parse_messages(dump[:cut])) == whole[: len(list(parse_messages(dump[:cut])))]


@given(st.binary(max_size=100))
@example(b"\x04\x00\x01\x00")
@example(b"\xff\xff\x01\x00\x01")
def test_any_bytes_are_split_into_attributes(data: bytes) -> None:
    """A length beyond the data gives what is there; one below its head ends the list."""
    for payload in parse_attributes(data).values():
        assert payload in data


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=20), max_size=5))
def test_attributes_round_trip(attributes: dict[int, bytes]) -> None:
    """Padded to four bytes each, as the kernel does."""
    packed = b"".join(
        ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
        for kind, value in attributes.items()
    )
    assert attributes == parse_attributes(packed)


@given(st.binary(min_size=MESSAGE.size, max_size=MESSAGE.size + 60))
def test_any_row_of_a_known_family_is_read(data: bytes) -> None:
    """Unknown states keep their number; odd attributes are no reason to fail."""
    for family in (socket.AF_INET, socket.AF_INET6):
        row = parse_message(bytes([family]) + data[1:], "tcp", None)
        assert 0 <= row.port < 65536
        assert row.state
        assert row.inode != 0


@given(st.binary(min_size=UNIX_MESSAGE.size, max_size=UNIX_MESSAGE.size + 60))
def test_any_unix_row_is_read(data: bytes) -> None:
    """Unknown types keep their number."""
    row = parse_unix_message(data, None)
    assert row.type
    assert row.inode != 0
