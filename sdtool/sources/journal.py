"""What the journal says of a unit that stopped, in the words of the manager that stopped it.

The truth is what ``journalctl --output=json`` prints in one go; nothing is followed. Who wrote
a record is told by the fields that journald itself adds (they begin with an underscore): any
application may log whatever it likes in a field UNIT=, and is not believed.

That there is no record proves nothing: LogLevelMax= of the unit and LogLevel= of the manager
silence it, the manager says nothing of a process whose name begins with a parenthesis, and a
user's manager nothing of a success. A ``RecordKind.STOPPED`` proves that nothing which was
written before it is still on its way.

Source: systemd.journal-fields(7), journalctl(1), https://systemd.io/JOURNAL_EXPORT_FORMATS/,
sd-messages.h; the texts without a MESSAGE_ID are in service.c, scope.c, socket.c, mount.c,
swap.c and unit.c (log_kill, unit_log_leftover_process_stop), the same in 252 and 257.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from sdtool.errors import Unavailable
from sdtool.model.journal import JournalRecord, RecordKind
from sdtool.model.process import signal_name
from sdtool.model.scope import Scope
from sdtool.model.stop import ExitCode, ExitSignal, ExitStatus

RUNTIME = "/run/log/journal"
PERSISTENT = "/var/log/journal"

READ_HINT = "needs root or the group systemd-journal"

END_S = 1.0

PAUSE_S = 0.02
"""Before what was not there yet is looked for again."""

MAX_LAG_US = 1_000_000
"""A record that came later than this was not late: the machine's clock was set meanwhile."""

Entry = Mapping[str, Any]

# What is shown beside the matches; the timestamps that begin with two underscores always are.
_FIELDS = (
    "MESSAGE",
    "MESSAGE_ID",
    "UNIT_RESULT",
    "JOB_RESULT",
    "COMMAND",
    "EXIT_CODE",
    "EXIT_STATUS",
    "_SOURCE_REALTIME_TIMESTAMP",
)

_KINDS = {
    "de5b426a63be47a7b6ac3eaac82e2f6f": RecordKind.STOPPING,
    "9d1aaa27d60140bd96365438aad20286": RecordKind.STOPPED,
    "7ad2d189f7e94e70a38c781354912448": RecordKind.SUCCEEDED,
    "d9b373ed55a64feb8242e02dbe79a49c": RecordKind.FAILED,
    "98e322203f7a4ed290d09fe03c09fe15": RecordKind.PROCESS_EXIT,
}

# A name may hold anything, so it ends at the last parenthesis.
_KILLING = re.compile(
    r"Killing process (?P<pid>[0-9]{1,10}) \((?P<comm>.*)\) with signal (?P<signal>SIG[^ ]+)\.",
    re.DOTALL,
)
_LEFTOVER = re.compile(
    r"Unit process (?P<pid>[0-9]{1,10}) \((?P<comm>.*)\) remains running after unit stopped\.",
    re.DOTALL,
)
_TIMEOUT = re.compile(
    r"(?:State '(?P<state>[a-z-]+)'"
    r"|(?P<what>Stopping|Unmounting|Mount process|Deactivation|Swap process))"
    r" timed out(?P<again> \(2\))?"
    r"\. (?P<action>Terminating|Aborting|Killing|Stopping|Skipping SIGKILL)\b.*"
)
_AROUND = re.compile(
    r"(?:(?:Processes|Mount process|Swap process) still|Still) around after"
    r" (?P<final>final )?SIGKILL(?P<again> \(2\))?"
    r"\. (?P<action>Ignoring|Entering failed mode)\."
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{3})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPES = dict(zip(b"abfnrtv", b"\a\b\f\n\r\t\v", strict=True))

