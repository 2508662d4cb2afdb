"""A polkit agent on this terminal: pkttyagent, for as long as one question takes.

As systemctl does it: the agent registers itself for its parent, closes a pipe when polkit knows
it, and is ended when the question is over. It switches the terminal's echo off, and can be killed
while it is off: whoever starts it here gives the terminal back as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator

from sdtool.cli.terminal import is_foreground, terminal_restored

log = logging.getLogger(__name__)

AGENT = "pkttyagent"
REGISTER_S = 5.0
END_S = 2.0
PR_SET_PDEATHSIG = 1


@contextlib.asynccontextmanager
async def agent_on_terminal() -> AsyncIterator[None]:
    """Have an agent that asks on this terminal; without pkttyagent another one may answer.

    A job in the background has none: it would be stopped when it reads the terminal.
    """
    path = shutil.which(AGENT)
    if path is None or not is_foreground():
        log.info("no %s is started: %s", AGENT, "in the background" if path else "not installed")
        yield
        return
    with terminal_restored(prompted=True), contextlib.ExitStack() as pipe:
        reader, writer = os.pipe()
        pipe.callback(os.close, reader)
        try:
            child = _start(path, writer)
        except OSError as error:
            log.warning("%s cannot be started: %s", path, error.strerror)
            child = None
        finally:
            os.close(writer)
        if child is None:
            yield
            return
        try:
            await _wait_for(reader, REGISTER_S, "has not registered with polkit")
            yield
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


async def _wait_for(fd: int, seconds: float, otherwise: str) -> None:
    """Until a descriptor is readable or ended, no longer than its time."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(seconds):
            await readable.wait()
    except TimeoutError:
        log.warning("%s %s within %g s", AGENT, otherwise, seconds)
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
                await _wait_for(pidfd, END_S, "has not ended")
            finally:
                os.close(pidfd)
    finally:
        child.kill()
        child.wait()
