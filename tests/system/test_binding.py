"""port --bind against the kernel: thousands of random binds, and the command on a real manager."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sdtool.model.sockets import SocketFilter
from sdtool.sources.copies import FILTERED, may_copy, read_options
from sdtool.sources.descriptors import Sweep, sees_all_descriptors
from sdtool.sources.sockets import read_sockets
from tests.system.bench import Client
from tests.system.situations import Situations

ROOT = Path(__file__).parents[2]
COUNT = os.environ.get("SDTOOL_BIND_TRIALS", "3000")
HOST_COUNT = os.environ.get("SDTOOL_BIND_HOST_TRIALS", "200")
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


Report = Callable[[str, object], None]


@pytest.fixture
def report(record_testsuite_property: Report) -> Report:
    """Say how many answers were unknown: in the report of the run, and on the terminal (-rP)."""

    def tell(lane: str, found: object) -> None:
        record_testsuite_property(f"unknown binds, {lane}", found)
        print(f"share of unknown binds, {lane}, seed {SEED}: {found}")  # noqa: T201

    return tell


def test_no_random_bind_is_predicted_wrong(report: Report) -> None:
    """TCP and UDP, all addresses, options, users and states: with options known and without."""
    found = run_trials(*apart(), count=COUNT, place="own" if apart() else "shared")

    report("by the rules", found["unknown"])
    assert (int(COUNT), []) == (found["trials"], found["examples"]), f"seed {SEED}"
    # As root nearly every verdict is known; without options what would help often is not.
    assert found["unknown"]["root plain"] < 0.05
    assert found["unknown"]["unprivileged plain"] < 0.1


def test_no_answer_of_the_library_is_wrong(report: Report) -> None:
    """All is read as for the command; low ports too, with and without CAP_NET_BIND_SERVICE."""
    place = "own" if apart() else "shared"
    found = run_trials(*apart(), count=HOST_COUNT, place=place, lane="host")

    report("by the library", found["unknown"])
    assert (int(HOST_COUNT), []) == (found["trials"], found["examples"]), f"seed {SEED}"
    assert found["asked"]["low port verdict"] > 0
    assert found["unknown"]["high port verdict"] < 0.1


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

    listed = [
        row for row in read_sockets(SocketFilter(protocols=("tcp",), port=port)) if row.inode
    ]
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


# Hard days -----------------------------------------------------------------------------------

FORBIDDING = """
import ctypes, errno, os, struct, sys

def forbid(call, code):
    # A filter as systemd's SystemCallFilter= makes it: seccomp(2), linux/filter.h.
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, call)]
    rules += [(0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in rules))
    library = ctypes.CDLL(None, use_errno=True)
    assert 0 == library.prctl(38, 1, 0, 0, 0)
    asked = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
    assert 0 == library.prctl(22, 2, asked), os.strerror(ctypes.get_errno())

def allow_one_port(port):
    # landlock(7): TCP binds to one port and no other. False where the kernel has none of it.
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(444, None, 0, 1) < 4:
        return False
    rules = library.syscall(444, struct.pack("QQ", 0, 1), 16, 0)
    assert 0 == library.syscall(445, rules, 2, struct.pack("QQ", 1, port), 0)
    assert 0 == library.prctl(38, 1, 0, 0, 0)
    assert 0 == library.syscall(446, rules, 0)
    return True
"""

MAIN = "\nfrom sdtool.cli import main; sys.exit(main(sys.argv[1:]))\n"


def run_python(
    code: str, *arguments: str, way: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    command = [*way, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def ask_after(preparation: str, spec: str, way: tuple[str, ...] = ()) -> dict[str, Any]:
    """The answer of port --bind in a process that has prepared itself."""
    done = run_python(FORBIDDING + preparation + MAIN, "port", "--bind", spec, "--json", way=way)
    assert done.returncode in (0, 1), done.stderr
    (answer,) = json.loads(done.stdout)["data"]
    return dict(answer)


def test_rule_about_ports_makes_no_answer_of_its_own() -> None:
    """Landlock lets through one port, and not to try out its address; some kernels lack it."""
    possible = run_python(f"{FORBIDDING}\nsys.exit(not allow_one_port(18098))").returncode == 0
    answer = ask_after("allow_one_port(18098)", "127.0.0.1:18098")
    if not possible:
        assert "yes" == answer["verdict"]
        return
    assert ("unknown", None) == (answer["verdict"], answer["needs"])
    assert answer["verdict_reason"].startswith("EACCES: a security module")


def test_family_that_is_forbidden_hides_nothing_from_the_other(situations: Situations) -> None:
    """Of IPv4 no socket can be made: IPv6 is tried out with its own."""
    families = "RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET6"
    question = ("port", "--bind", "127.0.0.1:18099", "--bind", "[::1]:18099")

    ours, other = situations.ask_from(*question, properties=[families])

    assert "no" == ours["verdict"]
    assert ours["verdict_reason"].startswith("EAFNOSUPPORT: ")
    assert "yes" == other["verdict"]


TRY_PORTS = """
import socket, sys
for port in map(int, sys.argv[1:]):
    with socket.socket() as made:
        try:
            made.bind(("127.0.0.1", port))
            print("yes")
        except PermissionError:
            print("no")
