"""Tables: list, port, ports, pid, doctor."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdtool.model.facility import Facility
from sdtool.model.ports import (
    ListeningSocket,
    PortBlock,
    PortOwner,
    PortOwnership,
    PortVerdict,
    Via,
)
from sdtool.model.process import Container, ProcessOwner
from sdtool.model.scope import is_foreign
from sdtool.model.sockets import Socket, endpoint
from sdtool.model.unit import ListedUnit
from sdtool.render.plain import address, clean, count, duration, namespace

STATE_STYLES = {
    "active": "green",
    "reloading": "green",
    "failed": "bold red",
    "activating": "yellow",
    "deactivating": "yellow",
}

VERDICT_STYLES = {
    PortVerdict.OWNED: "green",
    PortVerdict.BLOCKED: "red",
    PortVerdict.FREE: "dim",
    PortVerdict.UNKNOWN: "yellow",
}

VIA_WORDS = {
    Via.HOLDER: "holds it",
    Via.CREATOR: "created it",
    Via.SOCKET_UNIT: "listens for its service",
    Via.FD_STORE: "keeps it in the fd store",
    Via.KERNEL: "the kernel itself",
}


FLEXIBLE = frozenset(
    {"UNIT", "PORTS", "DESCRIPTION", "ADDRESS", "PROCESSES", "CREATED BY", "FINDING", "COMMAND"}
    | {"HELD BY", "GIVES"}
)
"""Columns that give way on a narrow terminal; the others keep their width."""

NUMBERS = frozenset({"PROCS", "CPU", "RSS"})


def new_table(*columns: str) -> Table:
    """A table without lines, whose flexible columns end in an ellipsis where space is short."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            Text(name, no_wrap=True, overflow="ellipsis"),
            no_wrap=name not in FLEXIBLE,
            justify="right" if name in NUMBERS else "left",
        )
    return table


def cell(text: str, style: str = "") -> Text:
    """One cell of a table: of one line, whatever the width."""
    return Text(clean(text), style, no_wrap=True, overflow="ellipsis")


def state(active_state: str, text: str | None = None) -> Text:
    """An active state in its colour."""
    return Text(clean(text or active_state), STATE_STYLES.get(active_state, "dim"))


def render_units(units: Sequence[ListedUnit]) -> RenderableType:
    """The table of ``list``; LOAD and MANAGER stand only where they say something.

    Why there are "?" stands below it, once.
    """
    with_manager = any(is_foreign(unit.manager) for unit in units)
    manager = ("MANAGER",) if with_manager else ()
    with_load = any(unit.load_state != "loaded" for unit in units)
    load = ("LOAD",) if with_load else ()
    table = new_table(*manager, "UNIT", *load, "ACTIVE", "SUB", "PROCS", "PORTS", "DESCRIPTION")
    for unit in units:
        load_cell = (Text(unit.load_state, "" if unit.load_state == "loaded" else "red"),)
        owner = f"user {unit.manager_user}" if unit.manager_user else unit.manager
        table.add_row(
            *((cell(owner, "dim"),) if with_manager else ()),
            cell(unit.name, "bold red" if unit.active_state == "failed" else ""),
            *(load_cell if with_load else ()),
            state(unit.active_state),
            state(unit.active_state, unit.sub_state),
            "?" if unit.processes is None else str(unit.processes or "-"),
            cell("?" if unit.ports is None else " ".join(unit.ports), "cyan"),
            cell(unit.description),
        )
    return Group(table, *_notes(units))


def _notes(units: Sequence[ListedUnit]) -> list[Text]:
    """What is known of no unit, and why."""
    unknown: dict[str, dict[str, None]] = {}
    for unit in units:
        reasons = {"processes": unit.processes_reason, "ports": unit.ports_reason}
        for name, reason in reasons.items():
            if reason is not None:
                unknown.setdefault(reason, {})[name] = None
    return [
        Text(f"({' and '.join(names)} are not known: {clean(reason)})", "dim")
        for reason, names in unknown.items()
    ]


def summarise_units(units: Sequence[ListedUnit]) -> str:
    """The line below the table, for people."""
    failed = sum(unit.active_state == "failed" for unit in units)
    tail = f", {failed} failed" if failed else ""
    managers = len({unit.manager for unit in units})
    of = f" of {managers} managers" if managers > 1 else ""
    return f"{count(len(units), 'unit')}{of}{tail}"


def render_ports(answers: Sequence[PortOwnership]) -> RenderableType:
    """The answers of ``port``, a paragraph each."""
    return Group(*(_port(answer) for answer in answers))


def _port(answer: PortOwnership) -> RenderableType:
    name = f"{answer.port}/{answer.protocol}" if answer.protocol else str(answer.port)
    head = Text.assemble((name, "bold"), "  ", (answer.verdict, VERDICT_STYLES[answer.verdict]))
    lines: list[RenderableType] = [head]
    # An MPTCP listener is one of TCP too: one line says it.
    lines += {text.plain: text for text in map(_owner, answer.owners)}.values()
    for block in answer.blocked_by:
        until = f", free in {duration(block.expires_us)}" if block.expires_us else ""
        peer = f" with {block.peer}" if block.peer else ""
        unknown = ", of an unknown unit" if block.unit_reason else ""
        unit = f", made by {clean(block.unit)}" if block.unit else unknown
        lines.append(Text(f"  {block.state}{peer}{unit}{_place(block)}{until}"))
    if answer.hint:
        lines.append(Text(f"  ({clean(answer.hint)})", "dim"))
    return Group(*lines)


