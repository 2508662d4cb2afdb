"""A survey goes on where the kernel does not list every protocol."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.scope import Scope
from sdtool.model.sockets import SocketFilter, SocketStates
from sdtool.sources import sockets
from sdtool.sources.netlink import dump

BOUND_INACTIVE = 7
"""As its rows come: the second byte is the state."""


def without_udp(body: bytes, diag: socket.socket | None, kind: int) -> list[bytes]:
    """The kernel's answers where there is no udp_diag, and no BOUND state (before Linux 6.8)."""
    if body[1] == socket.IPPROTO_UDP and kind == sockets.SOCK_DIAG_BY_FAMILY:
        raise OSError(errno.ENOENT, "no udp_diag")
    return [row for row in dump(body, diag, kind) if row[1] != BOUND_INACTIVE]


def test_one_module_missing_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without udp_diag, UDP is read from /proc; TCP keeps what only sock_diag tells."""
    monkeypatch.setattr(sockets, "dump", without_udp)
    udp = socket.socket(type=socket.SOCK_DGRAM)
    with socket.create_server(("127.0.0.1", 0)) as tcp, udp:
        udp.bind(("127.0.0.1", 0))
        ours = {(tcp.getsockname()[1], "tcp"), (udp.getsockname()[1], "udp")}
        found = Survey(Session(Scope.SYSTEM), pids=[]).read(
            SocketFilter(states=SocketStates.LISTENING)
        )
    assert {"tcp": "sock_diag", "udp": "procfs"} == {
        row.protocol: row.source for row in found if (row.port, row.protocol) in ours
    }


def test_one_module_missing_hides_no_bound_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no list has is found by its descriptor, whatever else is not listed."""
    monkeypatch.setattr(sockets, "dump", without_udp)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        survey = Survey(Session(Scope.SYSTEM), pids=[os.getpid()])
        wanted = SocketFilter(port=port)
        assert () == survey.read(wanted)
        rows = survey.read_deeper(wanted)
    assert [("tcp", "BOUND", "pidfd_getfd")] == [(r.protocol, r.state, r.source) for r in rows]
