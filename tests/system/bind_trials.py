"""Thousands of random situations on a port: what is predicted of a bind, and what comes of it.

Run as a program, in a network namespace of its own where there can be one. One process makes
everything: sockets of another user with seteuid(2), so that nothing has to be forked. It prints
its findings as JSON: how many trials, how many answers were unknown, and every wrong one.

    unshare --net python -m tests.system.bind_trials --count 20000 --seed 1

The lane "rules" gives what was read to the analysis; the slower "host" asks the library as the
command does, about low ports too, with and without CAP_NET_BIND_SERVICE.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdtool.analysis.binding import REMEDIES, judge_bind, occupy
from sdtool.analysis.conflicts import can_bind
from sdtool.analysis.ownership import join
from sdtool.host import Host
from sdtool.model.binding import (
    BindAnswer,
    BindScene,
    BindSpec,
    BindVerdict,
    Newcomer,
    OptionScan,
    PortPermission,
    ReuseOption,
)
from sdtool.model.sockets import SocketFacts, SocketFilter
from sdtool.model.unit import ManagerRoots
from sdtool.sources import binding, copies
from sdtool.sources.descriptors import Sweep
from sdtool.sources.sockets import read_sockets

SO_BINDTOIFINDEX = 62
IP_BIND_ADDRESS_NO_PORT = 24
IP_LOCAL_PORT_RANGE = 51
IPPROTO_MPTCP = 262
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP = 1

OTHER_UID = 65534
FIRST_PORT, PORTS = 33_000, 12_000
"""In ip_local_port_range, so that the kernel can be made to choose them."""

LOW_PORTS = (89, 1023)

CAP_NET_BIND_SERVICE = 10
CAPABILITY_VERSION = 0x20080522

BINDV6ONLY = Path("/proc/sys/net/ipv6/bindv6only")

ADDRESSES = (
    *("0.0.0.0", "0.0.0.0", "127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.6"),
    *("::", "::", "::", "::1", "::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0"),
)

REUSES = (
    frozenset[ReuseOption](),
    frozenset({ReuseOption.REUSEADDR}),
    frozenset({ReuseOption.REUSEPORT}),
    frozenset(ReuseOption),
)
OPTION_NUMBERS = {
    ReuseOption.REUSEADDR: socket.SO_REUSEADDR,
    ReuseOption.REUSEPORT: socket.SO_REUSEPORT,
}
Reuse = frozenset[ReuseOption]


@dataclass(frozen=True, slots=True)
class Wish:
    """A socket to be made: of a holder or of the newcomer.

    Attributes:
        v6only: None for what the system has it be.
    """

    kind: str
    protocol: str
    address: str
    v6only: bool | None
    reuse: Reuse
    uid: int
    device: int


@dataclass(slots=True)
class World:
    """The namespace that the trials are in: its devices, users, and a server to connect to."""

    devices: tuple[int, ...]
    uids: tuple[int, ...]
    server: socket.socket
    chance: random.Random
    own: bool
    meeting: tuple[tuple[int, bool | None], ...] = ()


@dataclass(slots=True)
class Tally:
    """What came out."""

    trials: int = 0
    spoiled: int = 0
    succeeded: int = 0
    asked: collections.Counter[str] = field(default_factory=collections.Counter)
    unknown: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)


# The world -----------------------------------------------------------------------------------


def make_world(chance: random.Random, *, own: bool) -> World:
    """Put the namespace in order; in one that is not our own nothing is changed."""
    devices: list[int] = []
    if own:
        set_up("lo")
        devices.append(socket.if_nametoindex("lo"))
        with contextlib.suppress(OSError):
            devices.append(add_bridge("sdtool0"))
    server = socket.socket(socket.AF_INET6)
    server.bind(("::", 0))
    server.listen(64)
    world = World(
        devices=tuple(devices),
        uids=(0, OTHER_UID) if may_be_another() else (os.geteuid(),),
        server=server,
        chance=chance,
        own=own,
    )
    world.meeting = binding.read_meeting(devices, spared=0)
    return world


def may_be_another() -> bool:
    """Whether sockets of a second user can be made."""
    try:
        with become(OTHER_UID):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def become(uid: int) -> Iterator[None]:
    """Be another user while sockets are made."""
    before = os.geteuid()
    if uid == before:
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def set_up(device: str) -> None:
    """Switch a device on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        asked = struct.pack("16sH14x", device.encode(), 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(door, SIOCGIFFLAGS, asked), 16)
        fcntl.ioctl(door, SIOCSIFFLAGS, struct.pack("16sH14x", device.encode(), flags | IFF_UP))


