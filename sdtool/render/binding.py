"""The verdicts of ``port --bind``: what is in the way, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from sdtool.model.binding import BindAnswer, BindConflict, BindSpec, BindVerdict
from sdtool.render.plain import address, clean, count, duration
from sdtool.render.tables import label_unit

BIND_STYLES = {BindVerdict.YES: "green", BindVerdict.NO: "red", BindVerdict.UNKNOWN: "yellow"}

SHOWN = 8
"""A busy port has thousands of connections; what they have in common is said once."""

NAMED = 4
"""Of the processes that hold a socket."""


def render_binds(answers: Sequence[BindAnswer]) -> RenderableType:
    """The answers of ``port --bind``, a paragraph each."""
    return Group(*(_bind(answer) for answer in answers))


def _bind(answer: BindAnswer) -> RenderableType:
    head = Text.assemble(
        (_name(answer), "bold"), "  ", (answer.verdict, BIND_STYLES[answer.verdict])
    )
    lines: list[RenderableType] = [head.append(f"  {clean(answer.verdict_reason)}", "default")]
    lines += [_conflict(conflict) for conflict in answer.conflicts[:SHOWN]]
    if len(answer.conflicts) > SHOWN:
        lines.append(Text(f"  and {count(len(answer.conflicts) - SHOWN, 'socket')} more"))
    if answer.needs_reason is not None:
        lines.append(Text(f"  ({_remedy(answer)})", "dim"))
    return Group(*lines)


def _name(answer: BindAnswer) -> str:
    dual = answer.address == "::" and answer.v6only is False
    spec = BindSpec(
        address=answer.address,
        port=answer.port,
        protocol=answer.protocol,
        interface=answer.interface,
        dual=dual,
    )
    return clean(str(spec))


def _conflict(conflict: BindConflict) -> Text:
    unit = label_unit(conflict.unit, conflict.manager)
    peer = f" with {conflict.socket.peer}" if conflict.socket.peer else ""
    left_us = conflict.socket.expires_us
    until = f", free in {duration(left_us)}" if left_us else ""
    return Text.assemble(
        "  ",
        (unit or _nobody(conflict), "bold" if unit else "yellow"),
        "  ",
        (address(conflict.socket), "cyan"),
        f" {conflict.socket.state}{peer}: {conflict.reason}{until}",
        _holders(conflict),
    )


def _nobody(conflict: BindConflict) -> str:
    if conflict.unit_reason is not None:
        return "unknown unit"
    return "no process" if conflict.socket.inode is None else "no unit"


def _holders(conflict: BindConflict) -> str:
    found = conflict.socket.holders
    if found is None:
        why = f" ({clean(conflict.unit_reason)})" if conflict.unit_reason else ""
        return f"; holders not visible{why}"
    held = [f"{one.pid} ({clean(one.comm)})" for one in found if one.unit == conflict.unit]
    if not held:
        return ""
    left = len(held) - NAMED
    more = f" and {count(left, 'process')} more" if left > 0 else ""
    return f"; {'pid' if len(held) == 1 else 'pids'} {', '.join(held[:NAMED])}{more}"


def _remedy(answer: BindAnswer) -> str:
    reason = clean(answer.needs_reason or "")
    if answer.needs:
        return f"{' and '.join(answer.needs)} would help: {reason}"
    return f"what would help: {reason}"
