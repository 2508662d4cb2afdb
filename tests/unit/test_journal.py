"""What journalctl printed after real stops, with systemd 252 and 257, and what liars logged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.model.journal import JournalRecord, RecordKind
from sdtool.model.scope import Scope
from sdtool.model.stop import ExitCode, ExitSignal
from sdtool.sources.journal import JournalQuery, parse_entries, parse_text
from tests.unit.make import captured

VERSIONS = ("systemd-252", "systemd-257")

TESTER_UID = 1000

UNIT = "x.service"
BOOT_ID = "0123456789abcdef" * 2
STOPPED_ID = "9d1aaa27d60140bd96365438aad20286"

STARTED: list[dict[str, Any]] = [{}, {}]
STOPPING = {"kind": "stopping"}
STOPPED = {"kind": "stopped", "job_result": "done"}
SUCCEEDED = {"kind": "succeeded"}
TIMED_OUT = {"kind": "failed", "result": "timeout"}
EXIT_KILLED = {
    "kind": "process-exit",
    "command": "ExecStart",
    "exit": ExitSignal(signal="SIGKILL", core=False),
}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Each systemd whose records there are."""
    name: str = request.param
    return name


def recorded(version: str, name: str) -> bytes:
    """What journalctl printed of one unit."""
    return captured(f"{version}/journal-{name}.json")


def query(data: bytes, unit: str, scope: Scope = Scope.SYSTEM, **options: Any) -> JournalQuery:
    """Ask for all of a unit in the boot that the records are from."""
    boot_id = json.loads(data.split(b"\n")[0])["_BOOT_ID"]
    options.setdefault("since_us", 0)
    return JournalQuery(unit=unit, scope=scope, boot_id=boot_id, uid=TESTER_UID, **options)


def read(version: str, name: str, unit: str, **options: Any) -> list[JournalRecord]:
    """The records of one unit."""
    data = recorded(version, name)
    return list(parse_entries(data, query(data, unit, **options)))


def meaning(record: JournalRecord) -> dict[str, Any]:
    """What a record says, without its time, its text and pids."""
    names = ("kind", "comm", "signal", "sub_state", "action", "result", "job_result")
    found = {name: getattr(record, name) for name in (*names, "command", "exit")}
    return {name: value for name, value in found.items() if value is not None}


def killing(comm: str, signal: str = "SIGKILL") -> dict[str, Any]:
    """The meaning of a record of a signal."""
    return {"kind": "killing", "comm": comm, "signal": signal}


def timeout(sub_state: str, action: str) -> dict[str, Any]:
    """The meaning of a record of a timeout."""
    return {"kind": "timeout", "sub_state": sub_state, "action": action}


