"""Unit names as users write them, and as object paths carry them."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.errors import InvalidArgument
from sdtool.model.names import UNIT_TYPES, is_glob, unit_name, unit_path
from tests.unit.make import captured_json

ESCAPED = {
    "nginx": "nginx.service",
    "nginx.service": "nginx.service",
    "web@1": "web@1.service",
    "tmp.mount": "tmp.mount",
    "a b": r"a\x20b.service",
    "ü": r"\xc3\xbc.service",
    r"a\x2db.service": r"a\x2db.service",
    "foo.": "foo..service",
    "v1.2": "v1.2.service",
    "/": "-.mount",
    "/var/lib": "var-lib.mount",
    "/a//b/": "a-b.mount",
    "/.hid/x": r"\x2ehid-x.mount",
    "/dev/sda": "dev-sda.device",
}
"""What ``systemd-escape --mangle`` makes of each."""


@pytest.mark.parametrize(("text", "name"), ESCAPED.items())
def test_name_is_what_systemctl_reads(text: str, name: str) -> None:
    """.service is implied, paths are mounts or devices, odd characters are escaped."""
    assert name == unit_name(text)


@pytest.mark.parametrize("kind", ["service", "socket", "path", "target", "slice"])
def test_name_that_is_only_a_type_is_a_service(kind: str) -> None:
    """As systemctl reads "path", path.service: a type alone is no suffix."""
    assert f"{kind}.service" == unit_name(kind)


def test_slash_inside_a_name_becomes_a_dash() -> None:
    """As systemctl, which reads foo/bar as foo-bar.service."""
    assert "foo-bar.service" == unit_name("foo/bar")


def test_path_below_sys_is_a_device() -> None:
    """Paths below /sys are devices for systemctl, as those below /dev."""
    assert "sys-class-net-eth0.device" == unit_name("/sys/class/net/eth0")


def test_name_with_a_bad_byte_is_escaped_or_refused() -> None:
    """What the shell hands over need not be UTF-8; it is no bug of ours either way."""
    try:
        assert r"\xff.service" == unit_name(os.fsdecode(b"\xff"))
    except InvalidArgument:
        return


@pytest.mark.parametrize("text", ["", "a\0b", "a\nb", "x" * 256])
def test_name_that_cannot_be_is_refused(text: str) -> None:
    """Names have at most 255 characters, and no control bytes."""
    with pytest.raises(InvalidArgument):
        unit_name(text)


@pytest.mark.parametrize("text", ["a*", "a?", "[ab]"])
def test_glob_is_told_from_a_name(text: str) -> None:
    """A pattern keeps its characters where it is read as a name."""
    assert is_glob(text)
    assert not is_glob("web@1.service")
    assert f"{text}.service" == unit_name(text)


def test_object_path_is_the_managers() -> None:
    """The paths that a real manager gave for its units."""
    for row in captured_json("systemd-252/rows.json"):
        assert row[6] == unit_path(row[0])


def test_leading_digit_is_escaped_in_a_path() -> None:
    """sd_bus_path_encode(3) escapes a digit in front only."""
    assert "/org/freedesktop/systemd1/unit/_38021x_2e1" == unit_path("8021x.1")


@given(st.text(min_size=1, max_size=60))
def test_object_path_keeps_the_name(name: str) -> None:
    """What is not a letter or a digit is there as its bytes, and the path is plain ASCII."""
    path = unit_path(name)
    assert path.isascii()
    encoded = path.rpartition("/")[2].encode()
    decoded = re.sub(rb"_([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), encoded)
    assert name == decoded.decode(errors="surrogateescape")


@given(st.text(st.characters(exclude_characters="\0\n"), min_size=1, max_size=60))
def test_name_is_always_one_that_systemd_takes(text: str) -> None:
    """Whatever is typed, what comes out has a type and no character that needs escaping."""
    name = unit_name(text)
    assert name.rpartition(".")[2] in UNIT_TYPES
    assert name.isascii()
    assert name.isprintable()
    assert " " not in name


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30))
def test_name_of_a_name_is_itself(text: str) -> None:
    """Reading a name again changes nothing."""
    assert unit_name(text) == unit_name(unit_name(text))