def add_bridge(name: str) -> int:
    """Make a second device, which leads nowhere, by rtnetlink(7); its index."""
    kind = struct.pack("=HH", 4 + 7, 1) + b"bridge\0" + b"\0"
    info = struct.pack("=HH", 4 + len(kind), 18) + kind
    named = struct.pack("=HH", 4 + len(name) + 1, 3) + name.encode() + b"\0"
    named += b"\0" * (-len(named) % 4)
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + named + info
    header = struct.pack("=IHHII", 16 + len(body), 16, 0x1 | 0x4 | 0x200 | 0x400, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.sendto(header + body, (0, 0))
        (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))
    set_up(name)
    return socket.if_nametoindex(name)


# Sockets -------------------------------------------------------------------------------------


def make(wish: Wish, protocol_number: int = 0) -> socket.socket:
    """A socket with the options of a wish, not bound."""
    family = socket.AF_INET6 if ":" in wish.address else socket.AF_INET
    kind = socket.SOCK_STREAM if wish.protocol == "tcp" else socket.SOCK_DGRAM
    made = socket.socket(family, kind, protocol_number)
    try:
        made.settimeout(0.05)
        if family == socket.AF_INET6 and wish.v6only is not None:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wish.v6only)
        for option in wish.reuse:
            made.setsockopt(socket.SOL_SOCKET, OPTION_NUMBERS[option], 1)
        if wish.device:
            made.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, wish.device)
    except BaseException:
        made.close()
        raise
    return made


def bind(wish: Wish, port: int, number: int = 0) -> socket.socket:
    """A bound one."""
    made = make(wish, number)
    try:
        made.bind((wish.address, port))
    except BaseException:
        made.close()
        raise
    return made


Made = list[socket.socket]


class Spoiled(Exception):
    """A holder was there and is gone: what the kernel remembers of it nobody can see."""


@contextlib.contextmanager
def spoiling(*made: socket.socket) -> Iterator[None]:
    """Close them when they do not become what they were to be."""
    try:
        yield
    except OSError as error:
        for one in made:
            one.close()
        raise Spoiled from error


def listening(world: World, wish: Wish, port: int) -> Made:
    """A server."""
    made = bind(wish, port, IPPROTO_MPTCP if wish.kind == "mptcp" else 0)
    with spoiling(made):
        made.listen(8)
    return [made]


def bound(world: World, wish: Wish, port: int) -> Made:
    """One that does not listen."""
    return [bind(wish, port)]


def accepted(world: World, wish: Wish, port: int) -> Made:
    """A connection to a server: (server, its child, client)."""
    (server,) = listening(world, wish, port)
    target = {"0.0.0.0": "127.0.0.1", "::ffff:0.0.0.0": "127.0.0.1"}.get(
        wish.address, wish.address
    )
    if wish.address == "::":
        # To a dual-stack server both families may come.
        v4 = wish.v6only is not True and world.chance.random() < 0.5
        target = "127.0.0.1" if v4 else "::1"
    target = target.removeprefix("::ffff:")
    client = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
    with spoiling(server, client):
        client.settimeout(0.05)
        client.connect((target, port))
        if wish.kind == "queued":
            return [server, client]
        child, _ = server.accept()
    return [server, child, client]


def child_alone(world: World, wish: Wish, port: int) -> Made:
    """A connection whose server is gone."""
    server, child, client = accepted(world, wish, port)
    server.close()
    return [child, client]


def close_wait(world: World, wish: Wish, port: int) -> Made:
    """A connection that only the peer has closed."""
    child, client = child_alone(world, wish, port)
    client.close()
    return [child]


def time_wait(world: World, wish: Wish, port: int) -> Made:
    """What is left of a connection that the server closed first."""
    child, client = child_alone(world, wish, port)
    child.close()
    client.close()
    return []


