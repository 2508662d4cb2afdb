"""What people read: tables, traces, timelines; nothing in it may harm a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from sdtool.analysis.membership import build_processes, explain_process, list_units, take_census
from sdtool.analysis.ports import judge_port, name_listeners
from sdtool.model.facility import Facility
from sdtool.model.ports import PortSpec
from sdtool.model.process import ProcessRef
from sdtool.model.sockets import Creator, Holder
from sdtool.model.stop import (
    Event,
    EventKind,
    EventSource,
    ExitCode,
    PortChange,
    SignalResult,
    Verdict,
)
from sdtool.model.unit import ManagerRoots, Trace
from sdtool.render.tables import (
    render_facilities,
    render_listeners,
    render_owners,
    render_ports,
    render_units,
    summarise_units,
)
from sdtool.render.timeline import (
    group_events,
    render_countdown,
    render_events,
    render_reports,
)
from sdtool.render.trace import render_traces
from tests.unit.make import (
    CHILD,
    GROUP,
    KILLED,
    MAIN,
    T0,
    UNIT,
    dead,
    details,
    event,
    facts,
    gone,
    list_joined,
    ms,
    phase,
    policy,
    row,
    socket,
    stopped,
    unit,
)

ROOTS = ManagerRoots()
EVIL = "x\x1b[31m\n\x07\u202e"
SHOWN = r"x\x1b[31m\x0a\x07\u202e"


def printed(renderable: RenderableType, width: int = 300) -> str:
    """What a terminal without colours of this width would get."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, markup=False, emoji=False)
    console.print(renderable)
    return out.getvalue()


def trace(**fields: Any) -> Trace:
    """A unit with a parent, two children, a grandchild, and a socket."""
    rows = [facts(10, 1), facts(11, 10), facts(12, 11), facts(13, 10)]
    values: dict[str, Any] = {
        "unit": UNIT,
        "status": unit(control_group=GROUP, result="success"),
        "policy": policy(),
        "processes": build_processes(rows, details()),
        "sockets": (socket(holders=(Holder(pid=10, comm="x", unit=UNIT, manager="system"),)),),
        "sockets_reason": None,
        "triggered_by": (),
    }
    return Trace(**{**values, **fields})


def timeline(*events: Event, **options: Any) -> str:
    """The lines of events."""
    lines = render_events(events, T0, with_unit=False, **options)
    return "".join(printed(line) for line in lines)


# Tables --------------------------------------------------------------------------------------


def test_list_of_several_managers_says_whose_each_unit_is() -> None:
    """By the user's name; with one manager there is nothing to say."""
    census = take_census((), {}, (), ROOTS)
    own = list_units([unit()], census, "system")
    rows = (*own, *list_units([unit()], census, "user@7.service", "ann"))
    head, first, second = printed(render_units(rows)).splitlines()
    assert ["MANAGER", "UNIT"] == head.split()[:2]
    assert ["system", UNIT] == first.split()[:2]
    assert ["user", "ann", UNIT] == second.split()[:3]
    assert "MANAGER" not in printed(render_units(own))
    assert "2 units of 2 managers" == summarise_units(rows)


def test_list_has_processes_and_ports() -> None:
    """One line a unit; the LOAD column only where something is not loaded."""
    rows = list_joined(
        [unit(), unit("gone.service", load_state="not-found", active_state="failed")],
        {GROUP: (10, 11)},
        {7: GROUP},
        [row()],
        [],
        ROOTS,
    )
    head, first, second = printed(render_units(rows)).splitlines()
    assert ["UNIT", "LOAD", "ACTIVE", "SUB", "PROCS", "PORTS", "DESCRIPTION"] == head.split()
    assert [UNIT, "loaded", "active", "running", "2", "80/tcp", "Web"] == first.split()
    assert ["gone.service", "not-found", "failed", "running", "-", "Web"] == second.split()
    assert "LOAD" not in printed(render_units(rows[:1]))
    assert "2 units, 1 failed" == summarise_units(rows)


def test_list_says_once_below_why_something_is_not_known() -> None:
    """One line for each reason; none where all is known."""
    known, blind, v1 = (
        list_units([unit(), unit("b.service")], take_census((), {}, (), ROOTS, **why), "system")
        for why in (
            {},
            {"processes_reason": "no\ncgroups", "ports_reason": "no\ncgroups"},
            {"ports_reason": "cgroup v1"},
        )
    )
    assert 3 == len(printed(render_units(known)).splitlines())
    _, row, _, *below = printed(render_units(blind)).splitlines()
    assert ["?", "?"] == row.split()[3:5]
    assert [r"(processes and ports are not known: no\x0acgroups)"] == below
    _, row, _, *below = printed(render_units(v1)).splitlines()
    assert ["-", "?"] == row.split()[3:5]
    assert ["(ports are not known: cgroup v1)"] == below


