"""port and ports."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import Annotated

import typer

from sdtool.cli.completion import complete_units
from sdtool.cli.invocation import Invocation
from sdtool.cli.views import show_binds, show_listeners, show_ports
from sdtool.errors import InvalidArgument
from sdtool.model.binding import BindSpec, BindVerdict
from sdtool.model.ports import PortSpec, PortVerdict

PROTOCOLS = ("tcp", "udp")
BIND_HINT = "127.0.0.1:80, [::1]:80/udp, 0.0.0.0:80, or *:80 for IPv4 and IPv6"


def port_command(
    ctx: typer.Context,
    ports: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PORT[/tcp|/udp]...",
            help="Ports, with or without protocol.",
            show_default=False,
        ),
    ] = None,
    all_holders: Annotated[
        bool,
        typer.Option(
            "--all-holders",
            help="Look at every process and socket, also where who made one holds and listens.",
        ),
    ] = False,
    binds: Annotated[
        list[str] | None,
        typer.Option(
            "--bind",
            metavar="ADDR:PORT[/udp]",
            help="Say instead whether you could bind and listen here now. May be repeated.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Say which unit owns a port.

    And through which door: by holding the socket, or by a .socket unit. Exits 1 when a port is
    not owned. With --bind, exits 1 unless every address and port could be bound.
    """
    invocation = ctx.ensure_object(Invocation)
    if bool(ports) == bool(binds):
        raise InvalidArgument(
            "PORT and --bind are two questions." if ports else "No port is asked about.",
            hint="sdtool port 80, or: sdtool port --bind '*:80'",
        )
    if binds:
        return _show_binds(invocation, binds)
    return _show_owners(invocation, ports or [], all_holders)


def _show_binds(invocation: Invocation, texts: Sequence[str]) -> int:
    specs = [parse_bind(text) for text in texts]
    answer = invocation.ask(lambda host: host.bindable(specs))
    bad = any(entry.verdict is not BindVerdict.YES for entry in answer.data)
    return invocation.finish(answer, show_binds, bad=bad)


def _show_owners(invocation: Invocation, ports: Sequence[str], all_holders: bool) -> int:
    specs = [parse_port(text) for text in ports]
    answer = invocation.ask(lambda host: host.port(specs, all_holders=all_holders))
    bad = any(entry.verdict is not PortVerdict.OWNED for entry in answer.data)
    return invocation.finish(answer, show_ports, bad=bad)


def parse_port(text: str) -> PortSpec:
    """PORT or PORT/tcp or PORT/udp.

    Raises:
        InvalidArgument: It is no port, or another protocol.
    """
    number, slash, protocol = text.partition("/")
    if not re.fullmatch("[0-9]{1,5}", number) or not 0 < int(number) < 65536:
        raise InvalidArgument(f"{text} is no port (1 to 65535).", subject=text)
    if slash and protocol not in PROTOCOLS:
        raise InvalidArgument(
            f"{protocol or 'nothing'} is no protocol that has ports here.",
            subject=text,
            hint=f"{number}/tcp or {number}/udp",
        )
    return PortSpec(port=int(number), protocol=protocol or None)


def parse_bind(text: str) -> BindSpec:
    """ADDR:PORT, IPv6 in brackets, "*" for all addresses of both families; /udp behind it.

    Raises:
        InvalidArgument: The address or the port is none, or the protocol is another.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise InvalidArgument(f"{text} is no address with a port.", subject=text, hint=BIND_HINT)
    spec = parse_port(port)
    address, interface = ("::", None) if host == "*" else _parse_address(host, text)
    return BindSpec(
        address=address,
        port=spec.port,
        protocol=spec.protocol or "tcp",
        interface=interface,
        dual=host == "*",
    )


def _parse_address(host: str, text: str) -> tuple[str, str | None]:
    """The address as the kernel writes it, and its scope."""
    bracketed = host.startswith("[") and host.endswith("]")
    address, percent, scope = (host[1:-1] if bracketed else host).partition("%")
    family = socket.AF_INET6 if bracketed else socket.AF_INET
    try:
        plain = socket.inet_ntop(family, socket.inet_pton(family, address))
    except (OSError, ValueError):
        plain = None
    if plain is None or bool(percent) != bool(scope) or (scope and not bracketed):
        raise InvalidArgument(
            f"{host} is no address (names are not looked up).", subject=text, hint=BIND_HINT
        )
    return plain, scope or None


def ports_command(
    ctx: typer.Context,
    units: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[UNIT]...",
            help="Only the sockets of these units.",
            autocompletion=complete_units,
            show_default=False,
        ),
    ] = None,
    unix: Annotated[
        bool, typer.Option("--unix", help="AF_UNIX sockets instead of those with a port.")
    ] = False,
) -> int:
    """List the listening sockets by unit."""
    invocation = ctx.ensure_object(Invocation)
    answer = invocation.ask(lambda host: host.ports(units or (), unix=unix))
    return invocation.finish(answer, show_listeners)