def _owner(owner: PortOwner) -> Text:
    unit = label_unit(owner.unit, owner.manager) or "no unit"
    return Text.assemble(
        "  ",
        (unit, "bold" if owner.unit else "yellow"),
        f"  {VIA_WORDS[owner.via]}: ",
        (address(owner.socket), "cyan"),
        f" {owner.socket.state}{_place(owner.socket)}",
        *_holder_words(owner),
        *_container_words(owner),
    )


def _place(socket: Socket | PortBlock) -> str:
    where = namespace(socket)
    return f" in network namespace {where}" if where else ""


def _holder_words(owner: PortOwner) -> list[str]:
    if owner.socket.holders is None:
        return ["; holders not visible"]
    pids = [f"{holder.pid} ({clean(holder.comm)})" for holder in owner.holders]
    return [f"; {'pid' if len(pids) == 1 else 'pids'} {', '.join(pids)}"] if pids else []


def label_unit(unit: str | None, manager: str | None) -> str | None:
    """A unit's name, with its manager where that is not the one that was asked."""
    if unit is None:
        return None
    return clean(f"{unit} of {manager}" if is_foreign(manager) else unit)


def render_listeners(rows: Sequence[ListeningSocket]) -> RenderableType:
    """The table of ``ports``."""
    unix = any(row.socket.family == "unix" for row in rows)
    with_netns = any(row.socket.elsewhere for row in rows)
    columns = ["UNIT", "TYPE" if unix else "PROTO", "ADDRESS"]
    columns += [*(["NETNS"] if with_netns else []), "PROCESSES", *([] if unix else ["CREATED BY"])]
    table = new_table(*columns)
    for row in rows:
        socket = row.socket
        table.add_row(
            cell(label_unit(row.unit, row.manager) or "-", "bold" if row.unit else "yellow"),
            socket.type if unix else socket.protocol,
            cell(address(socket), "cyan"),
            *([cell(namespace(socket) or "", "magenta")] if with_netns else []),
            cell(_holders(socket)),
            *([] if unix else [cell(_creator(socket), "dim")]),
        )
    return table


def _creator(socket: Socket) -> str:
    creator = socket.creator
    return (creator.unit or creator.control_group) if creator else "?"


def _container_words(owner: PortOwner) -> list[str]:
    words = []
    if owner.container is not None:
        words.append(f"; in container {clean(_container(owner.container))}")
    target = owner.published
    if target is not None:
        whose = _container(target.container) if target.container else target.unit
        where = clean(endpoint(target.address, target.port))
        words.append(f"; hands on to {where}/{target.protocol}")
        words.append(f" of {clean(whose)}" if whose else "")
    return words


def _holders(socket: Socket) -> str:
    if socket.holders is None:
        return "hidden"
    shown = [f"{holder.pid} ({holder.comm})" for holder in socket.holders[:4]]
    more = f" +{len(socket.holders) - 4}" if len(socket.holders) > 4 else ""
    return ", ".join(shown) + more


def render_owners(owners: Sequence[ProcessOwner]) -> RenderableType:
    """The answers of ``pid``, a block each."""
    blocks: list[RenderableType] = []
    for owner in owners:
        blocks += [*([Text("")] if blocks else []), _process_owner(owner)]
    return Group(*blocks)


def _process_owner(owner: ProcessOwner) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("process", Text(f"{owner.pid} ({clean(owner.comm)})", "bold"))
    facts = {
        "unit": owner.unit,
        "user unit": owner.user_unit,
        "slice": owner.slice,
        "session": owner.session,
        "container": _container(owner.container) if owner.container else None,
        "role": owner.role,
    }
    for name, value in facts.items():
        if value is not None:
            grid.add_row(name, Text(clean(value)))
    mark = Text("managed: ", "green") if owner.managed else Text("not managed: ", "yellow")
    grid.add_row("", mark.append(clean(owner.managed_reason), "default"))
    ancestry = " < ".join(f"{ref.pid} ({clean(ref.comm)})" for ref in owner.ancestry)
    grid.add_row("parents", Text(ancestry or "none visible"))
    return grid


def _container(container: Container) -> str:
    pod = f", pod {container.pod}" if container.pod else ""
    return f"{container.runtime} {container.id[:12]}{pod}"


def render_facilities(facilities: Sequence[Facility]) -> RenderableType:
    """The table of ``doctor``."""
    table = new_table("", "FACILITY", "FINDING", "GIVES, OR COSTS")
    for row in facilities:
        mark = Text("yes", "green") if row.available else Text("no", "red")
        effect = Text(row.gives) if row.costs is None else Text(f"without it: {row.costs}")
        table.add_row(mark, Text(row.facility, "bold"), Text(clean(row.reason)), effect)
    return table
