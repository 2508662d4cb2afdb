r"""Make the situation that the arguments ask for, say READY=1 to systemd, and stay in it.

usage: payload.py STEP...

Steps are done in their order. ADDRESS is "127.0.0.1:80" or "[::]:80"; a NAME or TEXT may have
escapes, "\n" or "\xff".

- tcp=ADDRESS, udp=ADDRESS, mptcp=ADDRESS: listen; "+bound" behind the word only binds, "+v6only"
  and "+reuseport" set that option: tcp+bound+reuseport=[::]:80
- stream=NAME, dgram=NAME, seqpacket=NAME: a unix socket, a path or "@abstract"
- many=NUMBER:PORT: that many TCP listeners on one port, each on an address of its own
- connect=ADDRESS, connect=SOURCE>ADDRESS: make a connection and keep it
- accept: accept one connection of the last listener and keep it
- close=listening, close=accepted, close=connected: close what there is of that
- fork=NUMBER: children that hold everything so far
- netns=new, netns=user (and a new user namespace), netns=PATH, netns=back; the number of the
  namespace is then the unit's StatusText
- cgroup=NAME: move to a cgroup below our own; cgroup=back: move back, and remove it
- comm=TEXT: the process's name; argv=TEXT: its command line, words separated by spaces
- store: put what listens into the manager's fd store
- give=NAME, take=NAME: pass on what listens, to whoever comes and asks at that unix socket
- storm=NUMBER: from READY=1 on children come and go, each in a namespace with a socket of its own
- daemon: go to the background, ready when our parent ends
- leave: after READY=1 the main thread ends, and another one stays

Only the standard library, Python 3.9 or later.
"""

import array
import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
IPPROTO_MPTCP = 262

LIBC = ctypes.CDLL(None, use_errno=True)
HOME = os.open("/proc/self/ns/net", os.O_RDONLY)

listening = []
accepted = []
connected = []
door = []
storms = []


def notify(text, *descriptors):
    """Send one message to the service manager, as sd_notify(3) does; none without a manager."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            send_descriptors(manager, text.encode(), descriptors)


def send_descriptors(through, message, descriptors):
    """Send bytes, and descriptors with them."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    through.sendmsg([message], rights if descriptors else [])


def check(result):
    """Raise what a call of libc has failed with."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def unescape(text):
    """Bytes of a text with escapes."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1")


def parse(address):
    """(family, (host, port)) of an ADDRESS."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return family, (host.strip("[]"), int(port))


def listen(protocol, flags, address):
    """Bind a socket of the internet, and listen."""
    family, place = parse(address)
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(family, kind, IPPROTO_MPTCP if protocol == "mptcp" else 0)
    if "v6only" in flags:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if "reuseport" in flags:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(place)
    if protocol != "udp" and "bound" not in flags:
        sock.listen()
    listening.append(sock)


def listen_unix(kind, name):
    """Bind a unix socket, and listen unless it is for datagrams."""
    sock = socket.socket(socket.AF_UNIX, getattr(socket, "SOCK_" + kind.upper()))
    sock.bind(unix_address(name))
    if kind != "dgram":
        sock.listen()
    listening.append(sock)


def unix_address(name):
    """The bytes that stand for a NAME; an abstract one begins with a zero."""
    raw = unescape(name)
    return b"\0" + raw[1:] if raw.startswith(b"@") else raw


def listen_often(text):
    """Listen on one port of many addresses of the loopback."""
    number, port = map(int, text.split(":"))
    for index in range(number):
        listen("tcp", (), f"127.1.{index // 250}.{index % 250 + 1}:{port}")


def connect(text):
    """Connect from a source, if there is one, to an address."""
    source, _, target = text.rpartition(">")
    family, place = parse(target)
    sock = socket.socket(family, socket.SOCK_STREAM)
    if source:
        sock.bind(parse(source)[1])
    sock.connect(place)
    connected.append(sock)


def close(which):
    """Close all of one list."""
    sockets = {"listening": listening, "accepted": accepted, "connected": connected}[which]
    while sockets:
        sockets.pop().close()


def fork(number):
    """Fork children that only stay."""
    for _ in range(number):
        if os.fork() == 0:
            stay()


def enter(where):
    """Go to another network namespace, a new one maybe, or back."""
    if where in ("new", "user"):
        check(LIBC.unshare(CLONE_NEWNET | (CLONE_NEWUSER if where == "user" else 0)))
    else:
        namespace = HOME if where == "back" else os.open(where, os.O_RDONLY)
        check(LIBC.setns(namespace, CLONE_NEWNET))
    if where != "back":
        notify(f"STATUS={Path('/proc/self/ns/net').stat().st_ino}")


def move(name):
    """Go to a new cgroup below our own, or back from it; then it is gone."""
    path = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
    own = Path("/sys/fs/cgroup", path.lstrip("/"))
    if name == "back":
        (own.parent / "cgroup.procs").write_text("0")
        own.rmdir()
    else:
        (own / name).mkdir()
        (own / name / "cgroup.procs").write_text("0")


def wear(text, step):
    """Have another command line: once more begun with one as long, which is then overwritten."""
    wanted = text.replace(" ", "\0").encode() + b"\0"
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if end - start == len(wanted):
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(wanted)
        return
    plain = [sys.executable, "-B", os.path.realpath(__file__)]
    room = len(wanted) - len("\0".join(plain)) - 2
    steps = "\t".join(sys.argv[sys.argv.index(step) :])
    os.execve(sys.executable, [*plain, "x" * room], {**os.environ, "STEPS": steps})


def give(name):
    """Open a door where what listens is given away, once we are ready."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(unix_address(name))
    sock.listen()
    door.append(sock)