_NO_NAME = "n/a"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalQuery:
    """Which records are asked for.

    Attributes:
        unit: The id of the unit; its records are under no alias.
        since_us: The earliest moment, by CLOCK_MONOTONIC.
        boot_id: Of this boot, 32 hexadecimal digits.
        uid: Whose manager it is, with ``Scope.USER``.
        invocation_id: Of the run that is stopped, 32 hexadecimal digits; None for any.
        manager_pid: The process of the user's manager, as journald sees it. None when it is not
            known: then every process in the manager's own cgroup is believed, and any process
            of that user can move there.
    """

    unit: str
    scope: Scope
    since_us: int
    boot_id: str
    uid: int = 0
    invocation_id: str | None = None
    manager_pid: int | None = None

    @property
    def matches(self) -> dict[str, str]:
        """Field -> the value that it must have, and no other beside it."""
        prefix = "" if self.scope is Scope.SYSTEM else "USER_"
        wanted = {"_BOOT_ID": self.boot_id, f"{prefix}UNIT": self.unit, **self._writer}
        if self.invocation_id is not None:
            wanted[f"{prefix}INVOCATION_ID"] = self.invocation_id
        return wanted

    @property
    def _writer(self) -> dict[str, str]:
        if self.scope is Scope.SYSTEM:
            return {"_PID": "1"}
        if self.manager_pid is None:
            return {"_UID": str(self.uid), "_SYSTEMD_USER_UNIT": "init.scope"}
        return {"_UID": str(self.uid), "_PID": str(self.manager_pid)}

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that prints them, and with systemd 252 perhaps older ones before them."""
        matches = self.matches
        return (
            *("journalctl", "--quiet", "--no-pager", "--output=json"),
            f"--output-fields={','.join((*_FIELDS, *matches))}",
            f"--cursor=b={self.boot_id};m={self.since_us:x}",
            *(f"{name}={value}" for name, value in matches.items()),
        )


# Asking --------------------------------------------------------------------------------------


async def read_stop_records(
    unit: str,
    scope: Scope,
    *,
    since_us: int,
    deadline_s: float,
    patience_s: float = 0.0,
    invocation_id: str | None = None,
    manager_pid: int | None = None,
) -> tuple[JournalRecord, ...]:
    """Read what the manager wrote about a unit since a moment, in the order it wrote it.

    What journald has taken in is seen at once, in some 5 ms, whatever else the journal holds.
    The last record of a stop is in before D-Bus tells of its end, but up to 0.1 s later while
    others flood journald.

    Args:
        unit: Its id.
        scope: The system's manager, or that of the user who asks.
        since_us: The earliest moment, by CLOCK_MONOTONIC.
        deadline_s: Seconds that journalctl may take each time.
        patience_s: Seconds to read again and again while there is no ``RecordKind.STOPPED``.
        invocation_id: Of the run that is stopped; None for any.
        manager_pid: Of a user's manager; None when that is not known.

    Raises:
        Unavailable: There is no journal or no journalctl, the journal may not be read, or
            journalctl failed or did not answer in time.
    """
    uid = os.geteuid()
    require_journal(scope, uid)
    query = JournalQuery(
        unit=unit,
        scope=scope,
        since_us=since_us,
        boot_id=_read_id("/proc/sys/kernel/random/boot_id"),
        uid=uid,
        invocation_id=invocation_id,
        manager_pid=manager_pid,
    )
    patient_until = time.monotonic() + patience_s
    while True:
        records = tuple(parse_entries(await _run(query.argv, deadline_s), query))
        complete = any(record.kind is RecordKind.STOPPED for record in records)
        if complete or time.monotonic() >= patient_until:
            return records
        await asyncio.sleep(PAUSE_S)


def require_journal(scope: Scope, uid: int) -> str:
    """The directory where what the manager writes now is in a file that may be read.

    journalctl itself is content with whatever files may be read, and says nothing of the rest.

    Raises:
        Unavailable: It is not.
    """
    machine = _read_id("/etc/machine-id")
    runtime, persistent = f"{RUNTIME}/{machine}", f"{PERSISTENT}/{machine}"
    # journald writes to the runtime directory as long as that has files, a user's records too.
    if _has_journal(runtime):
        place, names = runtime, ["system.journal"]
    else:
        place, names = persistent, ["system.journal"]
        if scope is Scope.USER:
            names.append(f"user-{uid}.journal")
    if not machine or not os.path.isdir(place):
        raise Unavailable(
            f"There is no journal of this machine in {RUNTIME} or {PERSISTENT}.",
            hint="Storage= in journald.conf(5)",
        )
    if not any(os.access(f"{place}/{name}", os.R_OK) for name in names):
        raise Unavailable(f"The journal at {place} may not be read.", hint=READ_HINT)
    return place


def _has_journal(place: str) -> bool:
    """Whether there are files in a directory; one that may not be looked into has some."""
    if not os.access(place, os.X_OK):
        return os.path.isdir(place)
    return os.path.exists(f"{place}/system.journal")


def _read_id(path: str) -> str:
    """An id in systemd's spelling, without dashes; "" where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip().replace("-", "")
    except (OSError, ValueError):
        return ""


