"""Which sockets keep another one from being bound: the kernel's own rules, with doubt.

True, False, or None for what sock_diag and the options that could be read do not decide. Beyond
the plain rules the kernel remembers, in a port's bucket, the last socket bound with SO_REUSEPORT,
and lets one like it in without a look at the others: where a socket that is there now may have
left that memory, an answer about SO_REUSEPORT is None. One that is gone may have too; about a
bind without options it says nothing.

Options are taken as they are now; one that was changed after the bind may count as it was.

Source: net/ipv4/inet_connection_sock.c (inet_bind_conflict, inet_rcv_saddr_equal,
sk_reuseport_match), net/ipv4/udp.c (udp_lib_lport_inuse).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from sdtool.model.binding import BindScene, Newcomer, Occupant, ReuseOption
from sdtool.model.sockets import SocketFacts

Reuse = Set[ReuseOption]
PLAIN: Reuse = frozenset()

LOOPBACK4_IPV6 = IPv4Address("127.0.0.6")
"""What the kernel writes down as the IPv4 address of a socket that has an IPv6 one (in6.h)."""

CROWD = 10
"""With more UDP sockets in a slot the kernel looks them up by address."""


def any_of(values: Iterable[bool | None]) -> bool | None:
    """Whether one is true; None when none is for certain and one may be."""
    found = set(values)
    return True if True in found else None if None in found else False


def negate(value: bool | None) -> bool | None:
    """Not; doubt stays doubt."""
    return None if value is None else not value


# Addresses -----------------------------------------------------------------------------------


def overlaps(newcomer: Newcomer, row: SocketFacts, v6only: bool | None) -> bool | None:
    """Whether the two addresses have one in common.

    Args:
        v6only: The row's own; None for IPv4, and when it is not known.
    """
    if row.family == "inet" or v6only is not None:
        return _overlaps(newcomer, row, bool(v6only))
    both = {_overlaps(newcomer, row, guess) for guess in (True, False)}
    return both.pop() if len(both) == 1 else None


def _overlaps(newcomer: Newcomer, row: SocketFacts, v6only: bool) -> bool | None:
    ours, theirs = _read(newcomer.address), _read(row.address)
    if isinstance(ours, IPv6Address):
        if isinstance(theirs, IPv4Address):
            return ours.is_unspecified and not newcomer.v6only
        return ours == theirs or ours.is_unspecified or theirs.is_unspecified
    if isinstance(theirs, IPv4Address):
        return ours == theirs or ours.is_unspecified or theirs.is_unspecified
    if theirs.is_unspecified:
        return not v6only
    if v6only or newcomer.v6only is not None:
        return False
    # A connection of a dual-stack socket: to a bind of IPv4 it is one of 127.0.0.6, and since
    # the kernel looks up single addresses by their hash, it depends on its version.
    return True if ours.is_unspecified else None if ours == LOOPBACK4_IPV6 else False


@lru_cache(maxsize=1024)
def _read(text: str) -> IPv4Address | IPv6Address:
    """An address; one that is IPv4 in IPv6 (::ffff:127.0.0.1) as the former."""
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


# One socket ----------------------------------------------------------------------------------


def meets(scene: BindScene, occupant: Occupant) -> bool | None:
    """Whether a socket has the newcomer's address and device too: then options decide."""
    row, options = occupant.row, occupant.options
    v6only = options.v6only if row.v6only is None and options else row.v6only
    met, elsewhere = overlaps(scene.newcomer, row, v6only), _is_elsewhere(scene, row)
    if met is False or elsewhere is True:
        return False
    # What asks for a connection has no part in the port: its listener has.
    asking = row.state == "SYN_RECV" and row.inode is None
    return None if elsewhere is None or asking or _may_be_overlooked(scene, row) else met


def _is_elsewhere(scene: BindScene, row: SocketFacts) -> bool | None:
    """Whether it is bound to a device so that the newcomer does not meet it."""
    ours, theirs = scene.newcomer.interface, row.interface
    if ours == theirs:
        return False
    if ours is not None and theirs is not None:
        return True
    # A device is one more to meet for a socket bound to none, unless it is (in) a VRF.
    return False if row.protocol == "udp" else negate(dict(scene.meeting).get(theirs or ours or 0))