STOPS = {
    "ignores-term": [
        timeout("stop-sigterm", "Killing"),
        killing("stubborn"),
        EXIT_KILLED,
        TIMED_OUT,
    ],
    "forks": [timeout("final-sigterm", "Killing"), killing("child-stubborn"), TIMED_OUT],
    "forks-mixed": [
        killing("child-stubborn"),
        killing("child-handler"),
        killing("child-default"),
        SUCCEEDED,
    ],
    "leaves-child": [SUCCEEDED, {"kind": "leftover", "comm": "left-behind"}],
    "exec-stop-hangs": [
        timeout("stop", "Terminating"),
        {
            "kind": "process-exit",
            "command": "ExecStop",
            "exit": ExitSignal(signal="SIGTERM", core=False),
        },
        TIMED_OUT,
    ],
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_is_told_in_order(version: str, name: str) -> None:
    """Every record of a start and a stop, and what it says."""
    records = read(version, name, f"sdtool-{name}.service")
    expected = [*STARTED, STOPPING, *STOPS[name], STOPPED]
    assert expected == [meaning(record) for record in records]
    assert sorted(records, key=lambda record: record.at_us) == records


def test_abort_is_told_with_its_signals(version: str) -> None:
    """TimeoutStopFailureMode=abort of a process that ignores SIGABRT too."""
    expected = [
        *STARTED,
        STOPPING,
        timeout("stop-sigterm", "Aborting"),
        killing("python3", "SIGABRT"),
        timeout("stop-watchdog", "Killing"),
        killing("python3"),
        EXIT_KILLED,
        TIMED_OUT,
        STOPPED,
    ]
    assert expected == list(map(meaning, read(version, "abort", "abort.service")))


def test_manager_that_may_not_kill_tells_what_it_left(version: str) -> None:
    """SendSIGKILL=no: the limit passes twice, and the process stays."""
    expected = [
        *STARTED,
        STOPPING,
        timeout("stop-sigterm", "Skipping SIGKILL"),
        timeout("final-sigterm", "Skipping SIGKILL"),
        TIMED_OUT,
        {"kind": "leftover", "comm": "python3"},
        STOPPED,
    ]
    assert expected == list(map(meaning, read(version, "no-sigkill", "no-sigkill.service")))


def test_odd_names_are_as_proc_has_them(version: str) -> None:
    """The manager's escapes are undone; a name with "(" in front it does not tell at all."""
    records = read(version, "names", "names.service")
    kills = [record.comm for record in records if record.kind is RecordKind.KILLING]
    odd = ["x) with (si", ") S 1 (\udcff", "ééé", "a\x02b\tc\\d\\n", "e%s: $HOME"]
    assert ["python3", *odd] == kills


def test_record_of_a_users_manager_is_under_the_users_fields(version: str) -> None:
    """It is asked for by uid, and by the manager's cgroup where its pid is not known."""
    unit = "sdtool-forks.service"
    records = read(version, "user", unit, scope=Scope.USER)
    assert [*STARTED, STOPPING, *STOPS["forks"], STOPPED] == list(map(meaning, records))
    assert [] == read(version, "user", unit)


def test_moment_is_when_it_was_sent(version: str) -> None:
    """Not after journald took it in, and as long before as the other clock says."""
    data = recorded(version, "ignores-term")
    entries = [json.loads(line) for line in data.splitlines()]
    names = ("__MONOTONIC_TIMESTAMP", "__REALTIME_TIMESTAMP", "_SOURCE_REALTIME_TIMESTAMP")
    times = [[int(entry[name]) for name in names] for entry in entries]
    expected = [taken - (real - sent) for taken, real, sent in times]
    records = read(version, "ignores-term", "sdtool-ignores-term.service")
    assert expected == [record.at_us for record in records]


def test_records_before_the_moment_are_left_out(version: str) -> None:
    """From the first that is asked for to the last."""
    unit = "sdtool-forks.service"
    records = read(version, "forks", unit)
    since_us = records[3].at_us
    assert records[3:] == read(version, "forks", unit, since_us=since_us)


def test_other_invocation_is_left_out(version: str) -> None:
    """A run of the unit that is not the one that was stopped."""
    options: dict[str, Any] = {"unit": UNIT, "since_us": 0, "boot_id": BOOT_ID}
    options["invocation_id"] = "1" * 32
    system = JournalQuery(scope=Scope.SYSTEM, **options)
    user = JournalQuery(scope=Scope.USER, uid=TESTER_UID, **options)
    assert "INVOCATION_ID=" + "1" * 32 == system.argv[-1]
    assert "USER_INVOCATION_ID=" + "1" * 32 == user.argv[-1]
    assert [] == read(version, "forks", "sdtool-forks.service", invocation_id="1" * 32)


def test_known_pid_of_a_users_manager_is_asked_for() -> None:
    """Any process of the user can move into the manager's cgroup, none can take its pid."""
    options: dict[str, Any] = {"unit": UNIT, "since_us": 0, "boot_id": BOOT_ID, "uid": 7}
    common = {"_BOOT_ID": BOOT_ID, "USER_UNIT": UNIT, "_UID": "7"}
    unknown = JournalQuery(scope=Scope.USER, **options)
    known = JournalQuery(scope=Scope.USER, manager_pid=64, **options)
    assert {**common, "_SYSTEMD_USER_UNIT": "init.scope"} == unknown.matches
    assert {**common, "_PID": "64"} == known.matches


# Lies ----------------------------------------------------------------------------------------


def test_forged_records_are_not_believed(version: str) -> None:
    """What root and an ordinary user logged as the manager's, over the native protocol."""
    data = recorded(version, "forged")
    lies = [entry for entry in map(json.loads, data.splitlines()) if entry["_PID"] != "1"]
    records = read(version, "forged", "sdtool-graceful.service")
    assert {"0", "1000"} == {lie["_UID"] for lie in lies}
    assert 6 == len(lies)
    assert [*STARTED, STOPPING, SUCCEEDED, STOPPED] == list(map(meaning, records))


def test_extra_fields_of_the_unit_itself_change_no_kill() -> None:
    """LogExtraFields= with a MESSAGE_ID and a JOB_RESULT, which 257 adds to all it says."""
    records = read("systemd-257", "extra", "extra.service")
    expected = [timeout("stop-sigterm", "Killing"), killing("python3"), {}, {}]
    assert [{}, {}, *expected, {"kind": "stopped"}] == list(map(meaning, records))


def test_extra_unit_of_another_unit_is_not_believed() -> None:
    """LogExtraFields=UNIT=victim.service: it is not told whose record that is."""
    assert [] == read("systemd-257", "victim", "victim.service")
    assert b'"victim.service"' in recorded("systemd-257", "victim")


# Shapes --------------------------------------------------------------------------------------


def entry(**fields: Any) -> bytes:
    """A line of journalctl: a record of PID 1 about the unit, with other fields."""
    plain = {"_BOOT_ID": BOOT_ID, "_PID": "1", "UNIT": UNIT, "__MONOTONIC_TIMESTAMP": "7000000"}
    return json.dumps({**plain, **fields}).encode()


def parse(data: bytes) -> list[JournalRecord]:
    """The records of the unit."""
    asked = JournalQuery(unit=UNIT, scope=Scope.SYSTEM, since_us=0, boot_id=BOOT_ID)
    return list(parse_entries(data, asked))


def texts(**fields: Any) -> list[str]:
    """The text of each record that a line gives."""
    return [record.message for record in parse(entry(**fields))]


def test_field_may_have_any_shape() -> None:
    """A text, bytes as numbers, several of these, or null for one that is too large."""
    assert ["said"] == texts(MESSAGE="said")
    assert ["a\udcff\nb"] == texts(MESSAGE=[97, 255, 10, 98])
    assert ["one\nt\udc80wo"] == texts(MESSAGE=["one", None, [116, 128, 119, 111]])
    assert [""] == texts(MESSAGE=None) == texts(MESSAGE=[]) == texts()
    assert [""] == texts(MESSAGE=[300, -1]) == texts(MESSAGE={"a": 1}) == texts(MESSAGE=[[[]]])
    assert ["x" * 1_000_000] == texts(MESSAGE="x" * 1_000_000)


@pytest.mark.parametrize("also", [None, "other", [255]])
def test_repeated_field_decides_nothing(also: object) -> None:
    """Which of its values is the manager's cannot be told."""
    killed = f"{UNIT}: Killing process 5 (a) with signal SIGKILL."
    (record,) = parse(entry(MESSAGE=[killed, also]))
    assert (None, True) == (record.kind, record.message.startswith(killed))
    assert [] == parse(entry(UNIT=[UNIT, also]))
    assert [] == parse(entry(_PID=["1", also]))
    (record,) = parse(entry(MESSAGE="Stopped.", MESSAGE_ID=[STOPPED_ID, also]))
    assert (None, None) == (record.kind, record.message_id)


def test_line_that_is_cut_off_is_left_out() -> None:
    """And lines that are no JSON object, wherever they stand."""
    whole = entry(MESSAGE="whole")
    junk = b'\n[]\n7\n"x"\nnull\n\xff\xfe\n{"a":' + b"[" * 100_000 + b"\n" + b"9" * 9999 + b"\n"
    records = parse(whole + junk + whole + b"\n" + whole[:-5])
    assert ["whole", "whole"] == [record.message for record in records]


def test_clock_that_was_set_moves_no_record() -> None:
    """A lag that is negative or a second and more is none."""
    real_us = 1_700_000_000_000_000
    expected = {250: 6_999_750, 0: 7_000_000, -5: 7_000_000, 1_000_000: 7_000_000}
    for lag_us, at_us in expected.items():
        times = {"__REALTIME_TIMESTAMP": str(real_us)}
        times["_SOURCE_REALTIME_TIMESTAMP"] = str(real_us - lag_us)
        assert [at_us] == [record.at_us for record in parse(entry(**times))]


def test_record_without_a_time_is_left_out() -> None:
    """There is none such in a journal."""
    for time in (None, "", "-1", "٣", "9" * 5000, 5):
        assert [] == parse(entry(__MONOTONIC_TIMESTAMP=time))


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("exited", "3", ExitCode(code=3)),
        ("killed", "9", ExitSignal(signal="SIGKILL", core=False)),
        ("dumped", "6", ExitSignal(signal="SIGABRT", core=True)),
        ("killed", "99999", ExitSignal(signal="99999", core=False)),
        ("vanished", "1", None),
        ("exited", "KILL", None),
        ("exited", None, None),
    ],
)
def test_exit_is_by_its_code(
    code: str, status: str | None, expected: ExitCode | ExitSignal | None
) -> None:
    """As waitid(2) has it; what is not understood is not known."""
    mid = "98e322203f7a4ed290d09fe03c09fe15"
    (record,) = parse(entry(MESSAGE_ID=mid, EXIT_CODE=code, EXIT_STATUS=status))
    assert (RecordKind.PROCESS_EXIT, expected) == (record.kind, record.exit)


# Texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "text", "sub_state", "action"),
    [
        ("a.service", "State 'stop-post' timed out. Terminating.", "stop-post", "Terminating"),
        (
            "a.service",
            "State 'final-watchdog' timed out. Skipping SIGKILL. Entering failed mode.",
            "final-watchdog",
            "Skipping SIGKILL",
        ),
        ("a.service", "Stopping timed out. Aborting.", "stop", "Aborting"),
        ("a.service", "Stopping timed out. Skipping SIGKILL.", "stop", "Skipping SIGKILL"),
        (
            "a.service",
            "Processes still around after SIGKILL. Ignoring.",
            "stop-sigkill",
            "Ignoring",
        ),
        (
            "a.service",
            "Processes still around after final SIGKILL. Entering failed mode.",
            "final-sigkill",
            "Entering failed mode",
        ),
        ("a.scope", "Stopping timed out. Killing.", "stop-sigterm", "Killing"),
        ("a.scope", "Still around after SIGKILL. Ignoring.", "stop-sigkill", "Ignoring"),
        ("a.socket", "Stopping timed out. Terminating.", "stop-pre", "Terminating"),
        (
            "a.socket",
            "Stopping timed out. Skipping SIGKILL. Ignoring.",
            "stop-pre-sigterm",
            "Skipping SIGKILL",
        ),
        ("a.socket", "Stopping timed out (2). Terminating.", "stop-post", "Terminating"),
        ("a.socket", "Stopping timed out (2). Killing.", "final-sigterm", "Killing"),
        (
            "a.socket",
            "Still around after SIGKILL (2). Entering failed mode.",
            "final-sigkill",
            "Entering failed mode",
        ),
        ("a.mount", "Unmounting timed out. Terminating.", "unmounting", "Terminating"),
        ("a.mount", "Mount process timed out. Killing.", None, "Killing"),
        ("a.mount", "Mount process still around after SIGKILL. Ignoring.", None, "Ignoring"),
        ("a.swap", "Deactivation timed out. Stopping.", "deactivating", "Stopping"),
    ],
)
def test_timeout_names_the_state(unit: str, text: str, sub_state: str | None, action: str) -> None:
    """Every text of a timeout in a stop that 252 and 257 have, by the type of the unit."""
    expected = {"kind": RecordKind.TIMEOUT, "sub_state": sub_state, "action": action}
    assert expected == parse_text(f"{unit}: {text}", unit)


