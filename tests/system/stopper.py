r"""Be the processes of a unit that is going to be stopped, and log what happens to each.

usage: stopper.py PROCESS...

The first PROCESS is the main one, the others are its children: "NAME: STEP STEP ...". NAME is
also the process's comm. What is logged goes to standard output, with one write a line:
"MICROSECONDS PID WHAT", by CLOCK_MONOTONIC. Once every process is in its place READY=1 is said,
and "ready" logged.

SIGNAL=ACTION says what a process does on TERM, HUP, ...; without one it does what the kernel does:

- exit:CODE, after:SECONDS (then exit 0), stay: a handler that does that
- ignore, block: the signal is ignored, or blocked for good
- signalfd, sigwait: it is blocked, and read there; then exit 0
- wait, term, kill: wait for the children, after SIGTERM or SIGKILL to them; then exit 0
- fork:NUMBER, quit:NUMBER, exec:NUMBER: one after the other so many children that stay for 0.1 s
  and exit 7, exit 7 at once, or become another program; then exit 0
- again:NUMBER: one after the other so many children with one pid, that exit 1, 2, ...; then exit 0
- close:SECONDS: close the port, and exit 0 that much later
- extend:SECONDS: ask the manager for more time, and exit 0 that much later

Other steps: port=NUMBER listens on it at 127.0.0.1, threads=NUMBER has so many more threads,
crowd=NUMBER has so many children that die by any signal, stopped is a process that SIGSTOP has
stopped, leave ends the main thread while another one does as "sigwait".

Only the standard library, Python 3.9 or later.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)

SYS_CLONE3 = 435

READY = b"\n"

listening = []
children = []


def log(what):
    """Write one line, whoever else writes."""
    now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    os.write(1, f"{now_us} {os.getpid()} {what}\n".encode())


def end(code):
    """Exit, and nothing else."""
    log(f"exits {code}")
    os._exit(code)


def last(seconds):
    """Take so long."""
    select.select((), (), (), seconds)


def notify(text):
    """Send one message to the service manager, as sd_notify(3) does; none without a manager."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            manager.send(text.encode())


def number_of(name):
    """The number of a signal named without its SIG."""
    return getattr(signal, f"SIG{name}")


# What a process does on a signal ---------------------------------------------------------------


def wait_for(pids):
    """Reap children in their order."""
    for pid in pids:
        os.waitpid(pid, 0)
        log(f"reaped {pid}")


def end_children(name):
    """Send a signal to every child."""
    for pid in children:
        os.kill(pid, number_of(name))


def bear(value, live):
    """Have children, one after the other; they are no part of what signals are about."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for _ in range(int(value)):
        pid = os.fork()
        if pid == 0:
            live()
        log(f"bore {pid}")
        os.waitpid(pid, 0)


def fork_as(pid):
    """Fork a child that gets this pid, which is free; see clone3(2), set_tid.

    Of struct clone_args exit_signal, set_tid and set_tid_size are filled in.
    """
    wanted = ctypes.c_int(pid)
    fields = (0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    arguments = (ctypes.c_uint64 * len(fields))(*fields)
    made = LIBC.syscall(SYS_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments))
    if made < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return made


def come_again(value):
    """Have children that have the same pid, one after the other, a few clock ticks apart.

    The manager signals those that are born meanwhile too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = 0
    for code in range(1, int(value) + 1):
        pid = fork_as(child) if child else os.fork()
        if pid == 0:
            last(0.03)
            os._exit(code)
        child = pid
        log(f"bore {pid}")
        os.waitpid(pid, 0)


def stay_a_while():
    """Be a child that is there for a moment."""
    last(0.1)
    os._exit(7)


def close_port(value):
    """Close what listens, and stay a little."""
    for sock in listening:
        sock.close()
    log("closed")
    last(float(value))


def extend(value):
    """Ask for more time than is left, and use it."""
    seconds = float(value)
    notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 2_000_000)}")
    last(seconds)


def act(name, action, value):
    """Do what the process does on a signal; some of it does not return."""
    log(f"got SIG{name}")
    if action == "stay":
        return
    if action == "exit":
        end(int(value))
    elif action == "after":
        last(float(value))
    elif action in ("term", "kill"):
        end_children(action.upper())
    actions = {
        "fork": lambda: bear(value, stay_a_while),
        "quit": lambda: bear(value, lambda: os._exit(7)),
        "exec": lambda: bear(value, lambda: os.execv("/bin/true", ["true"])),
        "again": lambda: come_again(value),
        "close": lambda: close_port(value),
        "extend": lambda: extend(value),
    }
    actions.get(action, lambda: None)()
    if action in ("wait", "term", "kill"):
        wait_for(children)
    end(0)


def read_signalfd(number):
    """Wait until a signal is read from a signalfd."""
    mask = (ctypes.c_ulong * 16)(1 << (number - 1))
    descriptor = LIBC.signalfd(-1, ctypes.byref(mask), 0)
    return lambda: os.read(descriptor, 128)


def prepare(step):
    """Have it said what a signal does; what has to be called to wait for it, or None."""
    name, _, action = step.partition("=")
    action, _, value = action.partition(":")
    number = number_of(name)
    if action == "ignore":
        signal.signal(number, signal.SIG_IGN)
    elif action in ("block", "signalfd", "sigwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    else:
        signal.signal(number, lambda *_: act(name, action, value))
    if action not in ("signalfd", "sigwait"):
        return None
    wait = read_signalfd(number) if action == "signalfd" else lambda: signal.sigwait({number})
    return lambda: (wait(), act(name, "exit", 0))


# The processes ---------------------------------------------------------------------------------


def leave():
    """End the main thread alone: another one waits for SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def stay():
        signal.sigwait({signal.SIGTERM})
        act("TERM", "exit", 0)

    threading.Thread(target=stay).start()
    # It leaves nothing undone, for it does nothing more: not as at the end of a program.
    LIBC.pthread_exit(None)


def bear_crowd(number):
    """Have many children that know nothing of signals."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for _ in range(number):
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        children.append(pid)


def be(text, others, announce):
    """Be one process: take its steps, have its children, announce it, and stay."""
    name, _, steps = text.partition(":")
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 - pathlib is slow to import
        comm.write(name)
    log(f"is {name}")
    waits = []
    for step in steps.split():
        word, _, value = step.partition("=")
        if word.isupper():
            waits.append(prepare(step))
        elif word == "port":
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", int(value)))
            sock.listen()
            listening.append(sock)
        elif word == "threads":
            for _ in range(int(value)):
                threading.Thread(target=threading.Event().wait).start()
        elif word == "crowd":
            bear_crowd(int(value))
    for other in others:
        children.append(have_child(other))
    if "stopped" in steps.split():
        os.kill(os.getpid(), signal.SIGSTOP)  # its parent sees that
    else:
        announce()
    if "leave" in steps.split():
        leave()
    for wait in filter(None, waits):
        wait()
    while True:
        signal.pause()


def have_child(text):
    """Have one child, and wait until it is in its place."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        be_child(text, writer)
    os.close(writer)
    if "stopped" in text.split():
        os.waitpid(pid, os.WUNTRACED)
    else:
        assert READY == os.read(reader, 1), f"{text} has not come to its place"
    os.close(reader)
    return pid


def be_child(text, writer):
    """Be a child: it inherits nothing of what its parent does on signals."""
    del children[:]
    while listening:
        listening.pop().close()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    be(text, (), lambda: os.write(writer, READY))


def main(first, *others):
    """Be the main process, with its children."""
    be(first, others, lambda: (notify("READY=1"), log("ready")))


if __name__ == "__main__":
    main(*sys.argv[1:])
