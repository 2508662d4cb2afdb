"""A polkit agent on this terminal: pkttyagent, for as long as one question takes.

As systemctl does it: the agent registers itself for its parent, closes a pipe when polkit knows
it, and is ended when the question is over. It switches the terminal's echo off, and can be killed
while it is off: whoever starts it here gives the terminal back as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator

from sdtool.cli.terminal import is_foreground, terminal_restored

AGENT = "pkttyagent"
REGISTER_S = 5.0
END_S = 2.0
PR_SET_PDEATHSIG = 1


@contextlib.asynccontextmanager
async def agent_on_terminal() -> AsyncIterator[str | None]:
    """Have an agent that asks on this terminal, or say why there is none: another may answer.

    A job in the background has none: it would be stopped when it reads the terminal. Of one that
    ends at once nothing is said here: outside a login session polkit takes none.
    """
    path = shutil.which(AGENT)
    if path is None:
        yield f"{AGENT} is not installed"
        return
    if not is_foreground():
        yield f"{AGENT} asks in the foreground of a terminal only"
        return
    with terminal_restored(prompted=True), contextlib.ExitStack() as pipe:
        reader, writer = os.pipe()
        pipe.callback(os.close, reader)
        child, lack = None, None
        try:
            child = _start(path, writer)
        except OSError as error:
            lack = f"{path} cannot be started: {error.strerror}"
        finally:
            os.close(writer)
        if child is None:
            yield lack
            return
        try:
            registered = await _is_readable(reader, REGISTER_S)
            late = f"{AGENT} has not registered with polkit within {REGISTER_S:g} s"
            yield None if registered else late
        finally:
            await _end(child)


def _start(path: str, notify: int) -> subprocess.Popen[bytes]:
    """Start the agent; it asks on /dev/tty, so nothing of it gets into our output."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        [path, "--notify-fd", str(notify), "--fallback"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(notify,),
        preexec_fn=die_with_parent,
    )


async def _is_readable(fd: int, seconds: float) -> bool:
    """Whether a descriptor is readable or ended before its time is over."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(seconds):
            return await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)


async def _end(child: subprocess.Popen[bytes]) -> None:
    """End the agent, also one that is stopped; SIGKILL where it does not listen."""
    try:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGCONT)
            pidfd = os.pidfd_open(child.pid)
            try:
                await _is_readable(pidfd, END_S)
            finally:
                os.close(pidfd)
    finally:
        child.kill()
        child.wait()
