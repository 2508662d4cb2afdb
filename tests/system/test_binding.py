"""port --bind against the kernel: thousands of random binds, and the command on a real manager."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sdtool.model.sockets import Wanted
from sdtool.sources.copies import may_copy, read_options
from sdtool.sources.descriptors import Sweep, sees_all_descriptors
from sdtool.sources.sockets import read_sockets
from tests.system.bench import Client

ROOT = Path(__file__).parents[2]
COUNT = os.environ.get("SDTOOL_BIND_TRIALS", "3000")
SEED = os.environ.get("SDTOOL_BIND_SEED", "20240229")


AS_ROOT_OF_OURS = ("unshare", "--user", "--map-root-user")


@functools.cache
def is_possible(command: tuple[str, ...]) -> bool:
    """Whether something can be run so here."""
    return 0 == subprocess.run([*command, "true"], capture_output=True, check=False).returncode


def apart() -> tuple[str, ...]:
    """How to run something in a network namespace of its own; empty where that is forbidden."""
    ways = (("unshare", "--net"), (*AS_ROOT_OF_OURS, "--net"))
    return next(filter(is_possible, ways), ())


def run_trials(*command: str, **options: object) -> dict[str, Any]:
    """What came out of trials in a process of their own."""
    command += (sys.executable, "-m", "tests.system.bind_trials", "--seed", SEED)
    command += tuple(f"--{name}={value}" for name, value in options.items())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, f"seed {SEED}: {done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_random_bind_is_predicted_wrong(record_property: Any) -> None:
    """TCP and UDP, all addresses, options, users and states: with options known and without."""
    found = run_trials(*apart(), count=COUNT, place="own" if apart() else "shared")

    record_property("unknown", found["unknown"])
    assert (int(COUNT), []) == (found["trials"], found["examples"]), f"seed {SEED}"
    # As root nearly every verdict is known; without options what would help often is not.
    assert found["unknown"]["root plain"] < 0.05
    assert found["unknown"]["unprivileged plain"] < 0.1


def test_trials_come_out_the_same_on_the_machine_itself() -> None:
    """On its own loopback, with its devices and settings as they are."""
    found = run_trials(count=100, place="shared")
    assert (100, []) == (found["trials"], found["examples"]), f"seed {SEED}"


# Options -------------------------------------------------------------------------------------


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is to be closed at the end."""
    with ExitStack() as opened:
        yield opened