@pytest.mark.parametrize("width", [20, 80, 300])
def test_list_fits_the_terminal(width: int) -> None:
    """No line is wider than it."""
    rows = list_joined([unit("a" * 200 + ".service")], {}, {}, [], [], ROOTS)
    assert all(len(line) <= width for line in printed(render_units(rows), width).splitlines())


def test_port_names_unit_and_door() -> None:
    """Who, how, at which address, in which process."""
    taken = socket(holders=(Holder(pid=10, comm="web", unit=UNIT, manager="system"),))
    text = printed(render_ports(judge_port(PortSpec(port=80), [taken])))
    assert "80/tcp  owned" in text
    assert f"{UNIT}  holds it: 127.0.0.1:80 LISTEN; pid 10 (web)" in text


def test_blocked_port_says_until_when() -> None:
    """The state, the peer, the time left."""
    old = socket(state="TIME_WAIT", inode=None, expires_us=30_000_000, peer="10.0.0.1:9")
    text = printed(render_ports(judge_port(PortSpec(port=80), [old])))
    assert "80/tcp  blocked" in text
    assert "TIME_WAIT with 10.0.0.1:9, free in 30 s" in text


def test_ports_name_creator_and_hidden_holders() -> None:
    """Two facts in two columns."""
    made = socket(creator=Creator(unit=UNIT, manager="system", control_group=GROUP))
    text = printed(render_listeners(name_listeners([made])))
    assert [UNIT, "tcp", "127.0.0.1:80", "hidden", UNIT] == text.splitlines()[1].split()


def test_pid_tells_who_manages_it() -> None:
    """With the reason, and the parents."""
    owner = explain_process(facts(), details(), None, (ProcessRef(pid=1, comm="systemd"),), ROOTS)
    text = printed(render_owners([owner]))
    assert f"managed: {UNIT} manages it" in text
    assert "1 (systemd)" in text


def test_doctor_says_yes_or_no() -> None:
    """A line a facility."""
    rows = [
        Facility(facility="bus", available=False, reason="no bus", gives="units"),
        Facility(facility="pidfd", available=True, reason="here", gives="exits"),
    ]
    lines = printed(render_facilities(rows)).splitlines()
    assert ["no", "yes"] == [line.split()[0] for line in lines[1:]]


# Traces --------------------------------------------------------------------------------------


def test_trace_draws_the_tree() -> None:
    """Children hang below their parents."""
    text = printed(render_traces([trace()]))
    for branch in ("10 ", "├─11", "│ └─12", "└─13"):
        assert branch in text
    assert "SIGTERM to every process, SIGKILL after 2 s" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kill_mode": "mixed"}, "SIGTERM to the main process, SIGKILL to the rest"),
        ({"kill_mode": "process"}, "to the main process alone: the others stay"),
        ({"kill_mode": "none"}, "to nobody: all processes stay"),
        ({"send_sigkill": False}, "no SIGKILL: it asks again after 2 s, then gives up"),
        ({"exec_stop": 1}, "1 ExecStop command, SIGTERM"),
        ({"timeout_stop_us": "infinity"}, "to every process, no time limit"),
    ],
)
def test_trace_puts_the_policy_in_words(fields: dict[str, Any], words: str) -> None:
    """What a stop would do, in one line."""
    assert words in printed(render_traces([trace(policy=policy(**fields))]))


def test_trace_without_processes_says_so() -> None:
    """An inactive unit."""
    status = unit(active_state="inactive", sub_state="dead")
    text = printed(render_traces([trace(processes=(), sockets=(), status=status)]))
    assert "inactive (dead)" in text
    assert "no processes" in text


def test_trace_says_what_it_could_not_see() -> None:
    """The list of sockets may lack some."""
    assert "(needs root)" in printed(render_traces([trace(sockets_reason="needs root")]))


# Timelines -----------------------------------------------------------------------------------


def test_line_has_time_and_words() -> None:
    """Seconds since the request, to the millisecond."""
    assert "    0.005 s   10 (p10) exited 0\n" == timeline(gone(ms(5), MAIN))


def test_inferred_line_is_marked_with_its_bounds() -> None:
    """Nobody saw the signal: a tilde, and between which moments it was."""
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN)])
    text = timeline(*report.events)
    assert "0.004 s ~ SIGTERM to 10 (p10)  (inferred: 0.000 to 0.004)" in text


