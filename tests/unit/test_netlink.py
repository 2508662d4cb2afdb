"""A dump is whole, or asked for again, or an error: recorded replies, and what can befall them."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from sdtool.sources.netlink import NLMSG_DONE, NLMSGHDR, dump
from tests.unit.make import captured

WHOLE = captured("linux-6.18/sock_diag/tcp4-listen.bin")
FAILED = captured("linux-6.18/sock_diag/failed.bin")
END = NLMSGHDR.pack(20, NLMSG_DONE, 2, 1, 0) + struct.pack("=i", 0)

Reply = tuple[bytes, int] | OSError
"""A datagram with the flags of recvmsg(2), or what reading it fails with."""


class Diag(socket.socket):
    """A socket that replays what a kernel sent, one list of replies for each question."""

    def __init__(self, *tries: list[Reply]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.tries = list(tries)
        self.asked = 0

    def sendto(self, data: bytes, *_: object) -> int:  # type: ignore[override]
        """The question: from now on its replies come, with its number."""
        self.number = NLMSGHDR.unpack_from(data)[3]
        self.replies = iter(self.tries[self.asked])
        self.asked += 1
        return 0

    def recvmsg(self, *_: object) -> tuple[bytes, list[object], int, None]:  # type: ignore[override]
        """The next reply."""
        reply = next(self.replies)
        if isinstance(reply, OSError):
            raise reply
        return renumbered(reply[0], self.number), [], reply[1], None


def renumbered(data: bytes, number: int) -> bytes:
    """A datagram as the answer to another question; only its first message is looked at."""
    length, kind, flags, _, port = NLMSGHDR.unpack_from(data)
    return NLMSGHDR.pack(length, kind, flags, number, port) + data[NLMSGHDR.size :]


def interrupted(data: bytes) -> bytes:
    """The same with NLM_F_DUMP_INTR in its first message: the table changed meanwhile."""
    length, kind, flags, *rest = NLMSGHDR.unpack_from(data)
    return NLMSGHDR.pack(length, kind, flags | 0x10, *rest) + data[NLMSGHDR.size :]


BROKEN: dict[str, list[Reply]] = {
    "interrupted": [(interrupted(WHOLE), 0)],
    "cut": [(WHOLE[:40], socket.MSG_TRUNC), (END, 0)],
    "overrun": [OSError(errno.ENOBUFS, "no room")],
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_dump_is_asked_for_again(how: str) -> None:
    """What came of it is forgotten."""
    with Diag(BROKEN[how], [(WHOLE, 0)]) as diag:
        rows = dump(b"", diag)
        assert (2, 1) == (diag.asked, len(rows))


@pytest.mark.parametrize(
    ("how", "code"),
    [("interrupted", errno.EAGAIN), ("cut", errno.EAGAIN), ("overrun", errno.ENOBUFS)],
)
def test_dump_that_stays_broken_is_an_error(how: str, code: int) -> None:
    """After three tries; half an answer would be a wrong one."""
    with Diag(*[BROKEN[how]] * 3) as diag, pytest.raises(OSError, match=r".") as caught:
        dump(b"", diag)
    assert (code, 3) == (caught.value.errno, diag.asked)


def test_refusal_carries_the_kernels_errno() -> None:
    """Asked once: to ask again would change nothing."""
    with Diag([(FAILED, 0)]) as diag, pytest.raises(FileNotFoundError):
        dump(b"", diag)
    assert 1 == diag.asked


def test_silent_kernel_is_given_up() -> None:
    """A deadline, not a hang."""
    with Diag([TimeoutError("timed out")]) as diag, pytest.raises(OSError, match=r".") as caught:
        dump(b"", diag)
    assert errno.ETIMEDOUT == caught.value.errno


def test_dump_of_several_datagrams_is_one() -> None:
    """Until the message that says it is done."""
    first = WHOLE[: struct.unpack_from("=I", WHOLE)[0]]
    with Diag([(first, 0), (first, 0), (END, 0)]) as diag:
        assert 2 == len(dump(b"", diag))
