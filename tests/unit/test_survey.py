"""A survey goes on where the kernel does not list every protocol."""

from __future__ import annotations

import errno
import socket

import pytest

from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.scope import Scope
from sdtool.model.sockets import SocketFilter, SocketStates
from sdtool.sources import sockets
from sdtool.sources.netlink import dump


def test_one_module_missing_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without udp_diag, UDP is read from /proc; TCP keeps what only sock_diag tells."""

    def without_udp(body: bytes, diag: socket.socket | None, kind: int) -> list[bytes]:
        if body[1] == socket.IPPROTO_UDP and kind == sockets.SOCK_DIAG_BY_FAMILY:
            raise OSError(errno.ENOENT, "no udp_diag")
        return dump(body, diag, kind)

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
