"""A stop as lines: each event as it happens, the countdown, and the report at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from sdtool.model.process import ProcessRef, Role
from sdtool.model.sockets import endpoint
from sdtool.model.stop import (
    INFINITY,
    Event,
    EventKind,
    EventSource,
    Evidence,
    PortChange,
    ProcessFate,
    SignalResult,
    StopReport,
    Verdict,
)
from sdtool.render.plain import clean, count, duration, exit_status, seconds

VERDICT_STYLES = {
    Verdict.CLEAN: "bold green",
    Verdict.KILLED: "bold red",
    Verdict.FAILED: "bold red",
    Verdict.LEFTOVER: "bold yellow",
    Verdict.UNKNOWN: "bold yellow",
}

HINTS = {
    Verdict.KILLED: "sdtool trace shows, while it runs, what ignores the signal; if it only needs "
    "longer, raise TimeoutStopSec=",
    Verdict.UNKNOWN: "sdtool doctor shows what cannot be observed here",
}

MAX_LISTED = 8

MAX_NAMED = 3

MIXED_HINT = "KillMode=control-group would send them the stop signal first"

QUIET = frozenset(
    {EventKind.CONTROL_EXIT, EventKind.JOB_NEW, EventKind.OBSERVER}
    | {EventKind.PROCESS_EXEC, EventKind.SIGNAL_DELIVERED}
)
"""Kinds that a person can do without; JSON has them."""

ROUND_US = 5_000
"""The manager sends a signal to one process after the other: so close together it is one round."""

RESULTS: dict[str | None, str] = {
    SignalResult.IGNORED: "it was ending, or ignored it",
    SignalResult.ALREADY_PENDING: "it was pending already",
    SignalResult.OVERFLOW_FAIL: "there was no room for it",
}

SIGNALS = (EventKind.SIGNAL_SENT, EventKind.SIGNAL_IGNORED)


def group_events(events: Iterable[Event]) -> list[tuple[Event, ...]]:
    """Events that make one line: a signal that is sent to many processes, and who ignores it."""
    groups: list[list[Event]] = []
    rounds: dict[tuple[object, ...], tuple[list[Event], set[tuple[object, ...]]]] = {}
    for event in events:
        if event.kind not in SIGNALS:
            groups.append([event])
            continue
        key = (event.unit, event.signal, event.sender_pid, event.evidence)
        who = (event.kind, event.pid)
        group, known = rounds.get(key, ([], set()))
        # A process that has it already gets it anew: that is the next round.
        if not group or who in known or event.at_us - group[0].at_us > ROUND_US:
            group, known = rounds[key] = [], set()
            groups.append(group)
        group.append(event)
        known.add(who)
    return [tuple(group) for group in groups]


def render_events(
    events: Sequence[Event], start_us: int, *, with_unit: bool, verbose: bool = False
) -> list[Text]:
    """A line for each event or group of events that a person wants to see."""
    wanted = [event for event in events if verbose or not _is_quiet(event)]
    return [_line(group, start_us, with_unit=with_unit) for group in group_events(wanted)]


def _is_quiet(event: Event) -> bool:
    """The start of a command is told once, with what it runs for."""
    born = event.kind is EventKind.PROCESS_NEW and event.role is Role.CONTROL
    return born or event.kind in QUIET


def _line(group: Sequence[Event], start_us: int, *, with_unit: bool) -> Text:
    event = group[0]
    inferred = event.evidence is Evidence.INFERRED
    line = Text.assemble((f"{seconds(max(0, event.at_us - start_us)):>9} s ", "dim"))
    line.append("~ " if inferred else "  ", "dim")
    if with_unit:
        line.append(f"{clean(event.unit)}  ", "dim")
    is_managers = event.kind is EventKind.GAP and event.source is EventSource.SDTOOL
    line.append_text(_gap(event, start_us) if is_managers else _words(group))
    if not is_managers and event.at_min_us is not None and event.at_max_us is not None:
        low, high = event.at_min_us - start_us, event.at_max_us - start_us
        how = "inferred" if inferred else "seen late"
        line.append(f"  ({how}: {seconds(low)} to {seconds(high)})", "dim")
    return line


def _words(group: Sequence[Event]) -> Text:
    event = group[0]
    who = _who(event.pid, event.comm)
    words = {
        EventKind.JOB_NEW: "stop job queued",
        EventKind.JOB_DONE: f"job {event.result or 'over'}",
        EventKind.CONTROL_START: f"{who} runs {clean(event.text or 'as control process')}",
        EventKind.CONTROL_EXIT: f"{who} is done",
        EventKind.PROCESS_NEW: f"{who} appeared",
        EventKind.PROCESS_EXEC: f"{who} runs {clean(event.text or '?')}",
        EventKind.SIGNAL_DELIVERED: f"{who} handles {event.signal}",
        EventKind.PROCESS_REAPED: f"{who} reaped: it {exit_status(event.exit)}",
        EventKind.LEFTOVER: f"{who} stays behind",
        EventKind.PORT_RELEASED: f"{_port(event)} is free",
        EventKind.CGROUP_EMPTY: "no process left in the cgroup",
        EventKind.CGROUP_POPULATED: "processes in the cgroup again",
        EventKind.CGROUP_REMOVED: "cgroup removed",
    }
    if event.kind is EventKind.STATE:
        return _state(event)
    if event.kind in SIGNALS:
        return _signal(group)
    if event.kind is EventKind.PROCESS_EXIT:
        ended = exit_status(event.exit) if event.exit else f"ended ({event.text})"
        return Text(f"{who} {ended}", "red" if "SIGKILL" in ended else "")
    if event.kind is EventKind.TIMEOUT:
        limit = duration(event.limit_us)
        return Text(f"{event.sub_state} ran out after {limit}: {event.then}", "yellow")
    style = "yellow" if event.kind is EventKind.GAP else ""
    return Text(words.get(event.kind, clean(event.text or event.kind)), style)


def _state(event: Event) -> Text:
    text = Text(f"{event.sub_state}", "bold")
    if event.result not in (None, "success") and event.active_state == "failed":
        text.append(f" (result {event.result})", "red")
    if event.limit_us == INFINITY:
        text.append(", no time limit", "dim")
    elif event.limit_us is not None:
        text.append(f", {event.then} in {duration(event.limit_us)}", "dim")
    return text


def _gap(event: Event, start_us: int) -> Text:
    text = Text("the manager is back", "yellow")
    if event.at_min_us is not None:
        text.append(f", unheard since {seconds(event.at_min_us - start_us)} s")
    text.append(f": {clean(event.text or 'it was out of reach')}", "")
    if event.limit_us == INFINITY:
        text.append(f" ({event.sub_state} has no time limit now)")
    elif event.limit_us is not None:
        text.append(f" ({event.then} {duration(event.limit_us)} after {event.sub_state} began)")
    return text


def _signal(group: Sequence[Event]) -> Text:
    signal = group[0].signal or "?"
    style = "bold red" if signal == "SIGKILL" else "bold cyan"
    sent = [event for event in group if event.kind is EventKind.SIGNAL_SENT]
    ignored = [event for event in group if event.kind is EventKind.SIGNAL_IGNORED]
    text = Text(signal, style)
    if group[0].sender_pid is not None:
        text.append(f" from {_who(group[0].sender_pid, group[0].sender_comm)}", "")
    elif group[0].source is EventSource.TRACEFS:
        text.append(" from the kernel", "")
    if sent:
        text.append(f" to {_targets(sent)}", "")
    if ignored:
        who = "it" if len(sent) == len(ignored) == 1 else _targets(ignored)
        text.append(f", ignored by {who}", "yellow")
    if len(sent) > MAX_NAMED:
        # Behind what matters most: it is what a narrow terminal cuts.
        text.append(f": {', '.join(_names(sent)[:MAX_NAMED])} ...", "")
    if len(group) == 1 and group[0].result in RESULTS:
        text.append(f" ({RESULTS[group[0].result]})", "dim")
    return text


def _targets(events: Sequence[Event]) -> str:
    """Who they are, or how many."""
    many = len(events) > MAX_NAMED
    return count(len(events), "process") if many else ", ".join(_names(events))


def _names(events: Sequence[Event]) -> list[str]:
    return [_who(event.pid, event.comm) for event in events]


def _who(pid: int | None, comm: str | None) -> str:
    return f"{pid} ({clean(comm or '?')})"


def _port(event: Event) -> str:
    return f"{event.protocol} {endpoint(event.address or '', event.port)}"


def render_countdown(state: Event | None, now_us: int) -> Text:
    """What the manager waits for, and how long still."""
    if state is None:
        return Text("")
    elapsed = (now_us - state.at_us) / 1_000_000
    text = Text(f"{elapsed:9.1f} s   {clean(state.unit)}: {state.sub_state}", "dim")
    if isinstance(state.limit_us, int):
        left = max(0.0, state.limit_us / 1_000_000 - elapsed)
        text.append(f", {state.then} in {left:.1f} s", "yellow")
    elif state.limit_us is not None:
        text.append(", no time limit", "yellow")
    return text


def render_reports(reports: Sequence[StopReport]) -> RenderableType:
    """The verdicts, with what a person should know or do."""
    return Group(*(_report(report) for report in reports))


def _report(report: StopReport) -> RenderableType:
    head = Text.assemble(
        (report.verdict, VERDICT_STYLES[report.verdict]),
        "  ",
        (clean(report.unit), "bold"),
        f"  {report.duration_us / 1_000_000:.2f} s  ",
        clean(report.verdict_reason),
    )
    lines: list[RenderableType] = [head]
    if report.leftovers:
        lines.append(_listed("left behind", map(_ref, report.leftovers)))
    if report.ports_released:
        lines.append(_listed("free again", map(_change, report.ports_released)))
    if report.ports_held:
        lines.append(_listed("still taken", map(_change, report.ports_held), "yellow"))
    verdicts = {other.unit: f" ({other.verdict})" for other in report.along}
    if along := dict.fromkeys((*report.also_stopped, *verdicts)):
        lines.append(_listed("stopped along", (f"{n}{verdicts.get(n, '')}" for n in along)))
    if report.reactivated_by:
        lines.append(_listed("started again by", report.reactivated_by, "yellow"))
    elif report.triggers_active:
        lines.append(_listed("can be started again by", report.triggers_active))
    surprises = [fate for fate in report.processes if fate.as_predicted is False]
    if surprises:
        lines.append(_listed("not as predicted", map(_surprise, surprises), "yellow"))
    if report.unread_reason is not None:
        lines.append(Text(f"  {clean(report.unread_reason)}", "yellow"))
    if report.processes:
        lines.append(Text(f"  observed in tier {report.tier}: {report.tier.gives}", "dim"))
    hint = _hint(report)
    if hint is not None:
        lines.append(Text(f"  ({clean(hint)})", "dim"))
    return Group(*lines)


def _surprise(fate: ProcessFate) -> str:
    """A process whose signal masks had said something else."""
    return f"{fate.pid} ({fate.comm}): {fate.disposition_reason}, but {fate.fate_reason}"


def _hint(report: StopReport) -> str | None:
    """What the reader can do next."""
    policy = report.policy
    if report.job_result == "frozen":
        return f"systemctl thaw {report.unit}, and stop it then"
    if report.ports_held and report.verdict is not Verdict.LEFTOVER:
        return f"sdtool port {report.ports_held[0].port} tells who has it"
    if report.verdict is Verdict.KILLED and policy and policy.kill_mode == "mixed":
        return MIXED_HINT
    if report.verdict is Verdict.LEFTOVER and policy:
        if policy.kill_mode in ("process", "none"):
            return "KillMode=control-group would end them with the unit"
        return None if policy.send_sigkill else "SendSIGKILL=no left them alive"
    if report.verdict is Verdict.FAILED:
        return f"journalctl -u {report.unit} shows what it said (--user for a user unit)"
    return HINTS.get(report.verdict)


def _listed(title: str, items: Iterable[str], style: str = "") -> Text:
    names = [clean(item) for item in items]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return Text(f"  {title}: {', '.join(names[:MAX_LISTED])}{more}", style)


def _ref(ref: ProcessRef) -> str:
    return f"{ref.pid} ({ref.comm})"


def _change(change: PortChange) -> str:
    return f"{change.protocol} {endpoint(change.address, change.port)}"