def fin_wait2(world: World, wish: Wish, port: int) -> Made:
    """A connection that the server closed, and the peer has not."""
    child, client = child_alone(world, wish, port)
    child.close()
    return [client]


def half_closed(world: World, wish: Wish, port: int) -> Made:
    """A connection that the server has ended, and still holds."""
    child, client = child_alone(world, wish, port)
    child.shutdown(socket.SHUT_WR)
    return [child, client]


def outgoing(world: World, wish: Wish, port: int) -> Made:
    """A connection to elsewhere with the port as its own, by bind or by the kernel's choice."""
    if world.chance.random() < 0.5:
        made = bind(wish, port)
    else:
        made = make(wish)
        only = struct.pack("=I", port | port << 16)
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, only)
    wants6 = made.family == socket.AF_INET6 and wish.address in ("::", "::1")
    target = "::1" if wants6 else "127.0.0.1"
    if made.family == socket.AF_INET6 and not wants6:
        target = "::ffff:127.0.0.1"
    with spoiling(made):
        made.connect((target, world.server.getsockname()[1]))
        if wish.protocol == "tcp":
            world.server.accept()[0].close()
        if made.getsockname()[1] != port:
            raise OSError("the kernel chose another port")
    return [made]


def gone(world: World, wish: Wish, port: int) -> Made:
    """One that was there; with SO_REUSEPORT the kernel may remember it, which nobody sees."""
    bind(replace(wish, reuse=wish.reuse - {ReuseOption.REUSEPORT}), port).close()
    return []


KINDS: dict[str, dict[str, Callable[[World, Wish, int], Made]]] = {
    "tcp": {
        "listen": listening,
        "mptcp": listening,
        "bound": bound,
        "accepted": accepted,
        "queued": accepted,
        "child": child_alone,
        "close-wait": close_wait,
        "time-wait": time_wait,
        "fin-wait2": fin_wait2,
        "half-closed": half_closed,
        "outgoing": outgoing,
        "gone": gone,
    },
    "udp": {"bound": bound, "connected": outgoing, "gone": gone},
}


def close(made: Made) -> None:
    """Close without a trace: connections are reset."""
    for one in made:
        if one.type == socket.SOCK_STREAM:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()


# Trials --------------------------------------------------------------------------------------


def wish_for(world: World, kind: str, protocol: str) -> Wish:
    """A random socket of a kind."""
    chance = world.chance
    address = chance.choice(ADDRESSES)
    v6only = chance.choice((True, False, None)) if ":" in address else None
    if address.startswith("::ffff:"):
        v6only = chance.choice((False, None))
    return Wish(
        kind=kind,
        protocol=protocol,
        address=address,
        v6only=v6only,
        reuse=chance.choice(REUSES),
        uid=chance.choice(world.uids),
        device=chance.choice(world.devices) if world.devices and chance.random() < 0.2 else 0,
    )


def try_once(world: World, port: int, tally: Tally) -> None:
    """One situation: make it, predict, bind, compare; without a trial if it cannot be made."""
    holders: Made = []
    try:
        _try(world, port, tally, holders)
    except Spoiled:
        tally.spoiled += 1
    finally:
        close(holders)


def _try(world: World, port: int, tally: Tally, holders: Made) -> None:
    protocol, kept = populate(world, port, tally, holders)
    newcomer = wish_for(world, "newcomer", protocol)
    if newcomer.device and not is_good(newcomer):
        newcomer = replace(newcomer, device=0)
    try:
        predicted = {who: predict(world, newcomer, port, who) for who in ("root", "unprivileged")}
        succeeded = bind_really(newcomer, port)
    finally:
        close(holders)
    tally.trials += 1
    tally.succeeded += succeeded
    for who, (answer, scene) in predicted.items():
        for problem in judge(answer, scene, newcomer.reuse, succeeded, who, tally):
            rows = [f"{one.row} {one.options}" for one in scene.occupants]
            text = "\n  ".join([f"{who}: {problem}", str(newcomer), *map(str, kept), *rows])
            tally.wrong.append(text)


