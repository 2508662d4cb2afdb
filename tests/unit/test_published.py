"""Where a container runtime's proxy hands a port on to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.ports import judge_port
from sdtool.analysis.published import (
    Target,
    mention_rewriting,
    name_published,
    parse_proxy,
    proxies_of,
)
from sdtool.model.ports import PortSpec, PublishedPort
from sdtool.model.process import Container
from sdtool.model.sockets import Holder, Socket
from tests.unit.make import socket

HEX = "0123456789abcdef" * 4
PROXY = (
    *("/usr/bin/docker-proxy", "-proto", "tcp", "-host-ip", "0.0.0.0", "-host-port", "80"),
    *("-container-ip", "172.17.0.2", "-container-port", "8080", "-use-listen-fd"),
)
TARGET = Target("172.17.0.2", 8080, "tcp")
BOX = Container(runtime="docker", id=HEX)


def listener(pid: int, comm: str, unit: str, **fields: object) -> Socket:
    """A socket that one process holds."""
    container = BOX if unit.startswith("docker-") else None
    holder = Holder(pid=pid, comm=comm, unit=unit, manager="system", container=container)
    return socket(holders=(holder,), holders_complete=True, **fields)


INSIDE = listener(20, "web", f"docker-{HEX}.scope", address="0.0.0.0", port=8080)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (PROXY, TARGET),
        ((*PROXY, "--container-port", "81"), Target("172.17.0.2", 81, "tcp")),
        (("docker-proxy",), None),
        ((), None),
        (("docker-proxy", "-container-ip", "172.17.0.2"), None),
        (("docker-proxy", "-container-ip", "172.17.0.2", "-container-port", "no"), None),
        (("docker-proxy", "-container-ip", "::2", "-container-port", "70000"), None),
        (("docker-proxy", "-container-ip", "::2", "-container-port", "-1"), None),
        (("docker-proxy", "-container-ip", "é" * 90, "-container-port", "80"), None),
        (("docker-proxy", "-container-ip", "localhost", "-container-port", "80"), None),
    ],
)
def test_command_line_of_the_proxy_is_read(argv: Sequence[str], expected: Target | None) -> None:
    """Options stand with one dash or two."""
    assert expected == parse_proxy(argv)


@given(st.lists(st.text(max_size=8), max_size=8))
def test_any_command_line_is_read(argv: list[str]) -> None:
    """A process may call itself what it likes."""
    parse_proxy(argv)


@pytest.mark.parametrize(
    ("sockets", "unit", "container"),
    [
        ([INSIDE], f"docker-{HEX}.scope", BOX),
        ([], None, None),
        ([INSIDE, listener(21, "web", "other.service", address="::", port=8080)], None, None),
        ([listener(21, "web", "x.service", address="10.0.0.9", port=8080)], None, None),
        ([listener(21, "web", "x.service", address="0.0.0.0", port=8081)], None, None),
    ],
)
def test_proxy_is_named_with_who_answers(
    sockets: list[Socket], unit: str | None, container: Container | None
) -> None:
    """Whoever listens at that address; of several nobody can say which one it is."""
    (answer,) = judge_port(PortSpec(port=80), [listener(10, "docker-proxy", "docker.service")])
    assert (10,) == proxies_of([answer])

    (owner,) = name_published(answer, {10: (TARGET, sockets)}).owners

    expected = PublishedPort(
        address="172.17.0.2", port=8080, protocol="tcp", unit=unit, container=container
    )
    assert ("docker.service", expected) == (owner.unit, owner.published)


def test_server_of_any_other_name_is_no_proxy() -> None:
    """And its owner stays as it is."""
    (answer,) = judge_port(PortSpec(port=80), [listener(10, "web", "web.service")])
    assert () == proxies_of([answer])
    assert answer == name_published(answer, {})


@pytest.mark.parametrize(
    ("sockets", "cgroups", "mentioned"),
    [
        ([], [f"/system.slice/docker-{HEX}.scope"], True),
        ([], ["/system.slice/web.service"], False),
        ([INSIDE], [f"/system.slice/docker-{HEX}.scope"], False),
    ],
)
def test_rewritten_port_has_no_socket(
    sockets: list[Socket], cgroups: list[str], mentioned: bool
) -> None:
    """Said where nobody was found and there are containers, and nowhere else."""
    (answer,) = mention_rewriting(judge_port(PortSpec(port=8080), sockets), cgroups)
    assert mentioned == ("nft list ruleset" in (answer.hint or ""))
