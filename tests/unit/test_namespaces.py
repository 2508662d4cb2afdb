"""Network namespaces: of whom, under what name; a look into one leaves no trace."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.sources.mounts import Mount, parse_mounts
from sdtool.sources.namespaces import (
    NetworkNamespace,
    has_address,
    look_into,
    read_namespaces,
)
from sdtool.sources.processes import parse_netns, read_netns
from tests.unit.make import captured


def test_mounted_namespace_is_recognised() -> None:
    """By ip-netns(8) or by hand; a blank in the name is escaped in mountinfo."""
    mounts = list(parse_mounts(captured("linux-6.18/mountinfo/nsfs.txt").decode()))
    expected = [
        Mount("nsfs", "net:[4026532178]", "/run/netns/a b", ("rw",)),
        Mount("nsfs", "net:[4026532178]", "/tmp/elsewhere", ("rw",)),
    ]
    assert expected == mounts


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("net:[4026531840]", 4026531840),
        ("mnt:[4026531840]", None),
        ("socket:[12]", None),
        ("net:[]", None),
        ("net:[x]", None),
        ("", None),
    ],
)
def test_namespace_link_is_read(link: str, expected: int | None) -> None:
    """Only one of a network namespace."""
    assert expected == parse_netns(link)


@given(st.text())
def test_any_mountinfo_is_read(text: str) -> None:
    """Mount points are anybody's choice."""
    list(parse_mounts(text))


def test_our_own_namespace_comes_first() -> None:
    """And once only, however many processes are in it."""
    own, *others = read_namespaces().namespaces
    assert (True, read_netns("self")) == (own.own, own.inode)
    assert own.inode not in {other.inode for other in others}


def test_own_namespace_is_looked_into_by_ourselves() -> None:
    """No thread is needed for what is here."""
    own = NetworkNamespace(read_netns("self"), own=True)
    thread = threading.get_ident()
    assert [(own, thread)] == look_into([own], threading.get_ident)


def test_namespace_that_is_gone_is_left_out() -> None:
    """Its processes have ended before we came."""
    gone = NetworkNamespace(1, paths=(f"/proc/{2**22 + 1}/ns/net",))
    assert [] == look_into([gone], lambda: 1)


def test_door_that_leads_elsewhere_is_not_taken() -> None:
    """Another process has the pid by now: nothing is said of the place it is in."""
    moved = NetworkNamespace(1, paths=("/proc/self/ns/net",))
    assert [] == look_into([moved], lambda: 1)


def test_namespace_without_a_door_is_closed() -> None:
    """Other users' processes: that there is one is known, and that we may not go there."""
    ((_, error),) = look_into([NetworkNamespace(None, pids=(1,))], lambda: 1)
    assert isinstance(error, PermissionError)


@pytest.mark.parametrize("path", ["/proc/self/fd/{}", "/proc/self/exe"])
def test_door_to_anything_else_is_not_opened(path: str) -> None:
    """A FIFO would have us wait for ever: it is looked at before it is opened."""
    reader, writer = os.pipe()
    try:
        path = path.format(reader)
        there = NetworkNamespace(Path(path).stat().st_ino, paths=(path,))
        assert [] == look_into([there], lambda: 1)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("192.0.2.1", False),
        ("localhost", False),
        ("é" * 90, False),
        ("", False),
    ],
)
def test_address_is_local_or_not(address: str, expected: bool) -> None:
    """A name is no address, and is not looked up."""
    assert expected == has_address(address)