@pytest.mark.parametrize(
    "text",
    [
        "Killing process 5 (a) with signal SIGKILL.",
        "y.service: Killing process 5 (a) with signal SIGKILL.",
        "xx.service: Killing process 5 (a) with signal SIGKILL.",
        "Stopping x.service - x.service: Killing process 5 (a) with signal SIGKILL....",
        "x.service: x.service: Killing process 5 (a) with signal SIGKILL.",
        "x.service: Killing process 5 (a) with signal SIGKILL. And more.",
        "x.service: Killing process five (a) with signal SIGKILL.",
        "x.service: Killing process 99999999999 (a) with signal SIGKILL.",
        "x.service: Killing process 5 a with signal SIGKILL.",
        "x.service: Starting timed out. Terminating.",
        "x.service: Consumed 17ms CPU time.",
        "x.service: ",
        "",
    ],
)
def test_other_text_has_no_meaning(text: str) -> None:
    """Without the unit's name in front, with more behind, or of another matter."""
    assert {} == parse_text(text, UNIT)


@given(st.text(alphabet=st.characters(exclude_characters="\\", codec="utf-8"), max_size=20))
def test_name_may_hold_anything(comm: str) -> None:
    """Parentheses, newlines and what looks like the end of the text; "n/a" is no name."""
    comm = comm.replace("n/a", "") + ")"
    killed = parse_text(f"{UNIT}: Killing process 5 ({comm}) with signal SIGRTMIN+3.", UNIT)
    left = parse_text(f"{UNIT}: Unit process 5 ({comm}) remains running after unit stopped.", UNIT)
    expected = (5, comm)
    assert (*expected, "SIGRTMIN+3") == (killed["pid"], killed["comm"], killed["signal"])
    assert expected == (left["pid"], left["comm"])


