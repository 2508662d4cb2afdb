"""port and ports."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from sdtool.cli.completion import complete_units
from sdtool.cli.invocation import Invocation
from sdtool.cli.views import show_listeners, show_ports
from sdtool.errors import InvalidArgument
from sdtool.model.ports import PortSpec, PortVerdict

PROTOCOLS = ("tcp", "udp")


def port_command(
    ctx: typer.Context,
    ports: Annotated[
        list[str],
        typer.Argument(
            metavar="PORT[/tcp|/udp]...",
            help="Ports, with or without protocol.",
            show_default=False,
        ),
    ],
) -> int:
    """Say which unit owns a port.

    And through which door: by holding the socket, or by a .socket unit. Exits 1 when a port is
    not owned.
    """
    invocation = ctx.ensure_object(Invocation)
    specs = [parse_port(text) for text in ports]
    answer = invocation.ask(lambda host: host.port(specs))
    owned = {(entry.port, entry.protocol) for entry in answer.data if _is_owned(entry.verdict)}
    bad = not all(_is_answered(spec, owned) for spec in specs)
    return invocation.finish(answer, show_ports, bad=bad)


def _is_owned(verdict: PortVerdict) -> bool:
    return verdict is PortVerdict.OWNED


def _is_answered(spec: PortSpec, owned: set[tuple[int, str | None]]) -> bool:
    protocols = (spec.protocol,) if spec.protocol else PROTOCOLS
    return any((spec.port, protocol) in owned for protocol in protocols)


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
