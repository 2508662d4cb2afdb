"""doctor."""

from __future__ import annotations

import typer

from sdtool.cli.invocation import Invocation
from sdtool.model.answer import Answer


def doctor_command(ctx: typer.Context) -> int:
    """Say what sdtool can see here, and why not."""
    invocation = ctx.ensure_object(Invocation)
    facilities = invocation.ask(lambda host: host.doctor())
    bad = any(row.facility == "bus" and not row.available for row in facilities)
    if invocation.json:
        return invocation.finish(Answer(data=facilities), lambda _: "", bad=bad)
    from sdtool.render.tables import render_facilities

    return invocation.finish(Answer(data=facilities), render_facilities, bad=bad)