def test_name_that_the_manager_could_not_read_is_not_known() -> None:
    """It writes n/a."""
    found = parse_text(f"{UNIT}: Killing process 5 (n/a) with signal SIGKILL.", UNIT)
    assert None is found["comm"]


# Anything ------------------------------------------------------------------------------------

_WORDS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
_LISTS = st.lists(_WORDS, max_size=3)
_VALUES = _WORDS | _LISTS | st.lists(_LISTS, max_size=2) | st.dictionaries(st.text(), _WORDS)

_NAMES = st.sampled_from(
    (
        *("MESSAGE", "MESSAGE_ID", "UNIT_RESULT", "JOB_RESULT", "COMMAND", "EXIT_CODE"),
        *("EXIT_STATUS", "_PID", "UNIT", "_BOOT_ID", "__MONOTONIC_TIMESTAMP"),
        *("__REALTIME_TIMESTAMP", "_SOURCE_REALTIME_TIMESTAMP"),
    )
)


@given(st.binary())
def test_any_bytes_are_parsed(data: bytes) -> None:
    """Whatever came instead of JSON, no record is made of it."""
    assert [] == parse(data)


@given(st.dictionaries(_NAMES, _VALUES, max_size=5))
def test_any_values_are_parsed(fields: dict[str, Any]) -> None:
    """Whatever a field holds, a record is all that it becomes."""
    assert len(parse(entry(**fields))) <= 1


@given(st.binary(max_size=60), st.sampled_from(("Killing process 1 (", "State '", "")))
def test_any_text_is_parsed(data: bytes, begin: str) -> None:
    """With the bytes of a text as numbers."""
    text = [*f"{UNIT}: {begin}".encode(), *data, *b") with signal SIGKILL."]
    (record,) = parse(entry(MESSAGE=text))
    assert isinstance(record.message.encode(errors="surrogateescape"), bytes)


@given(st.integers(min_value=0, max_value=4500), st.sampled_from(VERSIONS))
def test_any_piece_of_the_truth_is_parsed(size: int, version: str) -> None:
    """The end of what journalctl printed may be missing."""
    data = recorded(version, "forks-mixed")
    asked = query(data, "sdtool-forks-mixed.service")
    whole = list(parse_entries(data, asked))
    records = list(parse_entries(data[:size], asked))
    assert whole[: len(records)] == records
