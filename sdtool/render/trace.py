"""A trace: the unit's head, its process tree, its sockets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdtool.model.process import Disposition, Process, Role
from sdtool.model.sockets import Socket, is_listening, owns_port
from sdtool.model.stop import INFINITY, StopPolicy
from sdtool.model.unit import Trace
from sdtool.render.plain import address, clean, count, duration, namespace, size
from sdtool.render.tables import cell, new_table, state

DISPOSITION_STYLES = {
    Disposition.DIES: "green",
    Disposition.HANDLES: "cyan",
    Disposition.IGNORES: "bold red",
    Disposition.UNKNOWN: "yellow",
}

ROLE_STYLES = {Role.MAIN: "bold", Role.CONTROL: "magenta", Role.OTHER: ""}

KILL_MODES = {
    "control-group": "to every process",
    "mixed": "to the main process, SIGKILL to the rest when it has ended",
    "process": "to the main process alone: the others stay",
    "none": "to nobody: all processes stay",
}

MAX_CONNECTIONS = 20


def render_traces(traces: Sequence[Trace]) -> RenderableType:
    """Traces, one below the other."""
    parts: list[RenderableType] = []
    for trace in traces:
        parts += [*([Text("")] if parts else []), _trace(trace)]
    return Group(*parts)


def _trace(trace: Trace) -> RenderableType:
    return Group(_head(trace), *_process_part(trace), *_socket_part(trace))


def _head(trace: Trace) -> RenderableType:
    status = trace.status
    title = Text.assemble((clean(trace.unit), "bold"), f" - {clean(status.description)}")
    words = state(status.active_state, f"{status.active_state} ({status.sub_state})")
    if status.load_state != "loaded":
        words.append(f", {status.load_state}", "red")
    if status.result not in (None, "success"):
        words.append(f", result {status.result}", "red")
    if status.n_restarts:
        words.append(f", restarted {status.n_restarts} times", "yellow")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", style="dim", no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    grid.add_row("state", words)
    rows = {
        "file": status.fragment_path,
        "cgroup": status.control_group,
        "started by": ", ".join(trace.triggered_by) or None,
        "stop": _policy(trace.policy) if trace.policy else None,
    }
    for name, value in rows.items():
        if value:
            grid.add_row(name, Text(clean(value)))
    return Group(title, grid)


def _policy(policy: StopPolicy) -> str:
    """The stop policy as one line: who gets what, and what follows when."""
    hangup = " and SIGHUP" if policy.send_sighup else ""
    whom = KILL_MODES.get(policy.kill_mode, policy.kill_mode)
    words = [f"{policy.kill_signal}{hangup} {whom}"]
    if policy.exec_stop:
        words.insert(0, count(policy.exec_stop, "ExecStop command"))
    if policy.kill_mode != "none":
        words += _after_the_limit(policy)
    return ", ".join(words)


def _after_the_limit(policy: StopPolicy) -> list[str]:
    limit, final = policy.timeout_stop_us, policy.final_kill_signal
    if limit == INFINITY:
        return [duration(limit)]
    if policy.timeout_stop_failure_mode == "abort":
        last = f"{final} after {duration(policy.timeout_abort_us)} more"
        return [f"{policy.watchdog_signal} after {duration(limit)}", last]
    if not policy.send_sigkill:
        return [f"no {final}: it asks again after {duration(limit)}, then gives up"]
    return [f"{final} after {duration(limit)}"]


def _process_part(trace: Trace) -> list[RenderableType]:
    if not trace.processes:
        return [Text("no processes", "dim")]
    signal = trace.policy.kill_signal if trace.policy else "SIGTERM"
    table = new_table("PID", "ROLE", signal, "USER", "CPU", "RSS", "NAME", "COMMAND")
    guides = _guides(trace.processes)
    for process in trace.processes:
        table.add_row(*_process(process, guides[process.pid]))
    return [Text(""), table]


def _process(process: Process, guide: str) -> list[Text]:
    cpu = "?" if process.cpu_us is None else f"{process.cpu_us / 1_000_000:.2f}"
    role = "adopted" if process.adopted else process.role
    return [
        Text(f"{guide}{process.pid}"),
        Text(role, "yellow" if process.adopted else ROLE_STYLES[process.role]),
        Text(process.disposition, DISPOSITION_STYLES[process.disposition]),
        Text(clean(process.user or "?")),
        Text(cpu),
        Text(size(process.rss_bytes)),
        Text(clean(process.comm)),
        _command(process),
    ]


def _command(process: Process) -> Text:
    text = cell(shlex.join(process.argv) if process.argv else "")
    if process.state in "ZTtD":
        text = cell(f"({_state(process.state)}) ", "yellow").append_text(text)
    if process.disposition is Disposition.UNKNOWN:
        text.append(f"  ({process.disposition_reason})", "dim")
    return text


def _state(letter: str) -> str:
    words = {"Z": "zombie", "T": "stopped", "t": "traced", "D": "uninterruptible"}
    return words.get(letter, letter)


def _guides(processes: Sequence[Process]) -> dict[int, str]:
    """The lines of the tree before each pid; the processes are in tree order."""
    pids = {process.pid for process in processes}
    last: dict[int, int] = {}
    for process in processes:
        last[process.ppid if process.ppid in pids else 0] = process.pid
    guides: dict[int, str] = {}
    stems: dict[int, str] = {0: ""}
    for process in processes:
        parent = process.ppid if process.ppid in pids else 0
        is_last = last[parent] == process.pid
        stem = stems[parent]
        # Roots of the forest stand at the margin.
        guides[process.pid] = stem + ("" if parent == 0 else "└─" if is_last else "├─")
        stems[process.pid] = stem + ("" if parent == 0 else "  " if is_last else "│ ")
    return guides


def _socket_part(trace: Trace) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if trace.sockets:
        parts += [Text(""), _sockets(trace)]
    if trace.sockets_reason:
        parts.append(Text(f"({clean(trace.sockets_reason)})", "dim"))
    return parts


def _sockets(trace: Trace) -> RenderableType:
    table = new_table("SOCKET", "ADDRESS", "STATE", "HELD BY", "")
    # What others can come in by is what people look for first.
    open_doors = [socket for socket in trace.sockets if _is_open(socket)]
    connections = [socket for socket in trace.sockets if not _is_open(socket)]
    shown = [socket for socket in connections if socket.family != "unix"][:MAX_CONNECTIONS]
    for socket in (*open_doors, *shown):
        table.add_row(
            Text(socket.protocol),
            cell(_address(socket), "cyan"),
            Text(socket.state),
            cell(_held_by(socket)),
            Text(_made_by(socket, trace.unit), "dim"),
        )
    if len(connections) > len(shown):
        more = len(connections) - len(shown)
        table_of = [table] if table.row_count else []
        return Group(*table_of, Text(f"and {count(more, 'more connection')}", "dim"))
    return table


def _is_open(socket: Socket) -> bool:
    """Whether others can come in by it."""
    return is_listening(socket) or owns_port(socket)


def _address(socket: Socket) -> str:
    where = namespace(socket)
    return f"{address(socket)} in {where}" if where else address(socket)


def _held_by(socket: Socket) -> str:
    if socket.holders is None:
        return "?"
    return ", ".join(str(holder.pid) for holder in socket.holders) or "-"


def _made_by(socket: Socket, unit: str) -> str:
    if socket.socket_unit is not None:
        return f"passed by {clean(socket.socket_unit)}"
    if socket.family == "unix":
        return ""
    if socket.creator is None:
        return socket.creator_reason or ""
    if socket.creator.unit == unit:
        return ""
    return f"created by {clean(socket.creator.unit or socket.creator.control_group)}"