def take(name):
    """Get what is given away at a door."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(unix_address(name))
        _, ((_, _, data),), _, _ = sock.recvmsg(1, 1024)
    listening.extend(socket.socket(fileno=fd) for fd in array.array("i", data))


def go_to_background():
    """Have our parent wait until its child is ready, and end."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(os.read(reader, 1) != b"R")
    os.close(reader)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return writer


def come_and_go():
    """Be a storm: a child is born, has a namespace and a socket of its own, and dies."""
    privileged = os.geteuid() == 0
    while True:
        if os.fork() == 0:
            check(LIBC.unshare(CLONE_NEWNET | (0 if privileged else CLONE_NEWUSER)))
            with socket.socket() as sock:
                sock.bind(("0.0.0.0", 0))
                sock.listen()
            os._exit(0)
        os.wait()


def leave():
    """End the main thread alone: of the process stays what another thread keeps."""
    threading.Thread(target=stay).start()
    # It leaves nothing undone, for it does nothing more: not as at the end of a program.
    LIBC.pthread_exit(None)


def stay():
    """Give away what is asked for, until we are killed."""
    while door:
        visitor, _ = door[0].accept()
        with visitor:
            send_descriptors(visitor, b"x", [sock.fileno() for sock in listening])
    while True:
        signal.pause()


def do(step):
    """Do one step."""
    word, _, value = step.partition("=")
    name, *flags = word.split("+")
    if name in ("tcp", "udp", "mptcp"):
        listen(name, flags, value)
    elif name in ("stream", "dgram", "seqpacket"):
        listen_unix(name, value)
    elif name == "accept":
        accepted.append(listening[-1].accept()[0])
    elif name == "store":
        notify("FDSTORE=1\nFDNAME=kept", *(sock.fileno() for sock in listening))
    elif name == "fork":
        fork(int(value))
    elif name == "comm":
        Path("/proc/self/comm").write_bytes(unescape(value))
    elif name == "argv":
        wear(value, step)
    elif name == "storm":
        storms.append(int(value))
    else:
        steps = {"many": listen_often, "connect": connect, "close": close, "netns": enter}
        {**steps, "cgroup": move, "give": give, "take": take}[name](value)


def main(steps):
    """Do all steps, say that we are ready, and stay."""
    ready = go_to_background() if "daemon" in steps else None
    for step in steps:
        if step not in ("daemon", "leave"):
            do(step)
    notify("READY=1")
    if ready is not None:
        os.write(ready, b"R")
    for _ in range(sum(storms)):
        if os.fork() == 0:
            come_and_go()
    if "leave" in steps:
        leave()
    stay()


if __name__ == "__main__":
    kept = os.environ.pop("STEPS", None)
    main(sys.argv[1:] if kept is None else kept.split("\t"))
