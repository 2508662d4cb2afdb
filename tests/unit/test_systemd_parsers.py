"""Replies and signals of a real systemd 252, as GetAll, ListUnitsByNames and the bus gave them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.manager import JobChange, MainExit, ManagerReloading, UnitChange
from sdtool.model.names import unit_path
from sdtool.model.sockets import ListenAddress
from sdtool.model.stop import ExitCode, ExitSignal, ExitStatus, StopPolicy
from sdtool.model.unit import UnitDetails
from sdtool.sources.bus import BusSignal
from sdtool.sources.messages import (
    MANAGER,
    PROPERTIES,
    UINT64_MAX,
    parse_details,
    parse_limit,
    parse_listens,
    parse_main_exit,
    parse_policy,
    parse_signal,
    parse_unit_row,
)
from tests.unit.make import captured_json

SERVICE = "sdtool-exec-stop.service"


def properties(kind: str) -> dict[str, Any]:
    """All properties of a unit of this type."""
    found: dict[str, Any] = captured_json(f"systemd-252/{kind}.json")
    return found


def captured_details(kind: str) -> UnitDetails:
    """The details of the captured unit of this type."""
    values = properties(kind)
    rows = {row[0]: row for row in captured_json("systemd-252/rows.json")}
    return parse_details(parse_unit_row(rows[values["Id"]]), values)


def test_unit_row_becomes_a_unit() -> None:
    """Empty words and a job number of 0 mean that there is none."""
    unit = parse_unit_row(captured_json("systemd-252/rows.json")[0])
    assert (SERVICE, "loaded", "active", "running") == (
        unit.name,
        unit.load_state,
        unit.active_state,
        unit.sub_state,
    )
    assert (None, None, "service") == (unit.job, unit.following, unit.unit_type)


def test_unit_row_with_a_job_keeps_it() -> None:
    """A row may be a tuple too: that depends on the D-Bus library."""
    row = ("a.device", "A", "loaded", "active", "plugged", "b.device", "/p", 7, "stop", "/j")
    assert ("stop", "b.device") == (parse_unit_row(row).job, parse_unit_row(row).following)


def test_service_has_its_details() -> None:
    """From one GetAll of all interfaces."""
    details = captured_details("service")
    values = properties("service")
    assert values["MainPID"] == details.unit.main_pid
    assert values["ControlGroup"] == details.unit.control_group
    assert ("static", "success", 0) == (
        details.unit.unit_file_state,
        details.unit.result,
        details.unit.n_restarts,
    )
    assert f"/etc/systemd/user/{SERVICE}" == details.unit.fragment_path
    assert bytes(values["InvocationID"]).hex() == details.unit.invocation_id
    assert (None, ()) == (details.control_pid, details.triggered_by)


def test_service_has_its_stop_policy() -> None:
    """Signals by name, limits in microseconds, commands counted."""
    assert (
        StopPolicy(
            kill_mode="control-group",
            kill_signal="SIGTERM",
            restart_kill_signal="SIGTERM",
            final_kill_signal="SIGKILL",
            watchdog_signal="SIGABRT",
            send_sigkill=True,
            send_sighup=False,
            timeout_stop_us=2_000_000,
            timeout_stop_failure_mode="terminate",
            timeout_abort_us=2_000_000,
            exec_stop=1,
            exec_stop_post=1,
        )
        == captured_details("service").policy
    )


def test_socket_calls_its_limit_by_another_name() -> None:
    """TimeoutUSec where services have TimeoutStopUSec, and it names what it triggers."""
    details = captured_details("socket")
    assert details.policy is not None
    assert (90_000_000, 0) == (details.policy.timeout_stop_us, details.policy.exec_stop)
    assert (None, None) == (details.unit.main_pid, details.unit.n_restarts)


def test_socket_has_what_it_listens_on() -> None:
    """The Listen property, type and address."""
    assert (ListenAddress(type="Stream", address="127.0.0.1:18083"),) == parse_listens(
        properties("socket")["Listen"]
    )


def test_scope_has_a_stop_policy() -> None:
    """It has limits and signals as a service has, but no commands."""
    policy = captured_details("scope").policy
    assert policy is not None
    assert (properties("scope")["TimeoutStopUSec"], 0, 0) == (
        policy.timeout_stop_us,
        policy.exec_stop,
        policy.exec_stop_post,
    )


def test_signal_of_a_policy_has_its_name() -> None:
    """The system manager's own init.scope asks for SIGRTMIN+14."""
    policy = parse_policy({"KillMode": "mixed", "KillSignal": 48})
    assert policy is not None
    assert "SIGRTMIN+14" == policy.kill_signal


