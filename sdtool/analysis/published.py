"""Where does a container runtime hand a port on to?

Docker publishes a port by a process outside the container, docker-proxy, that listens and hands
on; its command line says where to. Who owns that port is docker; who answers is the container.
Other runtimes rewrite addresses in the kernel alone (DNAT): then there is no socket to be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sdtool.analysis.cgroups import read_container
from sdtool.analysis.ports import port_protocol, socket_owners
from sdtool.model.ports import PortOwner, PortOwnership, PublishedPort
from sdtool.model.sockets import Socket, owns_port

DOCKER_PROXY = "docker-proxy"
REWRITTEN = (
    "a port that is published to a container by rewriting addresses alone has no socket: "
    "nft list ruleset shows such rules"
)

ANY = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a proxy hands on to."""

    address: str
    port: int
    protocol: str


PortOwnerships = tuple[PortOwnership, ...]

Targets = Mapping[int, tuple[Target, Sequence[Socket]]]
"""By a proxy's pid: where to, and the sockets of that port in the network namespaces that have the
address."""


def proxies_of(answers: Iterable[PortOwnership]) -> tuple[int, ...]:
    """The pids among the holders that are proxies, by their name."""
    holders = (h for answer in answers for owner in answer.owners for h in owner.holders)
    return tuple(dict.fromkeys(h.pid for h in holders if h.comm == DOCKER_PROXY))


def parse_proxy(argv: Sequence[str]) -> Target | None:
    """What docker-proxy's command line says; None when it is no such command line."""
    pairs = pairwise(argv[1:])
    options = {name.lstrip("-"): value for name, value in pairs if name.startswith("-")}
    address, port = options.get("container-ip", ""), options.get("container-port", "")
    protocol = options.get("proto", "tcp")
    if (
        not _is_address(address)
        or not re.fullmatch("[0-9]{1,5}", port)
        or not 0 < int(port) < 65536
    ):
        return None
    return Target(address, int(port), protocol) if protocol in ("tcp", "udp") else None


def _is_address(text: str) -> bool:
    """Whether a word is another machine's address: it is anybody's choice, and could be a name."""
    from ipaddress import ip_address  # 4 ms that only a proxy costs

    try:
        address = ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)


def name_published(answer: PortOwnership, targets: Targets) -> PortOwnership:
    """The answer, each proxy among the owners with what it hands on to."""
    return replace(answer, owners=tuple(_name_target(owner, targets) for owner in answer.owners))


def mention_rewriting(answers: Iterable[PortOwnership], cgroups: Iterable[str]) -> PortOwnerships:
    """The answers; where nobody was found and there are containers, with what that may mean."""
    found = tuple(answers)
    nobody = [answer for answer in found if not answer.owners and not answer.blocked_by]
    if not nobody or not any(read_container(path) for path in cgroups):
        return found
    return tuple(
        replace(answer, hint=f"{answer.hint}; {REWRITTEN}") if answer in nobody else answer
        for answer in found
    )


def _name_target(owner: PortOwner, targets: Targets) -> PortOwner:
    told = [targets[holder.pid] for holder in owner.holders if holder.pid in targets]
    if not told:
        return owner
    target, sockets = told[0]
    answering = {
        (found.unit, found.container)
        for socket in sockets
        if owns_port(socket) and _answers(socket, target)
        for found in socket_owners(socket)
    }
    # Of several nobody can say which one is meant.
    unit, container = answering.pop() if len(answering) == 1 else (None, None)
    return replace(
        owner,
        published=PublishedPort(
            address=target.address,
            port=target.port,
            protocol=target.protocol,
            unit=unit,
            container=container,
        ),
    )


def _answers(socket: Socket, target: Target) -> bool:
    address = (socket.address or "").removeprefix("::ffff:")
    same = (socket.port, port_protocol(socket)) == (target.port, target.protocol)
    return same and address in (target.address, *ANY)
