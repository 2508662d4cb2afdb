"""Processes, from /proc: identity, tree, signal masks, namespaces.

The user, the command line, CPU time and memory are psutil's job; identity is ours, because a
process is (pid, start time in ticks) and psutil rounds that to a float. A process that vanishes
while it is read is simply not there: None, never an error.

Source: proc(5), Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

from sdtool.errors import Unavailable
from sdtool.model.process import ProcessFacts, ProcessId, ProcessRef, SignalMasks
from sdtool.sources.cgroups import read_process_cgroup

# rt_sigtimedwait in asm/unistd_64.h and its kin.
SIGTIMEDWAIT = {
    "x86_64": b"128",
    "aarch64": b"137",
    "riscv64": b"137",
    "loongarch64": b"137",
    "ppc64le": b"176",
    "s390x": b"177",
}

COMM_LENGTH = 15
"""The bytes of a process's name: TASK_COMM_LEN of the kernel, without the final zero."""

CAP_DAC_READ_SEARCH = 2
CAP_SYS_PTRACE = 19

PID_NS_INIT_INO = 0xEFFFFFFC  # linux/nsfs.h, the same since Linux 3.8

HIDDEN = "/proc is mounted with hidepid, and shows it to root alone"
UNREADABLE = "/proc did not let it be read"
PTRACE_HINT = "needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (root)"


def read_pids() -> tuple[int, ...]:
    """Every process that /proc shows, in ascending order."""
    return tuple(sorted(map(int, filter(str.isdigit, os.listdir("/proc")))))


def require_proc() -> None:
    """See to it that there is a /proc: without it no process is there, whatever runs.

    Raises:
        Unavailable: It is not mounted.
    """
    if not os.path.exists("/proc/self/stat"):
        raise Unavailable("There is no /proc here.", hint="mount -t proc proc /proc")


def read_process(pid: int) -> ProcessFacts | None:
    """The identity, parent, name, state and cgroup of a process; None when it is gone.

    One that /proc hides is there, and of it nothing is known but its pid.
    """
    try:
        return parse_stat(_read(f"/proc/{pid}/stat"), read_process_cgroup(pid))
    except OSError:
        return _hidden_process(pid) if is_hidden(pid) else None


def _hidden_process(pid: int) -> ProcessFacts:
    return ProcessFacts(
        id=ProcessId(pid=pid, start_ticks=0),
        ppid=0,
        comm="?",
        state="?",
        control_group=None,
        unread_reason=HIDDEN,
    )


def is_hidden(pid: int) -> bool:
    """Whether there is such a process, and /proc hides it from us (mount option hidepid).

    kill(2) knows of every process of our pid namespace, whatever /proc shows.
    """
    if not hides_processes():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.access(f"/proc/{pid}/stat", os.R_OK)
    except OSError:
        return False
    return False


def read_masked(pid: int) -> ProcessFacts | None:
    """A process with its signal masks too; None when it is gone."""
    facts = read_process(pid)
    return replace(facts, masks=read_masks(pid, facts.state)) if facts else None


def read_detailed(pid: int) -> ProcessFacts | None:
    """A process with all there is; None when it is gone, or another took its pid meanwhile."""
    facts = read_masked(pid)
    if facts is None:
        return None
    argv, user, cpu_us, rss_bytes = _read_with_psutil(pid)
    detailed = replace(
        facts,
        argv=argv,
        user=user,
        cpu_us=cpu_us,
        rss_bytes=rss_bytes,
        netns=read_netns(pid),
        unread_reason=facts.unread_reason or _unread_reason(facts.state, user),
    )
    return detailed if read_identity(pid) == facts.id else None


def _unread_reason(state: str, user: str | None) -> str | None:
    if user is not None:
        return None
    return "it has ended already" if state in "ZX" else UNREADABLE


def name_after_exec(path: str) -> str:
    """What the kernel calls a process that runs a program, until it calls itself otherwise."""
    return os.fsdecode(os.fsencode(path.rpartition("/")[2])[:COMM_LENGTH])