async def _run(argv: tuple[str, ...], deadline_s: float) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise Unavailable(f"journalctl cannot be run: {error.strerror}.") from error
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"journalctl did not answer within {deadline_s:g} s.") from None
    finally:
        await _end(process)
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip().rpartition("\n")[2].rstrip(".")
        raise Unavailable(f"journalctl failed: {said or f'status {process.returncode}'}.")
    return output


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            await process.communicate()


# Parsing -------------------------------------------------------------------------------------


def parse_entries(data: bytes, query: JournalQuery) -> Iterator[JournalRecord]:
    """What journalctl printed as JSON, an entry a line; what does not match is left out.

    A line that is not whole or not JSON is left out too.
    """
    matches = query.matches
    for line in data.split(b"\n"):
        entry = _parse_line(line)
        if entry is None or not _matches(entry, matches):
            continue
        at_us = _parse_at(entry)
        if at_us is not None and at_us >= query.since_us:
            yield parse_record(entry, at_us, query.unit)


def _parse_line(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _matches(entry: Entry, matches: Mapping[str, str]) -> bool:
    # LogExtraFields= of any unit adds a second value to what the manager says of that unit.
    return all(_parse_only(entry, name) == value for name, value in matches.items())


def _parse_at(entry: Entry) -> int | None:
    """When it was sent, by CLOCK_MONOTONIC; None for an entry without a time.

    __MONOTONIC_TIMESTAMP is when journald took it in. How long it lay in the socket is known by
    the other clock: the kernel's stamp _SOURCE_REALTIME_TIMESTAMP. No record of a service
    manager has a _SOURCE_MONOTONIC_TIMESTAMP.
    """
    taken_us = _parse_number(entry, "__MONOTONIC_TIMESTAMP")
    real_us = _parse_number(entry, "__REALTIME_TIMESTAMP")
    sent_us = _parse_number(entry, "_SOURCE_REALTIME_TIMESTAMP")
    if taken_us is None or real_us is None or sent_us is None:
        return taken_us
    lag_us = real_us - sent_us
    return taken_us - lag_us if 0 < lag_us < MAX_LAG_US else taken_us


def parse_record(entry: Entry, at_us: int, unit: str) -> JournalRecord:
    """What an entry of the manager says; the fields of ``--output=json``."""
    message_id = _parse_only(entry, "MESSAGE_ID")
    return JournalRecord(
        at_us=at_us,
        message="\n".join(filter(None, _parse_values(entry.get("MESSAGE")))),
        message_id=message_id,
        **_parse_meaning(entry, message_id, unit),
    )


def _parse_meaning(entry: Entry, message_id: str | None, unit: str) -> dict[str, Any]:
    # The text comes first: LogExtraFields= can give any record a MESSAGE_ID, but no other text.
    if meaning := parse_text(_parse_only(entry, "MESSAGE") or "", unit):
        return meaning
    kind = _KINDS.get(message_id or "")
    match kind:
        case None:
            return {}
        case RecordKind.STOPPED:
            return {"kind": kind, "job_result": _parse_only(entry, "JOB_RESULT")}
        case RecordKind.FAILED:
            return {"kind": kind, "result": _parse_only(entry, "UNIT_RESULT")}
        case RecordKind.PROCESS_EXIT:
            command, ended = _parse_only(entry, "COMMAND"), _parse_exit(entry)
            return {"kind": kind, "command": command, "exit": ended}
    return {"kind": kind}


def _parse_exit(entry: Entry) -> ExitStatus | None:
    status = _parse_number(entry, "EXIT_STATUS")
    if status is None:
        return None
    match _parse_only(entry, "EXIT_CODE"):
        case "exited":
            return ExitCode(code=status)
        case "killed" | "dumped" as code:
            return ExitSignal(signal=signal_name(status), core=code == "dumped")
    return None


def parse_text(message: str, unit: str) -> dict[str, Any]:
    """What a text that has no MESSAGE_ID says, as fields of a record; empty for any other."""
    prefix = f"{unit}: "
    if not message.startswith(prefix):
        return {}
    text = message.removeprefix(prefix)
    if found := _KILLING.fullmatch(text):
        return {"kind": RecordKind.KILLING, "signal": found["signal"], **_parse_process(found)}
    if found := _LEFTOVER.fullmatch(text):
        return {"kind": RecordKind.LEFTOVER, **_parse_process(found)}
    kind = unit.rpartition(".")[2]
    if found := _TIMEOUT.fullmatch(text):
        state = found["state"] or _overdue_state(kind, found)
        return {"kind": RecordKind.TIMEOUT, "sub_state": state, "action": found["action"]}
    if found := _AROUND.fullmatch(text):
        state = _unkillable_state(kind, found)
        return {"kind": RecordKind.TIMEOUT, "sub_state": state, "action": found["action"]}
    return {}


def _parse_process(found: re.Match[str]) -> dict[str, Any]:
    comm = None if found["comm"] == _NO_NAME else _unescape(found["comm"])
    return {"pid": int(found["pid"]), "comm": comm}


def _unescape(comm: str) -> str:
    r"""The name that the manager wrote with the escapes of C: \n, \303."""

    def one(found: re.Match[bytes]) -> bytes:
        octal, hexadecimal, letter = found.groups()
        if letter is not None:
            return bytes([_ESCAPES.get(letter[0], letter[0])])
        return bytes([int(octal, 8) & 0xFF if octal else int(hexadecimal, 16)])

    return os.fsdecode(_ESCAPE.sub(one, os.fsencode(comm)))


def _overdue_state(kind: str, found: re.Match[str]) -> str | None:
    """The state that a text names by what was going on in it."""
    asked_first = found["action"] == "Terminating"
    match kind, found["what"]:
        case "service", "Stopping":
            return "stop"
        case "scope", "Stopping":
            return "stop-sigterm"
        case "socket", "Stopping" if found["again"]:
            return "stop-post" if asked_first else "final-sigterm"
        case "socket", "Stopping":
            return "stop-pre" if asked_first else "stop-pre-sigterm"
        case "mount", "Unmounting":
            return "unmounting"
        case "swap", "Deactivation":
            return "deactivating"
    return None


def _unkillable_state(kind: str, found: re.Match[str]) -> str | None:
    """The state that follows on SIGKILL."""
    if kind in ("service", "socket") and (found["final"] or found["again"]):
        return "final-sigkill"
    states = {"service": "stop-sigkill", "scope": "stop-sigkill", "socket": "stop-pre-sigkill"}
    return states.get(kind)


def _parse_values(value: object) -> tuple[str | None, ...]:
    """The values of a field, one or many; None for one that is too large to be shown."""
    if isinstance(value, list) and not _is_bytes(value):
        return tuple(map(_parse_value, value))
    return (_parse_value(value),)


def _parse_value(value: object) -> str | None:
    """A text, or bytes as numbers where they are no text."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return os.fsdecode(bytes(value)) if _is_bytes(value) else None


def _is_bytes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, int) and 0 <= item < 256 for item in value)
    )


def _parse_only(entry: Entry, name: str) -> str | None:
    """The value of a field; None when it has none, or several, of which any may be a lie."""
    values = _parse_values(entry.get(name))
    return values[0] if len(values) == 1 else None


def _parse_number(entry: Entry, name: str) -> int | None:
    text = _parse_only(entry, name) or ""
    return int(text) if len(text) < 20 and text.isascii() and text.isdecimal() else None