def bound(stack: ExitStack, address: str, port: int = 0, **options: int) -> socket.socket:
    """A TCP socket of this process with options by their names in the socket module."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = stack.enter_context(socket.socket(family))
    for name, value in options.items():
        level = socket.IPPROTO_IPV6 if name.startswith("IPV6") else socket.SOL_SOCKET
        made.setsockopt(level, getattr(socket, name), value)
    made.bind((address, port))
    return made


def inode_of(made: socket.socket) -> int:
    """The identity of a socket in /proc."""
    return os.fstat(made.fileno()).st_ino


@pytest.mark.capability("pidfd_getfd")
@pytest.mark.parametrize("reuseaddr", [0, 1])
@pytest.mark.parametrize("reuseport", [0, 1])
def test_options_of_a_holder_are_read(stack: ExitStack, reuseaddr: int, reuseport: int) -> None:
    """From a copy of its descriptor; only of the sockets that were asked for."""
    wanted = bound(stack, "::1", SO_REUSEADDR=reuseaddr, SO_REUSEPORT=reuseport)
    bound(stack, "127.0.0.1")

    scan = read_options(Sweep([os.getpid()]).find([inode_of(wanted)]))

    ((inode, options),) = scan.by_inode
    assert (inode_of(wanted), None) == (inode, scan.reason)
    assert (bool(reuseaddr), bool(reuseport)) == (options.reuseaddr, options.reuseport)
    assert options.v6only is True


@pytest.mark.capability("pidfd_getfd")
def test_copy_leaves_no_trace(stack: ExitStack) -> None:
    """The descriptor is closed at once, and a blocking socket is still one."""
    wanted = bound(stack, "127.0.0.1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.setdefaulttimeout(1.0)
    try:
        read_options([(os.getpid(), wanted.fileno(), inode_of(wanted))])
    finally:
        socket.setdefaulttimeout(None)
    assert before == len(list(Path("/proc/self/fd").iterdir()))
    assert os.get_blocking(wanted.fileno())


def test_socket_that_is_gone_has_no_options() -> None:
    """Neither has one that its holder has closed meanwhile: both are simply not there."""
    for pid, fd in ((os.getpid(), 2**19), (os.getpid(), 0), (2**22 + 1, 0)):
        scan = read_options([(pid, fd, 1)])
        assert ((), None) == (scan.by_inode, scan.reason)


@pytest.mark.capability("root")
@pytest.mark.capability("pidfd_getfd")
def test_bound_sockets_are_found_without_the_kernel_listing_them(stack: ExitStack) -> None:
    """The look through descriptors finds what newer kernels list, with the same facts."""
    first = bound(stack, "127.0.0.1")
    port = first.getsockname()[1]
    bound(stack, "::1", port)

    listed = [row for row in read_sockets(Wanted(protocols=("tcp",), port=port)) if row.inode]
    sweep = Sweep([os.getpid()])
    with sweep.look_closer({row.inode or 0 for row in listed}, ()) as closer:
        found = closer.sockets

    facts = ("family", "address", "port", "state", "inode", "uid", "v6only", "netns", "interface")
    expected = {tuple(getattr(row, name) for name in facts) for row in listed}
    assert 2 == len(expected)
    assert expected == {tuple(getattr(row, name) for name in facts) for row in found}


OLDER_KERNEL = """
import sys
from sdtool.cli import main
from sdtool.sources import sockets
sockets.ALL_STATES &= ~sockets.STATE_BOUND
sockets.STATE_BOUND = 0
sys.exit(main(sys.argv[1:]))
"""
"""The kernel lists bound sockets only to those who ask for them by that bit."""


def ask_older(spec: str) -> dict[str, Any]:
    """The answer where the kernel lists no sockets that are bound and do not listen."""
    command = [sys.executable, "-c", OLDER_KERNEL, "port", "--bind", spec, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (answer,) = json.loads(done.stdout)["data"]
    return dict(answer)


@pytest.mark.capability("root")
@pytest.mark.capability("pidfd_getfd")
def test_older_kernel_hides_no_owner(stack: ExitStack) -> None:
    """Who has bound a port without listening owns it there too."""
    port = bound(stack, "127.0.0.1").getsockname()[1]
    command = [sys.executable, "-c", OLDER_KERNEL, "port", f"{port}/tcp", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    (entry,) = json.loads(done.stdout)["data"]

    assert "owned" == entry["verdict"]
    assert ["BOUND"] == [owner["socket"]["state"] for owner in entry["owners"]]
    assert {os.getpid()} == {h["pid"] for owner in entry["owners"] for h in owner["holders"]}


@pytest.mark.capability("root")
@pytest.mark.capability("pidfd_getfd")
def test_older_kernel_needs_a_look_at_descriptors(stack: ExitStack) -> None:
    """Root finds who has the port without listening; the option that helps is known too."""
    port = bound(stack, "127.0.0.1", SO_REUSEADDR=1).getsockname()[1]

    answer = ask_older(f"0.0.0.0:{port}")

    assert ["BOUND"] == [entry["socket"]["state"] for entry in answer["conflicts"]]
    (holder,) = answer["conflicts"][0]["socket"]["holders"]
    assert os.getpid() == holder["pid"]
    assert "no" == answer["verdict"]


def test_older_kernel_makes_a_yes_unknown_where_descriptors_are_hidden() -> None:
    """It is a yes only where every process there is can be looked into."""
    answer = ask_older("127.0.0.1:18099")
    if not Sweep([]).outside and sees_all_descriptors() and may_copy():
        assert "yes" == answer["verdict"]
    else:
        assert "unknown" == answer["verdict"]
        assert "this kernel does not list TCP sockets" in answer["verdict_reason"]


# The command ---------------------------------------------------------------------------------


def ask(client: Client, *specs: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status and the answers of port --bind."""
    options = [word for spec in specs for word in ("--bind", spec)]
    arguments = ["port", *options]
    done = client(*arguments, "--json")
    return done.returncode, json.loads(done.stdout)["data"]


def test_port_of_a_unit_is_refused_with_its_name(sdtool: Client, systemctl: Client) -> None:
    """The unit that listens is in the way, on its address and on all that have it in them."""
    systemctl("start", "sdtool-graceful")

    status, answers = ask(
        sdtool, "127.0.0.1:18080", "*:18080", "[::1]:18080", "127.0.0.1:18080/udp"
    )

    assert 1 == status
    assert ["no", "no", "yes", "yes"] == [answer["verdict"] for answer in answers]
    (conflict,) = answers[0]["conflicts"]
    assert "sdtool-graceful.service" == conflict["unit"]
    assert "LISTEN" == conflict["socket"]["state"]
    assert answers[0]["verdict_reason"].startswith("EADDRINUSE: ")
    assert None is answers[0]["needs"]


