"""The sockets and processes of a busy server, for as long as standard input is open.

Run with how many sockets and how many processes. For ten processes there is one socket that
listens and one of UDP; the others are the two ends of connections, in two processes. Each
process has as many as the next. "ready" on standard output says that all are there. It imports
little: what it has in memory it has as often as there are processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator

BATCH = 100
"""Processes started at once, which inherit each other's sockets and close them."""

HOST = "127.0.0.1"


def main() -> None:
    """Build, say so, wait, and end every process whatever happened."""
    sockets, processes = map(int, sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
    pids: list[int] = []
    # Its end of file is the last resort: it comes when we are killed.
    stay, held_open = os.pipe()
    try:
        for start in range(0, processes, BATCH):
            end = min(start + BATCH, processes)
            share = sockets * end // processes - sockets * start // processes
            # At least a third for connections where there are fewer sockets than processes.
            listeners = min((end - start) // 10, share // 3)
            start_batch(end - start, make_sockets(share, listeners), (stay, held_open), pids)
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        end_all(pids)


def make_sockets(count: int, listening: int) -> list[socket.socket]:
    """Listeners, connections to them with their ends side by side, and as many of UDP."""
    listeners = [make_listener() for _ in range(listening)]
    pairs = (count - 2 * listening) // 2 if listening else 0
    ends = [end for n in range(pairs) for end in connect(listeners[n % listening])]
    udp = [make_udp() for _ in range(count - listening - len(ends))]
    return [*listeners, *ends, *udp]


def make_listener() -> socket.socket:
    """On a port that the kernel chooses."""
    listener = socket.socket()
    listener.bind((HOST, 0))
    listener.listen()
    return listener


def make_udp() -> socket.socket:
    """On a port that the kernel chooses."""
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind((HOST, 0))
    return udp


def connect(listener: socket.socket) -> Iterator[socket.socket]:
    """The client's end of a connection, then the server's."""
    yield socket.create_connection(listener.getsockname())
    yield listener.accept()[0]


def start_batch(
    count: int, sockets: list[socket.socket], stay: tuple[int, int], pids: list[int]
) -> None:
    """Start processes and deal the sockets out to them; return when each has its own only."""
    ready, tell = os.pipe()
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            stand_by(number, count, sockets, stay, tell)
        pids.append(pid)
    os.close(tell)
    told = 0
    while part := os.read(ready, count):
        told += len(part)
    os.close(ready)
    if told != count:
        raise RuntimeError(f"{count - told} of {count} processes did not come up")
    for each in sockets:
        each.close()


def stand_by(
    number: int, count: int, sockets: list[socket.socket], stay: tuple[int, int], tell: int
) -> None:
    """Be one of the processes: keep every count-th socket and wait for the end."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for position, each in enumerate(sockets):
            if position % count != number:
                each.close()
        os.close(stay[1])
        os.write(tell, b".")
        os.close(tell)
        os.read(stay[0], 1)
    finally:
        os._exit(0)


def end_all(pids: list[int]) -> None:
    """All at once, and not before the last is gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
