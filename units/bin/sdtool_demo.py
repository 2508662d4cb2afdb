"""What the demo payloads share: the notify protocol of systemd, listeners, signals.

Only the standard library, Python 3.9 or later. Payloads tell systemd that they are ready
(sd_notify(3)) once everything they promise is in place, so that a started unit has its
sockets bound, its children running and its signal handlers set.
"""

import errno
import os
import pathlib
import select
import signal
import socket


def notify(text):
    """Send one message to the service manager, as sd_notify(3) does; none without a manager."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract name
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(text.encode(), address)


def listen(address):
    """Open a socket for an "ADDRESS:PORT/PROTOCOL", "[::1]:8080/tcp" for example."""
    host_port, _, protocol = address.partition("/")
    host, _, port = host_port.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        # For UDP it would let two sockets share the port, which hides the clash.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), int(port)))
    except OSError as error:
        raise OSError(error.errno, f"{address}: {error.strerror}") from None
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def listen_where_possible(addresses):
    """Open a socket for each address, without those of a protocol this machine has not."""
    sockets = []
    for address in addresses:
        try:
            sockets.append(listen(address))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return sockets


def rename(comm):
    """Give this process a name of its own in `ps`, at most 15 characters."""
    pathlib.Path("/proc/self/comm").write_text(comm)


def await_term():
    """Wait for SIGTERM, handled and not ignored; other signals keep their meaning."""
    reader, writer = os.pipe()
    signal.signal(signal.SIGTERM, lambda number, frame: os.write(writer, b"T"))
    notify("READY=1")
    select.select([reader], [], [])