def test_free_port_can_be_bound(sdtool: Client) -> None:
    """Exit 0, and nothing is needed."""
    status, (answer,) = ask(sdtool, "127.0.0.1:18099")
    assert (0, "yes", [], None, []) == (
        status,
        answer["verdict"],
        answer["needs"],
        answer["needs_reason"],
        answer["conflicts"],
    )


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket, int]:
    """A connection to a server that had SO_REUSEADDR and is gone: (child, client, port)."""
    server = bound(stack, "127.0.0.1", SO_REUSEADDR=1)
    server.listen()
    client = stack.enter_context(socket.create_connection(server.getsockname()))
    child = stack.enter_context(server.accept()[0])
    server.close()
    return child, client, child.getsockname()[1]


def test_connection_that_is_left_over_needs_reuseaddr(sdtool: Client, stack: ExitStack) -> None:
    """Its child has inherited the option: a plain bind fails, and with the option one succeeds."""
    _, _, port = connected(stack)

    status, (answer,) = ask(sdtool, f"0.0.0.0:{port}")

    assert (1, "no") == (status, answer["verdict"])
    assert ["ESTABLISHED"] == [entry["socket"]["state"] for entry in answer["conflicts"]]
    assert ["SO_REUSEADDR"] == answer["needs"] or "may not be read" in answer["needs_reason"]
    with pytest.raises(OSError, match="in use"):
        bound(stack, "0.0.0.0", port)
    bound(stack, "0.0.0.0", port, SO_REUSEADDR=1)


def test_time_wait_is_in_the_way_for_a_while(sdtool: Client, stack: ExitStack) -> None:
    """Nobody holds it, so what would help is not known; it says until when, and with whom."""
    child, client, port = connected(stack)
    peer = client.getsockname()[1]
    child.close()
    client.close()

    status, (answer,) = ask(sdtool, f"127.0.0.1:{port}")

    assert (1, "no", None) == (status, answer["verdict"], answer["needs"])
    assert "SO_REUSEADDR helps if" in answer["needs_reason"]
    (conflict,) = answer["conflicts"]
    assert ("TIME_WAIT", None) == (conflict["socket"]["state"], conflict["unit"])
    assert f"127.0.0.1:{peer}" == conflict["peer"]
    assert 0 < conflict["expires_us"] <= 60_000_000


def test_address_of_others_is_refused(sdtool: Client) -> None:
    """An address of the documentation's own network (RFC 5737), and a device that is not there."""
    status, answers = ask(sdtool, "192.0.2.1:18099", "[fe80::1%sdtool-none]:18099", "[fe80::1]:1")
    assert 1 == status
    reasons = [answer["verdict_reason"].partition(":")[0] for answer in answers]
    assert ["EADDRNOTAVAIL", "ENODEV", "EINVAL"] == reasons


TRY_PORT = """
import socket
from sdtool.sources.binding import read_port_permission
predicted = read_port_permission(89).permitted
try:
    socket.socket().bind(("", 89))
    print(predicted, True)
except PermissionError:
    print(predicted, False)
"""


@pytest.mark.parametrize(
    "way", [(), AS_ROOT_OF_OURS, (*AS_ROOT_OF_OURS, "--net"), ("setpriv", "--bounding-set=-all")]
)
def test_low_port_is_permitted_as_the_kernel_has_it(way: tuple[str, ...]) -> None:
    """A capability counts in the user namespace that the network namespace belongs to."""
    command = [*(way if is_possible(way) else ()), sys.executable, "-c", TRY_PORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    predicted, succeeded = done.stdout.split()
    assert succeeded == predicted


@pytest.mark.capability("root")
def test_other_user_may_not_bind_low_ports(sdtool: Client, sdtool_as_nobody: Client) -> None:
    """The capability and the sysctl that it is about are named; root may."""
    status, (answer,) = ask(sdtool_as_nobody, "127.0.0.1:89")
    assert (1, "no") == (status, answer["verdict"])
    assert answer["verdict_reason"].startswith("EACCES: ports below 1024 need CAP_NET_BIND_SERV")
    status, (answer,) = ask(sdtool, "127.0.0.1:89")
    assert (0, "yes") == (status, answer["verdict"])


@pytest.mark.capability("root")
def test_other_user_gets_the_same_verdicts(sdtool_as_nobody: Client, systemctl: Client) -> None:
    """Options are hidden, and a verdict needs none; of another user's listener none would help."""
    systemctl("start", "sdtool-graceful")

    status, answers = ask(sdtool_as_nobody, "127.0.0.1:18080", "[::1]:18080")

    assert 1 == status
    assert ["no", "yes"] == [answer["verdict"] for answer in answers]
    assert answers[0]["needs_reason"].endswith("this one is of uid 0")
