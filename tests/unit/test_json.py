"""The JSON contract: keys that scripts rely on may be added to, never dropped."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.analysis.membership import build_processes, explain_process, list_units, take_census
from sdtool.analysis.ports import judge_port, name_listeners
from sdtool.errors import NoSuchUnit, SdtoolError
from sdtool.model.facility import Facility
from sdtool.model.ports import PortSpec
from sdtool.model.process import Container, ProcessRef
from sdtool.model.sockets import Creator, Holder
from sdtool.model.stop import (
    EventKind,
    EventSource,
    Evidence,
    ExitCode,
    ExitSignal,
    PortChange,
    Tier,
    Verdict,
)
from sdtool.model.unit import ManagerRoots, Trace
from sdtool.render.json import EVENT_FIELDS, envelope, event_line, to_plain
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
    socket,
    stopped,
    unit,
)

ROOTS = ManagerRoots()

UNIT_KEYS = (
    *("name", "description", "load_state", "active_state", "sub_state", "unit_file_state"),
    *("main_pid", "control_group", "result", "n_restarts", "fragment_path", "invocation_id"),
)
PROCESS_KEYS = (
    *("pid", "start_ticks", "ppid", "comm", "argv", "user", "state", "role", "control_group"),
    *("cpu_us", "rss_bytes", "adopted", "disposition", "disposition_reason", "container"),
    *("unread_reason",),
)
SOCKET_KEYS = (
    *("family", "protocol", "type", "address", "port", "path", "state", "inode", "uid"),
    *("v6only", "netns", "netns_name", "creator", "holders", "holders_complete"),
    *("holders_reason", "socket_unit"),
)
POLICY_KEYS = (
    *("kill_mode", "kill_signal", "restart_kill_signal", "final_kill_signal", "send_sigkill"),
    *("send_sighup", "timeout_stop_us", "timeout_stop_failure_mode", "timeout_abort_us"),
    *("exec_stop", "exec_stop_post"),
)
REPORT_KEYS = (
    *("unit", "policy", "tier", "observers", "requested_us", "duration_us", "events"),
    *("job_result", "result", "active_state", "verdict", "verdict_reason", "processes"),
    *("killed", "also_stopped", "reactivated_by", "leftovers", "ports_released", "ports_held"),
)
FATE_KEYS = (
    *("pid", "comm", "role", "disposition", "signalled_us", "exit_us", "exit"),
    *("killed_by_manager", "fate_reason"),
)
OWNER_KEYS = (
    *("pid", "comm", "unit", "user_unit", "slice", "session", "container", "role", "managed"),
    "ancestry",
)
PORT_CHANGE_KEYS = ("protocol", "address", "port", "at_us")

PROCESS = build_processes([facts()], details())[0]
SOCKET = socket(
    creator=Creator(unit=UNIT, manager="system", control_group=GROUP),
    holders=(Holder(pid=1, comm="x", unit=UNIT, manager="system"),),
)
TRACE = Trace(
    unit=UNIT,
    status=unit(),
    policy=policy(),
    processes=(PROCESS,),
    sockets=(SOCKET,),
    sockets_reason=None,
    triggered_by=("web.socket",),
)
BLOCKED = judge_port(PortSpec(port=80), [replace(SOCKET, state="TIME_WAIT")])[0]
OWNED = judge_port(PortSpec(port=80), [SOCKET])[0]
CHANGE = PortChange(protocol="tcp", address="::", port=80, at_us=T0)
REPORT = stopped(
    [MAIN, CHILD],
    [phase(ms(4), "stop-sigterm"), gone(ms(5), MAIN), gone(ms(6), CHILD, KILLED), dead(ms(7))],
    policy(kill_mode="mixed"),
    survivors=(CHILD,),
    released=(CHANGE,),
    held=(CHANGE,),
)

SHAPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Unit": (unit(), UNIT_KEYS),
    "list": (
        list_joined([unit()], {}, {}, [], [], ROOTS)[0],
        (*UNIT_KEYS, "processes", "processes_reason", "ports", "ports_reason", "unread_reason"),
    ),
    "Process": (PROCESS, PROCESS_KEYS),
    "container": (Container(runtime="docker", id="0"), ("runtime", "id", "pod")),
    "Socket": (SOCKET, SOCKET_KEYS),
    "creator": (SOCKET.creator, ("unit", "control_group")),
    "holder": ((SOCKET.holders or ())[0], ("pid", "comm", "unit")),
    "StopPolicy": (policy(), POLICY_KEYS),
    "StopReport": (REPORT, REPORT_KEYS),
    "fate": (REPORT.processes[0], FATE_KEYS),
    "exit code": (ExitCode(code=0), ("code",)),
    "exit signal": (ExitSignal(signal="SIGKILL", core=False), ("signal", "core")),
    "observer": (REPORT.observers[0], ("name", "available", "reason", "lost")),
    "leftover": (REPORT.leftovers[0], ("pid", "comm")),
    "port released": (REPORT.ports_released[0], PORT_CHANGE_KEYS),
    "port held": (REPORT.ports_held[0], PORT_CHANGE_KEYS),
    "trace": (TRACE, ("unit", "policy", "processes", "sockets", "triggered_by")),
    "port": (OWNED, ("port", "protocol", "verdict", "owners", "blocked_by", "hint")),
    "owner": (OWNED.owners[0], ("unit", "via", "socket")),
    "block": (BLOCKED.blocked_by[0], ("state", "expires_us", "peer", "unit")),
    "ports": (name_listeners([SOCKET])[0], ("unit", "socket")),
    "pid": (explain_process(facts(), details(), None, (), ROOTS), OWNER_KEYS),
    "ancestor": (ProcessRef(pid=1, comm="x"), ("pid", "comm")),
    "doctor": (
        Facility(facility="bus", available=True, reason="", gives=""),
        ("facility", "available", "reason", "gives", "costs"),
    ),
}
"""Every shape of the contract that a command gives: one value and its keys."""

EVENT_KEYS: dict[str, tuple[str, ...]] = {
    "observer": ("text",),
    "job-new": (),
    "job-done": ("result",),
    "state": ("active_state", "sub_state", "result"),
    "control-start": ("pid", "comm", "role"),
    "control-exit": ("pid", "comm", "role"),
    "signal-sent": ("pid", "comm", "role", "signal", "sender_pid", "sender_comm"),
    "signal-delivered": ("pid", "comm", "role", "signal", "sender_pid", "sender_comm"),
    "signal-ignored": ("pid", "comm", "role", "signal", "sender_pid", "sender_comm"),
    "process-new": ("pid", "comm", "role"),
    "process-exec": ("pid", "comm", "role"),
    "process-exit": ("pid", "comm", "role", "exit"),
    "process-reaped": ("pid", "comm", "role", "exit"),
    "timeout": ("sub_state",),
    "leftover": ("pid", "comm", "role"),
    "port-released": ("protocol", "port"),
    "cgroup-empty": (),
    "cgroup-populated": (),
    "cgroup-removed": (),
    "gap": ("text", "sub_state", "limit_us", "then"),
}
"""Every kind of event with the keys that it needs."""


def opened(data: list[Any], errors: list[SdtoolError] | None = None, status: int = 0) -> Any:
    """An envelope, read again."""
    return json.loads(envelope("list", data, errors or [], status))


# Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_keeps_its_keys(shape: str) -> None:
    """Adding a field is allowed, renaming or dropping one is not."""
    value, keys = SHAPES[shape]
    assert set() == set(keys) - set(to_plain(value))


@pytest.mark.parametrize("kind", EVENT_KEYS)
def test_event_keeps_its_keys(kind: str) -> None:
    """When, what, who told, and what the kind needs."""
    plain = to_plain(event(T0, EventKind(kind)))
    assert set() == {"at_us", "evidence", "source", "kind", *EVENT_KEYS[kind]} - set(plain)
    assert not {"at_min_us", "at_max_us"} & set(plain)


@pytest.mark.parametrize("kind", EventKind)
def test_inferred_event_has_its_bounds(kind: EventKind) -> None:
    """An event that was concluded says between which moments it lies."""
    inferred = event(T0, kind, evidence=Evidence.INFERRED, at_min_us=T0 - 1, at_max_us=T0 + 1)
    plain = to_plain(inferred)
    assert (T0 - 1, T0 + 1, "inferred") == (
        plain["at_min_us"],
        plain["at_max_us"],
        plain["evidence"],
    )


def test_every_kind_of_event_is_in_the_contract() -> None:
    """A new kind has to be named here and given its keys in the renderer."""
    assert list(EVENT_KEYS) == [kind.value for kind in EventKind]
    assert set(EventKind) == set(EVENT_FIELDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (Verdict, ["leftover", "killed", "failed", "unknown", "clean"]),
        (Evidence, ["observed", "inferred"]),
        (Tier, ["A", "B", "C", "D"]),
        (
            EventSource,
            ["dbus", "tracefs", "procevents", "pidfd", "cgroup", "sockets", "journal", "sdtool"],
        ),
    ],
)
def test_closed_words_are_the_contracts(words: Any, expected: list[str]) -> None:
    """What sdtool decides has a fixed vocabulary, in this order."""
    assert expected == [word.value for word in words]


def test_unknown_of_a_listed_unit_has_its_own_reason_beside_it() -> None:
    """Processes and ports are null with why, each for itself; what is known has none."""
    census = take_census((), {}, (), ROOTS, ports_reason="cgroup v1")
    blind = take_census((), {}, (), ROOTS, processes_reason="no cgroups", ports_reason="nor these")
    rows = [list_units([unit()], one, "system")[0] for one in (census, blind)]
    keys = ("processes", "processes_reason", "ports", "ports_reason")
    assert [(0, None, None, "cgroup v1"), (None, "no cgroups", None, "nor these")] == [
        tuple(document[key] for key in keys) for document in opened(rows)["data"]
    ]


# Envelope ------------------------------------------------------------------------------------


def test_envelope_has_its_keys_in_order() -> None:
    """Version, command, exit, data, errors, and what the data may lack."""
    document = opened([unit()])
    assert ["sdtool", "command", "exit", "data", "errors", "notes"] == list(document)
    assert (1, "list", 0, []) == (
        document["sdtool"],
        document["command"],
        document["exit"],
        document["errors"],
    )


def test_error_in_the_envelope_has_its_four_keys() -> None:
    """Kind, subject, sentence, hint; null where there is none."""
    errors = [NoSuchUnit("No x.", subject="x", hint="look"), SdtoolError("A bug.")]
    document = opened([], errors, 5)
    assert [
        {"code": "NoSuchUnit", "subject": "x", "message": "No x.", "hint": "look"},
        {"code": "SdtoolError", "subject": None, "message": "A bug.", "hint": None},
    ] == document["errors"]
    assert 5 == document["exit"]


def test_envelope_and_event_are_one_line_each() -> None:
    """--jsonl: an event a line, the envelope last."""
    assert "\n" not in envelope("stop", [REPORT], [NoSuchUnit("a\nb")], 1)
    assert "\n" not in event_line(event(T0, EventKind.GAP, text="a\nb"))


def test_values_are_json_s_own() -> None:
    """Enums as their words, tuples as lists, infinity as a word, times as RFC 3339."""
    assert "killed" == to_plain(Verdict.KILLED)
    assert [1, "a"] == to_plain((1, "a"))
    assert "infinity" == to_plain(policy(timeout_stop_us="infinity"))["timeout_stop_us"]
    assert "2024-05-01T00:00:00+00:00" == to_plain(datetime(2024, 5, 1, tzinfo=UTC))


def test_report_is_whole() -> None:
    """Nested values are plain too."""
    (document,) = opened([REPORT])["data"]
    assert {"signal": "SIGKILL", "core": False} == document["processes"][1]["exit"]
    assert ["state", "process-exit"] == [
        entry["kind"] for entry in document["events"] if entry["evidence"] == "observed"
    ][:2]


# Odd text ------------------------------------------------------------------------------------

raw = st.binary(max_size=40).map(os.fsdecode)


@given(comm=raw, argv=st.lists(raw, max_size=3), subject=raw, message=raw, hint=raw)
def test_envelope_is_valid_whatever_processes_call_themselves(
    comm: str, argv: list[str], subject: str, message: str, hint: str
) -> None:
    """Names are any bytes; the document is JSON that UTF-8 can carry, lone surrogates included."""
    process = replace(PROCESS, comm=comm, argv=tuple(argv))
    error = NoSuchUnit(message, subject=subject, hint=hint)
    document = opened([process], [error], 5)
    json.dumps(document, ensure_ascii=False).encode()
    assert opened([], []) == {**document, "data": [], "errors": [], "exit": 0}
    if comm.isprintable():
        assert comm == document["data"][0]["comm"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_valid_text_is_kept_as_it_is(text: str) -> None:
    """JSON escapes for itself: control characters reach scripts unchanged."""
    assert text == opened([unit(description=text)])["data"][0]["description"]