def read_identity(pid: int) -> ProcessId | None:
    """The identity of a running process, None when it is gone."""
    try:
        return parse_stat(_read(f"/proc/{pid}/stat"), None).id
    except OSError:
        return _hidden_process(pid).id if is_hidden(pid) else None


def is_running(process: ProcessId) -> bool:
    """Whether it still runs; one whose main thread ended runs while another thread does."""
    facts = read_process(process.pid)
    if facts is None or facts.id != process:
        return False
    if facts.state not in "ZX":
        return True
    with contextlib.suppress(OSError):
        return bool(_read_thread_masks(process.pid))
    return False


def read_tasks(pid: int) -> tuple[int, ...]:
    """The threads of a process; none when it is gone or hidden."""
    try:
        return tuple(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return ()


def read_thread_group(pid: int) -> int | None:
    """The process that a thread id belongs to: itself for a process, None when it is gone."""
    try:
        return int(parse_status(_read(f"/proc/{pid}/status"))[b"Tgid"])
    except OSError:
        return None


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def parse_stat(data: bytes, control_group: str | None) -> ProcessFacts:
    """/proc/PID/stat; the name in it is anything, so it ends at the last parenthesis."""
    before, _, after = data.rpartition(b")")
    pid, _, comm = before.partition(b"(")
    fields = after.split()
    return ProcessFacts(
        id=ProcessId(pid=int(pid), start_ticks=int(fields[19])),
        ppid=int(fields[1]),
        comm=os.fsdecode(comm),
        state=fields[0].decode(),
        control_group=control_group,
    )


def _read_with_psutil(
    pid: int,
) -> tuple[tuple[str, ...] | None, str | None, int | None, int | None]:
    import psutil  # 15 ms of start-up that only trace and pid need

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            user = process.username()
            times, memory = process.cpu_times(), process.memory_info()
            argv = tuple(process.cmdline())
    except psutil.Error:
        return None, None, None, None
    cpu_us = round((times.user + times.system) * 1_000_000)
    return argv or None, user, cpu_us, memory.rss


def read_argv(pid: int) -> tuple[str, ...] | None:
    """The command line of a process; None when it has none, is gone or hidden."""
    with contextlib.suppress(OSError):
        words = _read(f"/proc/{pid}/cmdline").split(b"\0")[:-1]
        return tuple(os.fsdecode(word) for word in words) or None
    return None


def read_user_name(uid: int) -> str:
    """The name of a user, or the number where it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_netns(pid: int | str) -> int | None:
    """The inode of a process's network namespace; None when it is hidden or gone."""
    with contextlib.suppress(OSError):
        return parse_netns(os.readlink(f"/proc/{pid}/ns/net"))
    return None


def parse_netns(link: str) -> int | None:
    """The inode in "net:[4026531840]"; None for anything else."""
    number = link.removeprefix("net:[").removesuffix("]")
    return int(number) if number.isdecimal() and link == f"net:[{number}]" else None


# Signals -------------------------------------------------------------------------------------


def read_masks(pid: int, state: str = "S") -> SignalMasks | None:
    """What the process does with signals; None when it is gone or a zombie.

    A unit may have 1,000 of them: what one file says is not asked of others again.
    """
    try:
        status = _read(f"/proc/{pid}/status")
        alone = state not in "ZX" and b"\nThreads:\t1\n" in status
        threads = () if alone else _read_thread_masks(pid)
    except OSError:
        return None
    if state in "ZX" and not threads:
        return None
    masks = parse_masks(status, threads, 0, _read_waiting(pid, alone=alone))
    # A signal that not all of its threads block never waits for a descriptor.
    return replace(masks, signalfd=read_signalfd(pid)) if masks.blocked else masks


def _read_thread_masks(pid: int) -> tuple[int, ...]:
    blocked = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            status = parse_status(_read(f"/proc/{pid}/task/{thread}/status"))
            if status.get(b"State", b"")[:1] not in (b"Z", b"X"):
                blocked.append(int(status[b"SigBlk"], 16))
    return tuple(blocked)


def parse_status(data: bytes) -> dict[bytes, bytes]:
    """/proc/PID/status as its lines; the kernel escapes newlines in the name."""
    lines = (line.partition(b":") for line in data.split(b"\n"))
    return {key: value.strip() for key, _, value in lines}


def parse_masks(
    data: bytes, blocked: tuple[int, ...], signalfd: int | None, waiting: bool | None
) -> SignalMasks:
    """The Sig* lines of /proc/PID/status, with each thread's SigBlk beside them."""
    status = parse_status(data)
    by_all = blocked[0] if blocked else int(status[b"SigBlk"], 16)
    for mask in blocked:
        by_all &= mask
    pids = status.get(b"NSpid", b"").split()
    return SignalMasks(
        caught=int(status[b"SigCgt"], 16),
        ignored=int(status[b"SigIgn"], 16),
        blocked=by_all,
        namespace_init=len(pids) > 1 and pids[-1] == b"1",
        traced=status.get(b"TracerPid", b"0") != b"0",
        signalfd=signalfd,
        waiting=waiting,
    )


def read_signalfd(pid: int) -> int | None:
    """The union of the masks of its signalfd descriptors; None when they may not be seen."""
    mask = 0
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == "anon_inode:[signalfd]":
                    mask |= parse_signalfd(_read(f"/proc/{pid}/fdinfo/{fd}"))
    except OSError:
        return None
    return mask


def parse_signalfd(data: bytes) -> int:
    """The sigmask line of a signalfd's fdinfo."""
    return int(parse_status(data).get(b"sigmask", b"0"), 16)


def _read_waiting(pid: int, *, alone: bool) -> bool | None:
    """Whether a thread sits in sigwait(3); None when the kernel does not show it.

    While it waits, the kernel clears the signals it waits for from SigBlk: such a process looks
    as if it would die. Only the number of the system call tells, and it needs ptrace access.

    Args:
        alone: It has but one thread.
    """
    number = SIGTIMEDWAIT.get(os.uname().machine)
    if number is None:
        return None
    try:
        tasks = f"/proc/{pid}/task"
        # What the kernel has made of a file here it takes away at the end: the fewer, the faster.
        threads = [f"/proc/{pid}"] if alone else [f"{tasks}/{tid}" for tid in os.listdir(tasks)]
        for thread in threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                call = _read(f"{thread}/syscall").split(b" ")[0]
                if call.strip() == number:
                    return True
    except OSError:
        return None
    return False


def read_capabilities() -> frozenset[int]:
    """Our own effective capabilities, by number: capabilities(7)."""
    effective = int(parse_status(_read("/proc/self/status"))[b"CapEff"], 16)
    return frozenset(number for number in range(64) if effective >> number & 1)


def may_look_into_others() -> bool:
    """Whether we have the capabilities that ``PTRACE_HINT`` names."""
    return {CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE} <= read_capabilities()


def is_initial_pid_namespace() -> bool:
    """Whether we see every process of the machine, by the pids that the kernel itself uses."""
    try:
        return os.readlink("/proc/self/ns/pid") == f"pid:[{PID_NS_INIT_INO}]"
    except OSError:
        return False


def hides_processes() -> bool:
    """Whether /proc hides other users' processes from us, or some of what it says of them.

    The mount options hidepid=1 and more, proc(5); ProtectProc= of a unit sets them too.
    """
    return not os.access("/proc/1/stat", os.R_OK)


def read_ancestry(pid: int) -> Iterator[ProcessRef]:
    """From the parent up to the oldest visible ancestor."""
    process = read_process(pid)
    while process is not None and process.ppid > 0:
        process = read_process(process.ppid)
        if process is not None:
            yield ProcessRef(pid=process.id.pid, comm=process.comm)