def populate(world: World, port: int, tally: Tally, holders: Made) -> tuple[str, list[Wish]]:
    """Random sockets of one protocol on a port: which it is, and what was wished for."""
    chance = world.chance
    if world.own and chance.random() < 0.1:
        with contextlib.suppress(OSError):
            BINDV6ONLY.write_text(chance.choice("001"))
    protocol = chance.choice(("tcp", "tcp", "udp"))
    kept = []
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3))):
        wish = wish_for(world, chance.choice(tuple(KINDS[protocol])), protocol)
        with contextlib.suppress(OSError), become(wish.uid):
            holders += KINDS[protocol][wish.kind](world, wish, port)
            kept.append(wish)
            tally.kinds[f"{protocol} {wish.kind}"] += 1
    return protocol, kept


def is_good(wish: Wish) -> bool:
    """Whether its address is one of its device's."""
    try:
        bind(wish, 0).close()
    except OSError:
        return False
    return True


def predict(world: World, wish: Wish, port: int, who: str) -> tuple[BindAnswer, BindScene]:
    """What sdtool makes of the situation, with options as root or without."""
    dual = ":" in wish.address and wish.v6only is False
    spec = BindSpec(address=wish.address, port=port, protocol=wish.protocol, dual=dual)
    with become(wish.uid):
        newcomer = binding.read_newcomer(spec)
    newcomer = as_wished(newcomer, wish)
    rows = read_sockets(SocketFilter(protocols=(wish.protocol,), port=port))
    options = read_options(rows) if who == "root" else OptionScan(reason="not asked")
    scene = BindScene(
        newcomer=newcomer,
        permission=PortPermission(permitted=True),
        occupants=occupy(rows, options),
        meeting=world.meeting,
        options_reason=options.reason,
    )
    return judge_bind(spec, scene, join(rows, None, None, ManagerRoots())), scene


def as_wished(newcomer: Newcomer, wish: Wish) -> Newcomer:
    """With what the command line has no words for: [::] for IPv6 alone, and a device."""
    v6only = True if wish.address == "::" and wish.v6only else newcomer.v6only
    return replace(newcomer, v6only=v6only, interface=wish.device or None)


def read_options(rows: tuple[SocketFacts, ...]) -> OptionScan:
    """Of the sockets that this process holds."""
    held = Sweep([os.getpid()]).find({row.inode for row in rows if row.inode})
    return copies.read_options(held)


def bind_really(wish: Wish, port: int) -> bool:
    """Bind, and listen."""
    try:
        with become(wish.uid), bind(wish, port) as made:
            if wish.protocol == "tcp":
                made.listen(8)
    except OSError:
        return False
    return True


def judge(
    answer: BindAnswer, scene: BindScene, reuse: Reuse, succeeded: bool, who: str, tally: Tally
) -> Iterator[str]:
    """What was wrong about a prediction."""
    said = False if scene.newcomer.refusal else can_bind(scene, reuse)
    names = "+".join(sorted(option.removeprefix("SO_") for option in reuse)) or "plain"
    tally.asked[f"{who} {names}"] += 1
    tally.unknown[f"{who} {names}"] += said is None
    if said is not None and said != succeeded:
        yield f"bind with {names} was to be {said}, and was {succeeded}"
    verdicts = {BindVerdict.YES: True, BindVerdict.NO: False}
    if not reuse:
        tally.asked[f"{who} needs"] += 1
        tally.unknown[f"{who} needs"] += bool((answer.needs_reason or "").startswith("not known"))
        if verdicts.get(answer.verdict, succeeded) != succeeded:
            yield f"the verdict {answer.verdict}, and it was {succeeded}"
    if answer.needs is not None and set(answer.needs) == reuse and not succeeded:
        yield f"{answer.needs} was to help, and did not"
    if answer.needs is None and succeeded and (answer.needs_reason or "").startswith("none"):
        yield f"nothing was to help, and {names} did"


# Through the library --------------------------------------------------------------------------


