"""What a service manager wrote into the journal about a unit that stopped.

Source of the words: systemd's sd-messages.h, service.c, scope.c, socket.c, mount.c, swap.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sdtool.model.stop import ExitStatus


class RecordKind(StrEnum):
    """What a record says."""

    STOPPING = "stopping"
    STOPPED = "stopped"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PROCESS_EXIT = "process-exit"
    KILLING = "killing"
    TIMEOUT = "timeout"
    LEFTOVER = "leftover"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRecord:
    """One record of the manager about one unit; only the fields that its kind needs are set.

    Attributes:
        at_us: When the manager wrote it, by CLOCK_MONOTONIC; when journald took it in, if that
            was a second later or more, or the journal does not say.
        message: The text; a byte that is no UTF-8 is a surrogate, as ``os.fsdecode`` has it.
        message_id: 32 hexadecimal digits; None for a record that has no such id.
        kind: None for a record that says something else.
        pid: The process that is about to get a signal, or was left over; in the pid namespace
            of the manager.
        comm: Its name up to the first newline; None when the manager could not read it.
        signal: The signal that it is about to get; it may be gone before that.
        sub_state: The state that lasted too long; None when the text does not tell it.
        action: What the manager did about that, in its own word: Terminating, Aborting,
            Killing, Stopping, Skipping SIGKILL, Ignoring or Entering failed mode.
        result: The unit's Result=, of a unit that failed.
        job_result: systemd's word for how the job ended, of a unit that stopped.
        command: The setting that named the process that ended, "ExecStart" for the main one.
        exit: How that process ended.
    """

    at_us: int
    message: str
    message_id: str | None = None
    kind: RecordKind | None = None
    pid: int | None = None
    comm: str | None = None
    signal: str | None = None
    sub_state: str | None = None
    action: str | None = None
    result: str | None = None
    job_result: str | None = None
    command: str | None = None
    exit: ExitStatus | None = None
