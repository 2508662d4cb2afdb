"""doctor."""

from __future__ import annotations

import typer

from sdtool.cli.invocation import Invocation
from sdtool.cli.views import show_facilities
from sdtool.model.answer import Answer


def doctor_command(ctx: typer.Context) -> int:
    """Say what sdtool can see here, and why not."""
    invocation = ctx.ensure_object(Invocation)
    facilities = invocation.ask(lambda host: host.doctor())
    bad = any(row.facility == "manager" and not row.available for row in facilities)
    return invocation.finish(Answer(data=facilities), show_facilities, bad=bad)