@pytest.mark.parametrize("kind", ["target", "slice"])
def test_unit_without_processes_of_its_own(kind: str) -> None:
    """A target kills nothing; whether a slice has a KillMode is systemd's to say."""
    details = captured_details(kind)
    assert ("KillMode" in properties(kind)) == (details.policy is not None)
    assert details.unit.main_pid is None


def test_target_has_no_policy() -> None:
    """Nor a result, nor a cgroup."""
    details = captured_details("target")
    assert (None, None, None) == (details.policy, details.unit.result, details.unit.control_group)


def test_stop_takes_along_who_requires_it() -> None:
    """RequiredBy, BoundBy and ConsistsOf, each unit once."""
    found = parse_details(
        captured_details("service").unit,
        {"RequiredBy": ["a.service"], "BoundBy": ["b.service", "a.service"], "ConsistsOf": ["c"]},
    )
    assert ("a.service", "b.service", "c") == found.stops_along


def test_details_without_properties_keep_the_row() -> None:
    """A unit that went meanwhile answers with little: what the row said stays."""
    row = captured_details("service").unit
    found = parse_details(row, {}).unit
    assert (row.name, row.active_state, row.load_state) == (
        found.name,
        found.active_state,
        found.load_state,
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "infinity"), (UINT64_MAX, "infinity"), (1, 1), (90, 90)]
)
def test_no_limit_is_a_word(value: int, expected: object) -> None:
    """0 and 2^64-1 both mean infinity."""
    assert expected == parse_limit(value)


def test_abort_limit_falls_back_to_the_stop_limit() -> None:
    """TimeoutAbortSec= unset means TimeoutStopSec= (before systemd 243 there is none)."""
    policy = parse_policy({"KillMode": "mixed", "TimeoutStopUSec": 5})
    assert policy is not None
    assert (5, 5) == (policy.timeout_stop_us, policy.timeout_abort_us)


def test_old_manager_has_the_defaults_of_what_it_lacks() -> None:
    """A property that an old systemd does not have means its built-in behaviour."""
    policy = parse_policy({"KillMode": "process", "KillSignal": 3})
    assert policy is not None
    assert ("SIGQUIT", "SIGQUIT", "SIGKILL", "terminate", "infinity") == (
        policy.kill_signal,
        policy.restart_kill_signal,
        policy.final_kill_signal,
        policy.timeout_stop_failure_mode,
        policy.timeout_stop_us,
    )


def test_unknown_words_of_tomorrow_survive() -> None:
    """What systemd reports is open: a new state or mode is kept as it came."""
    row = captured_details("service").unit
    found = parse_details(row, {"ActiveState": "pondering", "Result": "new", "KillMode": "gently"})
    assert found.policy is not None
    assert ("pondering", "new", "gently") == (
        found.unit.active_state,
        found.unit.result,
        found.policy.kill_mode,
    )


# Signals -------------------------------------------------------------------------------------


def signals() -> list[BusSignal]:
    """What the bus sent while the service was stopped."""
    return [
        BusSignal(path=path, interface=_interface(member), member=member, body=tuple(body))
        for path, _, member, body in captured_json("systemd-252/signals.json")
    ]


def _interface(member: str) -> str:
    return PROPERTIES if member == "PropertiesChanged" else MANAGER