def test_same_signal_to_many_is_one_line() -> None:
    """Five processes: how many, and the first three."""
    events = [
        event(ms(1), EventKind.SIGNAL_SENT, pid=pid, comm=f"p{pid}", signal="SIGTERM")
        for pid in range(10, 15)
    ]
    assert [5] == [len(group) for group in group_events(events)]
    assert "SIGTERM to 5 processes: 10 (p10), 11 (p11), 12 (p12) ..." in timeline(*events)


def test_round_of_a_signal_says_from_whom_and_who_ignores_it() -> None:
    """One process after the other gets it; what else happens meanwhile has a line of its own."""
    sender = {"sender_pid": 1, "sender_comm": "systemd", "signal": "SIGTERM"}
    events = [
        event(ms(1), EventKind.SIGNAL_SENT, pid=10, comm="a", **sender),
        event(ms(1.1), EventKind.PROCESS_EXIT, pid=10, comm="a", exit=ExitCode(code=0)),
        event(ms(1.2), EventKind.SIGNAL_SENT, pid=11, comm="b", **sender),
        event(ms(1.2), EventKind.SIGNAL_IGNORED, pid=11, comm="b", **sender),
    ]
    first, second = timeline(*events).splitlines()
    assert first.endswith("SIGTERM from 1 (systemd) to 10 (a), 11 (b), ignored by 11 (b)")
    assert second.endswith("10 (a) exited 0")


def test_only_one_that_ignores_a_signal_is_not_named_twice() -> None:
    """Nor is what the kernel says of it left out."""
    sender = {"pid": 11, "comm": "b", "sender_pid": 1, "sender_comm": "x", "signal": "SIGTERM"}
    sent = event(ms(1), EventKind.SIGNAL_SENT, **sender)
    ignored = event(ms(1), EventKind.SIGNAL_IGNORED, **sender)
    late = replace(sent, at_us=ms(30), result=SignalResult.IGNORED)
    first, second = timeline(sent, ignored, late).splitlines()
    assert first.endswith("SIGTERM from 1 (x) to 11 (b), ignored by it")
    assert second.endswith("SIGTERM from 1 (x) to 11 (b) (it was ending, or ignored it)")


def test_signal_of_the_kernels_has_no_sender() -> None:
    """Nobody sent it, and that was seen; where it was not seen nothing is said."""
    sent = event(ms(1), EventKind.SIGNAL_SENT, pid=11, comm="b", signal="SIGKILL")
    seen = replace(sent, source=EventSource.TRACEFS)
    assert "SIGKILL from the kernel to 11 (b)" in timeline(seen)
    assert "   SIGKILL to 11 (b)" in timeline(sent)


def test_different_signals_are_lines_of_their_own() -> None:
    """Another signal, another moment or another unit."""
    first = event(ms(1), EventKind.SIGNAL_SENT, pid=10, comm="a", signal="SIGTERM")
    others = [replace(first, signal="SIGKILL"), replace(first, at_us=ms(20))]
    assert 3 == len(group_events([first, *others]))


def test_quiet_events_need_verbose() -> None:
    """A person can do without the observers; -v shows them."""
    quiet = event(ms(0), EventKind.OBSERVER, text="pidfd: exits")
    assert "" == timeline(quiet)
    assert "pidfd: exits" in timeline(quiet, verbose=True)


@pytest.mark.parametrize("kind", EventKind)
def test_every_kind_of_event_has_a_line(kind: EventKind) -> None:
    """None is printed as nothing, or as None."""
    told = event(ms(1), kind, pid=10, comm="x", sub_state="stop", port=80, address="::1")
    text = timeline(replace(told, protocol="tcp", text="words", result="done"), verbose=True)
    assert text.strip()


def test_countdown_tells_what_comes_next() -> None:
    """In which phase, and when the manager loses its patience."""
    state = phase(ms(0), "stop-sigterm")
    assert "web.service: stop-sigterm, SIGKILL in 1.5 s" in printed(
        render_countdown(state, ms(500))
    )
    forever = phase(ms(0), "stop-sigterm", limit_us="infinity")
    assert "no time limit" in printed(render_countdown(forever, ms(500)))
    assert "" == printed(render_countdown(None, 0)).strip()


def test_countdown_never_goes_below_zero() -> None:
    """A limit fires up to a quarter of a second late."""
    text = printed(render_countdown(phase(ms(0), "stop-sigterm"), ms(2200)))
    assert "SIGKILL in 0.0 s" in text


# Reports -------------------------------------------------------------------------------------


def test_report_begins_with_its_verdict() -> None:
    """Verdict, unit, duration, reason."""
    report = stopped([MAIN], [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), dead(ms(6))])
    text = printed(render_reports([report]))
    assert text.startswith(f"clean  {UNIT}  1.00 s  The process ended without a SIGKILL")


