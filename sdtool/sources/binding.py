"""What a socket of our own meets: whether an address, a port, a device may be bound.

Everything here is found out with sockets that ask for no port in particular, and that are closed
before anybody else is looked at: what was asked about is never taken. A security module, a BPF
program or a SocketBindDeny= that is about a single port is not seen so.

Source: ip(7), ipv6(7), capabilities(7), ioctl_ns(2), Documentation/networking/ip-sysctl.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterable

from sdtool.errors import Unavailable
from sdtool.model.binding import BindSpec, Newcomer, PortPermission
from sdtool.model.sockets import Wanted, Which
from sdtool.sources.copies import SO_BINDTOIFINDEX
from sdtool.sources.processes import read_capabilities
from sdtool.sources.sockets import read_sockets

NS_GET_USERNS = 0xB701
CAP_NET_BIND_SERVICE = 10

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
SOCKET_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
SYSCTL = "net.ipv4.ip_unprivileged_port_start"
UNPRIVILEGED_PORTS = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


# The address ---------------------------------------------------------------------------------


def read_newcomer(spec: BindSpec) -> Newcomer:
    """What becomes of a socket bound to the address, with a port of the kernel's choice.

    Raises:
        Unavailable: No socket can be made just now, whatever the address.
    """
    family = socket.AF_INET6 if ":" in spec.address else socket.AF_INET
    refusal, v6only, interface = None, None, None
    try:
        with socket.socket(family, SOCKET_KINDS[spec.protocol]) as ours:
            if spec.dual:
                ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            _bind(ours, spec)
            interface = ours.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) or None
            if family == socket.AF_INET6:
                v6only = bool(ours.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise Unavailable(f"No socket can be made to try it out: {error.strerror}.") from error
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
    try:
        if ours.family == socket.AF_INET:
            ours.bind((spec.address, 0))
        else:
            ours.bind((spec.address, 0, 0, _read_scope(spec.interface)))
    except OSError as error:
        # With no free port left for it, the address is good all the same.
        if error.errno != errno.EADDRINUSE:
            raise


def _read_scope(interface: str | None) -> int:
    if interface is None:
        return 0
    try:
        return int(interface) if interface.isdecimal() else socket.if_nametoindex(interface)
    except OSError as error:
        # Python gives no errno before 3.14.
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error


# The port ------------------------------------------------------------------------------------


def read_port_permission(port: int) -> PortPermission:
    """Whether we may bind this port, were it free: low ones need CAP_NET_BIND_SERVICE."""
    if _may_bind_low_ports():
        return PortPermission(permitted=True)
    try:
        with open(UNPRIVILEGED_PORTS, encoding="ascii") as file:
            start = int(file.read())
    except OSError:
        reason = f"{SYSCTL} may not be read: it says which ports need CAP_NET_BIND_SERVICE"
        return PortPermission(permitted=None, reason=reason)
    if port >= start:
        return PortPermission(permitted=True)
    reason = f"ports below {start} need CAP_NET_BIND_SERVICE ({SYSCTL})"
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


# Devices -------------------------------------------------------------------------------------


def read_meeting(devices: Iterable[int]) -> tuple[tuple[int, bool | None], ...]:
    """(index, whether a TCP socket bound to that device meets one bound to none), for each.

    With net.ipv4.tcp_l3mdev_accept=0 a VRF and its devices have ports of their own.
    """
    return tuple((device, _meets(device)) for device in sorted(set(devices)))


def _meets(device: int) -> bool | None:
    with socket.socket() as bound, socket.socket() as free:
        try:
            bound.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, device)
            bound.bind(("", 0))
        except OSError:
            return None
        try:
            free.bind(bound.getsockname())
        except OSError:
            return True
    return False


def shows_bound_sockets() -> bool:
    """Whether sock_diag has TCP sockets that are bound and do not listen (since Linux 6.8)."""
    with socket.socket() as ours:
        ours.bind(("", 0))
        inode = os.fstat(ours.fileno()).st_ino
        wanted = Wanted(protocols=("tcp",), port=ours.getsockname()[1], which=Which.OWNING)
        return any(row.inode == inode for row in read_sockets(wanted))