"""


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["SocketBindDeny=18098"], ["unknown", "yes"]),
        (["SocketBindDeny=any", "SocketBindAllow=18099"], ["unknown", "yes"]),
        (["SocketBindDeny=ipv6:18098", "SocketBindDeny=udp"], ["yes", "yes"]),
    ],
)
def test_rules_of_our_own_unit_are_weighed(
    situations: Situations, rules: list[str], expected: list[str]
) -> None:
    """What they are against is no yes, and where they are in force nothing else is wrong."""
    question = ("port", "--bind", "127.0.0.1:18098", "--bind", "127.0.0.1:18099")
    answers = situations.ask_from(*question, properties=rules)
    bound = situations.run(
        *("systemd-run", situations.flag, "--quiet", "--pipe", "--wait", "--collect"),
        *(f"--property={rule}" for rule in rules),
        *(sys.executable, "-c", TRY_PORTS, "18098", "18099"),
    ).split()

    verdicts = [answer["verdict"] for answer in answers]
    if "no" in bound and rules[0].endswith("any"):
        # In force: what is denied is a no, and of what is allowed the address cannot be tried out.
        expected = ["no", "unknown"]
    assert expected == verdicts
    assert all(said in (really, "unknown") for said, really in zip(verdicts, bound, strict=True))
    reasons = [one["verdict_reason"] for one in answers if one["verdict"] != "yes"]
    assert all("SocketBindDeny=" in reason for reason in reasons)


ONE_PORT = """
from pathlib import Path
Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
"""

SPARING = """
import socket
from sdtool.model.binding import BindSpec
from sdtool.sources.binding import read_newcomer, shows_bound_sockets
from tests.system.bind_trials import set_up
set_up("lo")
one, asked = (BindSpec(address="::1", port=port) for port in (1, 40000))
shown = [shows_bound_sockets(one), shows_bound_sockets(asked)]
taken = socket.socket(socket.AF_INET6)
taken.bind(("::", 40000))
shown.append(shows_bound_sockets(one))
newcomer = read_newcomer(one)
print(shown[0] is not None, *shown[1:], newcomer.refusal, newcomer.v6only)
"""


@pytest.mark.capability("namespaces")
def test_port_that_is_asked_about_is_spared() -> None:
    """Where the kernel has no other to give, nothing is tried out; an address needs none."""
    way = ("unshare", "--net")
    done = run_python(ONE_PORT + SPARING, way=way)
    assert ["True", "None", "None", "None", "True"] == done.stdout.split(), done.stderr
    # And the command as a whole, on a port beside the only one that the kernel gives.
    taken = f"import socket; taken = socket.socket(); taken.bind(('', 40000)){ONE_PORT}"
    answer = ask_after(f"\n{taken}", "0.0.0.0:18099", way)
    assert answer["verdict"] in ("yes", "unknown")


NO_DESCRIPTORS = """
import asyncio, contextlib, resource, socket, sys
from sdtool.errors import Unavailable
from sdtool.host import Host
from sdtool.host.binding import try_bind
from sdtool.host.session import Session
from sdtool.model.binding import BindSpec
from sdtool.model.scope import Scope

async def ask(spare):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(open("/dev/null"))
    for file in taken[:spare]:
        file.close()
    spec = BindSpec(address="127.0.0.1", port=server.getsockname()[1])
    try:
        return (await try_bind(Session(Scope.SYSTEM), spec)).verdict
    except Unavailable as error:
        return str(error)

server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, 62, socket.if_nametoindex("lo"))  # SO_BINDTOIFINDEX
server.bind(("127.0.0.1", 0))
server.listen()
print(asyncio.run(ask(int(sys.argv[1]))))
"""


@pytest.mark.parametrize("spare", range(7))
def test_lack_of_descriptors_is_said(spare: int) -> None:
    """Wherever it shows, with a socket of a device on the port too: no traceback, nor a yes."""
    done = run_python(NO_DESCRIPTORS, str(spare))
    assert 0 == done.returncode, done.stderr
    said = done.stdout.strip()
    assert said == "no" or "Too many open files" in said
    assert spare > 0 or said != "no"


COPYING = """
import os, socket
from sdtool.sources.copies import may_copy, read_options
forbid(434, errno.EPERM)
made = socket.socket()
held = os.getpid(), made.fileno(), os.fstat(made.fileno()).st_ino
print(may_copy(), read_options([held]).reason)
"""


def test_filter_of_system_calls_is_named() -> None:
    """Old ones know pidfd_open no better than pidfd_getfd, and answer EPERM to both."""
    done = run_python(FORBIDDING + COPYING)
    assert f"False {FILTERED}" == done.stdout.strip(), done.stderr


COUNTING = """
import os, socket, sys
from sdtool.sources.copies import read_options
made = [socket.socket() for _ in range(50)]
held = [(os.getpid(), one.fileno(), os.fstat(one.fileno()).st_ino) for one in made]
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
scan = read_options(held)
print(len(scan.by_inode), sum(str(path).endswith("/cgroup") for path in opened))
"""


@pytest.mark.capability("pidfd_getfd")
def test_tags_are_read_once_for_all_copies() -> None:
    """Our own, and those of each process: a busy port has thousands of connections."""
    done = run_python(COUNTING)
    copies, opened = map(int, done.stdout.split())
    assert 50 == copies
    assert 1 <= opened <= 2


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
    assert f"127.0.0.1:{peer}" == conflict["socket"]["peer"]
    assert 0 < conflict["socket"]["expires_us"] <= 60_000_000


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