def test_report_says_how_much_was_observed() -> None:
    """And which process did not do what its signal masks had promised."""
    signals = [event(ms(1), EventKind.SIGNAL_SENT, pid=10, signal="SIGTERM", result="delivered")]
    report = stopped([MAIN], [*signals, gone(ms(5), MAIN), dead(ms(6))])
    text = printed(render_reports([report]))
    assert "observed in tier C: ends with their wait status; signals are inferred" in text
    words = "not as predicted: 10 (p10): default action of SIGTERM, but exited with 0"
    assert words in text


def test_killed_report_gives_a_hint() -> None:
    """Another one where KillMode=mixed is the cause."""
    report = stopped(
        [MAIN, CHILD],
        [
            phase(ms(4), "stop-sigterm"),
            gone(ms(5), MAIN),
            phase(ms(6), "final-sigkill"),
            gone(ms(7), CHILD, KILLED),
        ],
        policy(kill_mode="mixed"),
    )
    assert Verdict.KILLED == report.verdict
    assert "KillMode=control-group" in printed(render_reports([report]))


def test_report_lists_what_else_happened() -> None:
    """Left-overs, ports, units that went along or started it again."""
    change = PortChange(protocol="tcp", address="::1", port=80, at_us=ms(5))
    report = stopped(
        [],
        [],
        survivors=(CHILD,),
        released=(change,),
        held=(replace(change, port=81),),
        also_stopped=("app.service",),
        reactivated_by=("web.socket",),
    )
    text = printed(render_reports([report]))
    for words in (
        "left behind: 11 (p11)",
        "free again: tcp [::1]:80",
        "still taken: tcp [::1]:81",
        "stopped along: app.service",
        "started again by: web.socket",
    ):
        assert words in text


# Hostile names -------------------------------------------------------------------------------


def evil(name: str) -> list[RenderableType]:
    """Every renderer, with this name wherever another process chooses one."""
    odd = Holder(pid=10, comm=name, unit=name, manager="system")
    taken = socket(
        holders=(odd,), creator=Creator(unit=name, manager="system", control_group=name)
    )
    owner = explain_process(facts(comm=name, control_group=name), None, None, (), ROOTS)
    process = replace(facts(10, 1, comm=name, argv=(name, name)), user=name)
    end = gone(ms(5), replace(MAIN, comm=name))
    report = stopped([MAIN], [end], survivors=(replace(MAIN, comm=name),), also_stopped=(name,))
    status = unit(name, description=name, fragment_path=name, control_group=name)
    return [
        render_units(list_joined([unit(name, description=name)], {}, {}, [], [], ROOTS)),
        render_ports(judge_port(PortSpec(port=80), [taken])),
        render_listeners(name_listeners([taken])),
        render_owners([replace(owner, ancestry=(ProcessRef(pid=1, comm=name),))]),
        render_traces(
            [
                trace(
                    unit=name,
                    status=status,
                    triggered_by=(name,),
                    processes=build_processes([process], details()),
                    sockets=(taken,),
                )
            ]
        ),
        *render_events([end, event(ms(1), EventKind.GAP, text=name)], T0, with_unit=True),
        render_countdown(replace(phase(ms(0), "stop"), unit=name), ms(1)),
        render_reports([replace(report, unit=name)]),
    ]


def test_hostile_name_is_shown_harmless() -> None:
    """Escapes of terminals, newlines and bidi controls come out as text."""
    for renderable in evil(EVIL):
        text = printed(renderable)
        assert not set("\x1b\x07\u202e") & set(text)
        assert "[31m" not in text.replace(SHOWN, "")
    assert SHOWN in printed(evil(EVIL)[0])


@settings(max_examples=15)
@given(st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=12))
def test_any_name_can_be_printed(name: str) -> None:
    """Brackets are no markup, colons no emoji, and nothing raises."""
    for renderable in evil(name):
        text = printed(renderable)
        assert not [char for char in text if ord(char) < 32 and char != "\n"]


def test_gap_says_since_when_and_why() -> None:
    """And what a reload has changed for the phase that it came upon."""
    bounds = {"at_min_us": ms(500), "at_max_us": ms(700)}
    plain = event(
        ms(700), EventKind.GAP, source=EventSource.SDTOOL, text="daemon-reexec", **bounds
    )
    moved = {"sub_state": "stop-sigterm", "limit_us": 5_000_000, "then": "SIGKILL"}
    changed = replace(plain, text="daemon-reload; the stop policy changed", **moved)
    lines = [str(line) for line in render_events([plain, changed], T0, with_unit=False)]
    back = "    0.700 s   the manager is back, unheard since 0.500 s: "
    assert f"{back}daemon-reexec" == lines[0]
    words = "daemon-reload; the stop policy changed (SIGKILL 5 s after stop-sigterm began)"
    assert f"{back}{words}" == lines[1]
