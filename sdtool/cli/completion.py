"""Completion of unit names: what the manager has loaded, as systemctl completes them."""

from __future__ import annotations

import typer

from sdtool.cli.invocation import Invocation
from sdtool.errors import SdtoolError


def complete_units(ctx: typer.Context, incomplete: str) -> list[str]:
    """The loaded units that begin so; none where no manager can be asked."""
    # Loaded here and not above: every command's parser refers to this function.
    from sdtool.host import ListFilter

    invocation = ctx.find_object(Invocation) or Invocation()
    filters = ListFilter(everything=True)
    try:
        units = invocation.ask(lambda host: host.list([f"{incomplete}*"], filters))
    except SdtoolError:
        return []
    return [unit.name for unit in units]