def try_through_host(world: World, port: int, tally: Tally) -> None:
    """As ``try_once``, but everything is read by ``Host.bindable``, as the user who binds."""
    chance = world.chance
    if chance.random() < 0.4:
        port = chance.randint(*LOW_PORTS)
    holders: Made = []
    try:
        protocol, kept = chance.choice(("tcp", "udp")), list[Wish]()
        # On a port without anybody it is all up to permission.
        if chance.random() < 0.6:
            protocol, kept = populate(world, port, tally, holders)
        newcomer = as_typed(wish_for(world, "newcomer", protocol))
        able = chance.random() < 0.5
        with contextlib.nullcontext() if able else without_bind_service():
            answer = ask_host(newcomer, port)
            who = "low port" if port < FIRST_PORT else "high port"
            problems = list(compare(world, answer, newcomer, port, who, tally))
    except Spoiled:
        tally.spoiled += 1
        return
    finally:
        close(holders)
    tally.trials += 1
    for problem in problems:
        said = f"{answer.verdict}: {answer.verdict_reason}; {answer.needs_reason}"
        text = [f"able {able}, {port}: {problem}", said, str(newcomer), *map(str, kept)]
        tally.wrong.append("\n  ".join(text))


def as_typed(wish: Wish) -> Wish:
    """Without what the command line has no words for: [::] for IPv6 alone, and a device."""
    v6only = None if wish.address == "::" and wish.v6only else wish.v6only
    return replace(wish, v6only=v6only, device=0, reuse=frozenset())


def ask_host(wish: Wish, port: int) -> BindAnswer:
    """What the library says to the user who would bind."""
    dual = ":" in wish.address and wish.v6only is False
    spec = BindSpec(address=wish.address, port=port, protocol=wish.protocol, dual=dual)

    async def ask() -> BindAnswer:
        async with Host() as host:
            (answer,) = (await host.bindable([spec])).data
            return answer

    with become(wish.uid):
        return asyncio.run(ask())


def compare(
    world: World, answer: BindAnswer, wish: Wish, port: int, who: str, tally: Tally
) -> Iterator[str]:
    """What was wrong about an answer of the library: the verdict first, then what would help."""
    succeeded = bind_really(wish, port)
    tally.succeeded += succeeded
    for key in (f"{who} verdict", f"{who} needs"):
        tally.asked[key] += 1
    tally.unknown[f"{who} verdict"] += answer.verdict is BindVerdict.UNKNOWN
    reason = answer.needs_reason or ""
    tally.unknown[f"{who} needs"] += reason.startswith("not known")
    said = {BindVerdict.YES: True, BindVerdict.NO: False}.get(answer.verdict, succeeded)
    if said != succeeded:
        yield f"the verdict {answer.verdict}, and it was {succeeded}"
    if answer.needs and not bind_really(replace(wish, reuse=frozenset(answer.needs)), port):
        yield f"{answer.needs} was to help, and did not"
    if reason.startswith("none"):
        reuse = frozenset(world.chance.choice(REMEDIES))
        if bind_really(replace(wish, reuse=reuse), port):
            yield f"nothing was to help, and {reuse} did"


@contextlib.contextmanager
def without_bind_service() -> Iterator[None]:
    """Be without CAP_NET_BIND_SERVICE; who has it in the permitted set can have it back."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    before = ctypes.create_string_buffer(24)
    library = ctypes.CDLL(None, use_errno=True)
    if library.capget(header, before):
        raise OSError(ctypes.get_errno(), "capget")
    effective, *rest = struct.unpack("=6I", before)
    if library.capset(header, struct.pack("=6I", effective & ~(1 << CAP_NET_BIND_SERVICE), *rest)):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        library.capset(header, before)


LANES = {"rules": try_once, "host": try_through_host}


def run(count: int, seed: int, *, own: bool, lane: str = "rules") -> Tally:
    """All trials of a seed."""
    tally = Tally()
    world = make_world(random.Random(seed), own=own)
    with world.server:
        for number in itertools.count():
            if tally.trials == count:
                break
            LANES[lane](world, FIRST_PORT + number % PORTS, tally)
    return tally


def main() -> int:
    """Run as the command line says, and print what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--place", choices=("own", "shared"), default="own")
    parser.add_argument("--lane", choices=tuple(LANES), default="rules")
    options = parser.parse_args()
    tally = run(options.count, options.seed, own=options.place == "own", lane=options.lane)
    shares = {key: round(tally.unknown[key] / asked, 4) for key, asked in tally.asked.items()}
    found = {
        "seed": options.seed,
        "trials": tally.trials,
        "spoiled": tally.spoiled,
        "succeeded": tally.succeeded,
        "asked": tally.asked,
        "unknown": shares,
        "kinds": tally.kinds,
        "wrong": len(tally.wrong),
        "examples": tally.wrong[:10],
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