def _may_be_overlooked(scene: BindScene, row: SocketFacts) -> bool:
    """Whether the kernel may not see this one: in a crowd, some only look at the wildcards."""
    return (
        row.protocol == "udp"
        and len(scene.occupants) > CROWD
        and _read(scene.newcomer.address).is_unspecified
        and not _read(row.address).is_unspecified
    )


def _shares_address(occupant: Occupant) -> bool | None:
    """Whether it lets in a newcomer that sets SO_REUSEADDR."""
    return False if occupant.row.state == "LISTEN" else _has_reuseaddr(occupant)


def _shares_port(scene: BindScene, occupant: Occupant) -> bool | None:
    """Whether it lets in a newcomer that sets SO_REUSEPORT."""
    row = occupant.row
    # Of what nobody holds any more the uid is not that of its owner.
    if row.inode is not None and row.uid != scene.newcomer.uid:
        return False
    return occupant.options.reuseport if occupant.options else None


# All of them ---------------------------------------------------------------------------------


def can_bind(scene: BindScene, reuse: Reuse = PLAIN) -> bool | None:
    """Whether the sockets that are there let the newcomer have the port.

    Args:
        reuse: The options that the newcomer sets.
    """
    pairs = ((one, meets(scene, one)) for one in scene.occupants)
    met = tuple((one, found) for one, found in pairs if found is not False)
    if scene.newcomer.protocol == "udp" and ReuseOption.REUSEPORT in reuse:
        return _can_share_udp(scene, met, reuse)
    alike = _read_alike(scene) if ReuseOption.REUSEPORT in reuse else frozenset()
    return negate(any_of(_is_blocked(scene, one, found, reuse, alike) for one, found in met))


def _is_blocked(
    scene: BindScene,
    occupant: Occupant,
    met: bool | None,
    reuse: Reuse,
    alike: frozenset[Alike],
) -> bool | None:
    shared = any_of(
        (
            ReuseOption.REUSEADDR in reuse and _shares_address(occupant),
            ReuseOption.REUSEPORT in reuse and _shares_port(scene, occupant),
        )
    )
    if shared is True:
        return False
    if met is None or shared is None:
        return None
    waved_in = any(_may_be_beside(scene, occupant, other) for other in alike)
    return None if waved_in else True


class Alike(NamedTuple):
    """What matters of a socket that the kernel may wave in the newcomer for the sake of.

    Attributes:
        family: Its own, inet6 for IPv4 in IPv6 too.
        version: Of the address in it.
    """

    interface: int | None
    family: str
    version: int
    reuseaddr: bool | None


def _read_alike(scene: BindScene) -> frozenset[Alike]:
    return frozenset(
        Alike(
            interface=one.row.interface,
            family=one.row.family,
            version=_read(one.row.address).version,
            reuseaddr=_has_reuseaddr(one),
        )
        for one in scene.occupants
        if _shares_port(scene, one) is not False
    )


def _may_be_beside(scene: BindScene, occupant: Occupant, other: Alike) -> bool:
    """Whether one like the newcomer, which the other is or comes from, can have been bound too.

    Beside what is in the newcomer's way: on another device, for the other family alone, or with
    SO_REUSEADDR on both.
    """
    row = occupant.row
    if other.interface is not None and row.interface not in (None, other.interface):
        return True
    dual = scene.newcomer.address == "::" and scene.newcomer.v6only is False
    address = _read(row.address)
    if dual and address.version != other.version:
        return True
    # A connection of a dual-stack socket is in the way of IPv4, and not of IPv4 in IPv6.
    single6 = address.version == 6 and not address.is_unspecified
    if scene.newcomer.v6only is None and single6 and (other.family, other.version) == ("inet6", 4):
        return True
    return _shares_address(occupant) is not False and other.reuseaddr is not False


def _has_reuseaddr(occupant: Occupant) -> bool | None:
    return occupant.options.reuseaddr if occupant.options else None


def _can_share_udp(
    scene: BindScene, met: Sequence[tuple[Occupant, bool | None]], reuse: Reuse
) -> bool | None:
    """The kernel's search ends at the first that shares the port, and the order is not known."""
    by_address = ReuseOption.REUSEADDR in reuse
    asked = [
        (found, _shares_port(scene, one), by_address and _shares_address(one))
        for one, found in met
    ]
    asked = [one for one in asked if one[2] is not True]
    if all(shares is True for _, shares, _ in asked):
        return True
    blocked = any(one == (True, False, False) for one in asked)
    return False if blocked and all(shares is False for _, shares, _ in asked) else None