def test_stop_is_told_by_its_signals() -> None:
    """The phases with the manager's own times, in the order they were sent."""
    path = unit_path(SERVICE)
    changes = [found for found in map(parse_signal, signals()) if isinstance(found, UnitChange)]
    own = [change for change in changes if change.unit_path == path and change.sub_state]
    phases = dict.fromkeys((change.active_state, change.sub_state) for change in own)
    assert [
        ("active", "running"),
        ("deactivating", "stop"),
        ("deactivating", "stop-sigterm"),
        ("deactivating", "stop-post"),
        ("inactive", "dead"),
    ] == list(phases)
    times = [change.changed_us for change in own if change.changed_us is not None]
    assert times == sorted(times)


def test_job_is_told_by_its_signals() -> None:
    """JobNew has no result, JobRemoved has one, and both have the same path."""
    jobs = [found for found in map(parse_signal, signals()) if isinstance(found, JobChange)]
    assert [None, "done"] == [job.result for job in jobs]
    assert ({SERVICE}, 1) == ({job.unit for job in jobs}, len({job.job for job in jobs}))


def test_service_part_of_a_change_has_the_pids() -> None:
    """It comes just before the part with the state, and has none itself."""
    changes = [found for found in map(parse_signal, signals()) if isinstance(found, UnitChange)]
    parts = [change for change in changes if change.control_pid is not None]
    assert all(part.sub_state is None for part in parts)
    assert any(part.control_pid for part in parts)
    assert {"success"} == {part.result for part in parts}


def test_exit_of_main_is_told_once_it_is_over() -> None:
    """From the part of the change in which the main process had ended by itself."""
    changes = [found for found in map(parse_signal, signals()) if isinstance(found, UnitChange)]
    ends = {change.main_exit for change in changes} - {None}
    assert [(properties("service")["MainPID"], ExitCode(code=0))] == [
        (end.pid, end.exit) for end in ends if end is not None
    ]


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (os.CLD_EXITED, 3, ExitCode(code=3)),
        (os.CLD_KILLED, 9, ExitSignal(signal="SIGKILL", core=False)),
        (os.CLD_DUMPED, 6, ExitSignal(signal="SIGABRT", core=True)),
    ],
)
def test_exit_of_main_is_read_as_waitid_tells_it(
    code: int, status: int, expected: ExitStatus
) -> None:
    """ExecMainCode is si_code of waitid(2), ExecMainStatus its si_status."""
    found = parse_main_exit(
        {
            "ExecMainPID": 10,
            "ExecMainCode": code,
            "ExecMainStatus": status,
            "ExecMainExitTimestampMonotonic": 5,
        }
    )
    assert MainExit(pid=10, at_us=5, exit=expected) == found


def test_running_main_has_no_exit() -> None:
    """Its exit timestamp is 0; a unit of another type has none."""
    assert parse_main_exit({"ExecMainPID": 10, "ExecMainExitTimestampMonotonic": 0}) is None
    assert parse_main_exit(properties("socket")) is None


@pytest.mark.parametrize(
    ("member", "body", "expected"),
    [
        ("Reloading", (True,), ManagerReloading(active=True)),
        ("StartupFinished", (1, 2, 3, 4, 5, 6), None),
        ("MemberOfTomorrow", (), None),
    ],
)
def test_signal_of_the_manager_is_read(
    member: str, body: tuple[object, ...], expected: object
) -> None:
    """What is not asked for is passed over."""
    signal = BusSignal(path="/", interface=MANAGER, member=member, body=body)
    assert expected == parse_signal(signal)


def test_signal_of_another_interface_is_passed_over() -> None:
    """The bus itself speaks too."""
    other = BusSignal(path="/", interface="org.freedesktop.DBus", member="NameLost", body=("x",))
    assert parse_signal(other) is None


@given(st.dictionaries(st.sampled_from(["KillMode", "Result", "Id", "FragmentPath"]), st.text()))
def test_any_text_of_the_manager_is_taken(values: dict[str, str]) -> None:
    """Words are never checked against a list."""
    parse_details(captured_details("service").unit, values)
