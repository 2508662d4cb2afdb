"""Completion of unit names: what the manager has loaded, as systemctl completes them."""

from __future__ import annotations

import typer

from sdtool.cli.invocation import Invocation
from sdtool.errors import SdtoolError


def complete_units(ctx: typer.Context, incomplete: str) -> list[str]:
    """The loaded units that begin so; none where no manager can be asked."""
    invocation = ctx.find_object(Invocation) or Invocation()
    try:
        return list(invocation.ask(lambda host: host.complete(incomplete)))
    except SdtoolError:
        return []
