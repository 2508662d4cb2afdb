"""What a socket of our own meets: whether an address, a port, a device may be bound.

Everything here is found out with sockets that ask for no port in particular. The address is tried
out without any port; where it takes one (a device, what the kernel lists), and the kernel's choice
is the very port that was asked about, that one is given back at once for another. All are closed
before anybody else is looked at.

What decides about single ports is so not seen: SELinux, Landlock, BPF programs of others than
systemd. Of systemd's (SocketBindDeny=) its manager tells the rules.

Source: ip(7), ipv6(7), capabilities(7), ioctl_ns(2), Documentation/networking/ip-sysctl.rst;
systemd.resource-control(5) for SocketBindAllow=.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator, Sequence

from sdtool.errors import Unavailable
from sdtool.model.binding import BindSpec, Newcomer, PortPermission, PortRule
from sdtool.model.sockets import SocketFilter, SocketStates
from sdtool.sources.copies import SO_BINDTOIFINDEX
from sdtool.sources.processes import read_capabilities
from sdtool.sources.sockets import read_sockets

NS_GET_USERNS = 0xB701
IP_BIND_ADDRESS_NO_PORT = 24
CAP_NET_BIND_SERVICE = 10

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
SOCKET_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FAMILIES = {int(socket.AF_INET): "inet", int(socket.AF_INET6): "inet6"}
PROTOCOLS = {int(socket.IPPROTO_TCP): "tcp", int(socket.IPPROTO_UDP): "udp"}
SYSCTL = "net.ipv4.ip_unprivileged_port_start"
UNPRIVILEGED_PORTS = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


@contextlib.contextmanager
def tell_exhaustion() -> Iterator[None]:
    """Say that nothing can be tried out where there are no more descriptors, or no memory.

    Raises:
        Unavailable: In place of that OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        raise Unavailable(f"No socket can be made to try it out: {error.strerror}.") from error


# The address ---------------------------------------------------------------------------------


@tell_exhaustion()
def read_newcomer(spec: BindSpec) -> Newcomer:
    """What becomes of a socket bound to the address, with no port.

    Raises:
        Unavailable: No socket can be made just now, whatever the address.
    """
    family = socket.AF_INET6 if ":" in spec.address else socket.AF_INET
    refusal, v6only, interface = None, None, None
    try:
        with socket.socket(family, SOCKET_KINDS[spec.protocol]) as ours:
            if spec.dual:
                ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # The kernel is to choose no port: it may have none left, or choose the one asked for.
            ours.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            _bind(ours, spec)
            interface = ours.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) or None
            if family == socket.AF_INET6:
                v6only = bool(ours.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        refusal = errno.errorcode.get(error.errno or 0, str(error))
    return Newcomer(
        address=spec.address,
        protocol=spec.protocol,
        refusal=refusal,
        v6only=v6only,
        interface=interface,
        uid=os.geteuid(),
    )


def _bind(ours: socket.socket, spec: BindSpec) -> None:
    if ours.family == socket.AF_INET:
        ours.bind((spec.address, 0))
    else:
        ours.bind((spec.address, 0, 0, _read_scope(spec.interface)))


def _read_scope(interface: str | None) -> int:
    if interface is None:
        return 0
    try:
        if not (interface.isascii() and interface.isdecimal()):
            return socket.if_nametoindex(interface)
        index = int(interface)
        if index >= 1 << 32:
            raise OverflowError  # Python would cut it to the index of another device
        return index
    except (OSError, ValueError, OverflowError) as error:
        # Python gives no errno before 3.14.
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error


# The port ------------------------------------------------------------------------------------


@tell_exhaustion()
def read_port_permission(port: int) -> PortPermission:
    """Whether we may bind this port, were it free: low ones need CAP_NET_BIND_SERVICE."""
    if _may_bind_low_ports():
        return PortPermission(permitted=True)
    try:
        with open(UNPRIVILEGED_PORTS, "rb") as file:
            start = int(file.read())
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        reason = f"{SYSCTL} may not be read: it says which ports need CAP_NET_BIND_SERVICE"
        return PortPermission(permitted=None, reason=reason)
    if port >= start:
        return PortPermission(permitted=True)
    reason = f"EACCES: ports below {start} need CAP_NET_BIND_SERVICE ({SYSCTL})"
    return PortPermission(permitted=False, reason=reason)


def _may_bind_low_ports() -> bool:
    """Whether we have the capability in the user namespace that owns our network namespace."""
    if CAP_NET_BIND_SERVICE not in read_capabilities():
        return False
    with open("/proc/self/ns/net", "rb") as namespace:
        try:
            os.close(fcntl.ioctl(namespace, NS_GET_USERNS))
        except PermissionError:
            # The owner is above us: to it our capabilities are nothing.
            return False
    return True


def parse_port_rules(value: Iterable[Sequence[int]]) -> tuple[PortRule, ...]:
    """SocketBindAllow= or SocketBindDeny= as D-Bus has it: (family, protocol, number, first).

    A family or protocol of 0 is any, and a number of 0 is all ports.
    """
    return tuple(
        PortRule(
            family=FAMILIES.get(family),
            protocol=PROTOCOLS.get(protocol),
            first=first if number else 0,
            last=first + number - 1 if number else 0xFFFF,
        )
        for family, protocol, number, first in value
    )


# Devices -------------------------------------------------------------------------------------


@tell_exhaustion()
def read_meeting(devices: Iterable[int], spared: int) -> tuple[tuple[int, bool | None], ...]:
    """(index, whether a TCP socket bound to that device meets one bound to none), for each.

    With net.ipv4.tcp_l3mdev_accept=0 a VRF and its devices have ports of their own.

    Args:
        spared: The port that is asked about: another one is tried out.
    """
    return tuple((device, _meets(device, spared)) for device in sorted(set(devices)))


def _meets(device: int, spared: int) -> bool | None:
    with contextlib.ExitStack() as opened:
        try:
            bound = _bind_any(opened, spared, device=device)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            return None
        free = opened.enter_context(socket.socket())
        try:
            free.bind(bound.getsockname())
        except OSError as error:
            return True if error.errno == errno.EADDRINUSE else None
    return False


@tell_exhaustion()
def shows_bound_sockets(spec: BindSpec) -> bool | None:
    """Whether sock_diag has TCP sockets that are bound and do not listen (since Linux 6.8).

    Args:
        spec: What is asked about: a socket of its family on another port is tried out.

    Returns:
        None where none may be bound to see it.
    """
    family = socket.AF_INET6 if ":" in spec.address else socket.AF_INET
    with contextlib.ExitStack() as opened:
        try:
            ours = _bind_any(opened, spec.port, family=family)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            return None
        inode = os.fstat(ours.fileno()).st_ino
        wanted = SocketFilter(
            protocols=("tcp",), port=ours.getsockname()[1], states=SocketStates.OWNING
        )
        return any(row.inode == inode for row in read_sockets(wanted))


def _bind_any(
    opened: contextlib.ExitStack,
    spared: int,
    *,
    device: int = 0,
    family: socket.AddressFamily = socket.AF_INET,
) -> socket.socket:
    """A TCP socket on a port of the kernel's choice, but not on the one to be spared."""
    ours = opened.enter_context(socket.socket(family))
    if device:
        ours.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, device)
    ours.bind(("", 0))
    if ours.getsockname()[1] != spared:
        return ours
    # While it is taken the kernel chooses another.
    with ours:
        return _bind_any(opened, spared, device=device, family=family)
