"""list, trace and pid."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sdtool.cli.completion import complete_units
from sdtool.cli.invocation import Invocation
from sdtool.cli.views import show_owners, show_traces, show_units
from sdtool.errors import InvalidArgument
from sdtool.model.answer import Answer

if TYPE_CHECKING:
    from sdtool.host import Host
    from sdtool.model.unit import ListedUnit

MAX_PID = 2**22
"""PID_MAX_LIMIT of 64-bit kernels."""


Units = Annotated[
    list[str],
    typer.Argument(
        metavar="UNIT...",
        help="Unit names or globs; .service is implied.",
        autocompletion=complete_units,
        show_default=False,
    ),
]


def list_command(
    ctx: typer.Context,
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATTERN]...",
            help="Only units that match; globs are allowed.",
            autocompletion=complete_units,
            show_default=False,
        ),
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("-t", "--type", metavar="TYPE", help="Only this type: service, socket ..."),
    ] = None,
    states: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="STATE", help="Only this load, active or sub state."),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="The same as --state failed.")] = False,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Inactive units too.")] = False,
    all_managers: Annotated[
        bool,
        typer.Option(
            "--all-managers", help="Units of all users' managers too, beside the system's (root)."
        ),
    ] = False,
) -> int:
    """List units with their processes and ports."""
    from sdtool.host import ListFilter

    invocation = ctx.ensure_object(Invocation)
    filters = ListFilter(
        types=_split(types),
        states=_split(states) + (["failed"] if failed else []),
        everything=everything,
    )

    async def ask(host: Host) -> Answer[ListedUnit]:
        if all_managers:
            return await host.list_all_managers(patterns or (), filters)
        return await host.list(patterns or (), filters)

    answer = invocation.ask(ask)
    status = invocation.finish(answer, show_units)
    if sys.stdout.isatty() and not invocation.json:
        from sdtool.render.tables import summarise_units

        hint = "" if everything else "; --all shows the inactive ones too"
        sys.stderr.write(f"\n{summarise_units(answer.data)}{hint}\n")
    return status


def _split(values: list[str] | None) -> list[str]:
    """Repeated and comma-separated, as systemctl takes them."""
    return [part for value in values or () for part in value.split(",") if part]


def trace_command(ctx: typer.Context, units: Units) -> int:
    """Show a unit's process tree and sockets.

    With what the unit's stop signal would do to each process.
    """
    invocation = ctx.ensure_object(Invocation)
    answer = invocation.ask(lambda host: host.trace(units))
    return invocation.finish(answer, show_traces)


def pid_command(
    ctx: typer.Context,
    pids: Annotated[
        list[str], typer.Argument(metavar="PID...", help="Process ids.", show_default=False)
    ],
) -> int:
    """Say what manages a process.

    Its unit, user unit, session, slice and container, or that nothing manages it.
    """
    invocation = ctx.ensure_object(Invocation)
    numbers = [_parse_pid(text) for text in pids]
    answer = invocation.ask(lambda host: host.pid(numbers))
    return invocation.finish(answer, show_owners)


def _parse_pid(text: str) -> int:
    if not re.fullmatch("[0-9]{1,7}", text) or not 0 < int(text) <= MAX_PID:
        raise InvalidArgument(f"{text} is no process id (1 to {MAX_PID}).", subject=text)
    return int(text)
