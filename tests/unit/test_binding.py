"""Whether a bind would succeed: the rules, the verdict with its reasons, and how it is shown."""

from __future__ import annotations

import io
import socket
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdtool.analysis.binding import explain_refusal, judge_bind, occupy, weigh_rules
from sdtool.analysis.conflicts import CROWD, can_bind, overlaps
from sdtool.analysis.ownership import join
from sdtool.model.binding import (
    BindAnswer,
    BindRules,
    BindScene,
    BindSpec,
    BindVerdict,
    Newcomer,
    Occupant,
    OptionScan,
    PortPermission,
    PortRule,
    ReuseOption,
    SocketOptions,
)
from sdtool.model.sockets import HolderScan, SocketFacts
from sdtool.model.unit import ManagerRoots
from sdtool.render.binding import NAMED, SHOWN, render_binds
from sdtool.render.json import to_plain
from sdtool.sources.binding import parse_port_rules
from tests.unit.make import GROUP, UNIT, row, scan

REUSEADDR, REUSEPORT = ReuseOption.REUSEADDR, ReuseOption.REUSEPORT
BOTH = (REUSEADDR, REUSEPORT)
PLAIN: tuple[ReuseOption, ...] = ()
ALLOWED = PortPermission(permitted=True)
CGROUPS = {7: GROUP}


def newcomer(address: str = "127.0.0.1", **fields: Any) -> Newcomer:
    """A TCP socket of root, with the v6only that the kernel gives it."""
    special = address == "::" or address.startswith("::ffff:")
    v6only = None if ":" not in address else not special
    values = {"protocol": "tcp", "refusal": None, "v6only": v6only, "interface": None, "uid": 0}
    return Newcomer(address=address, **{**values, **fields})


def options(*reuse: ReuseOption, v6only: bool | None = None) -> SocketOptions:
    """Those that a holder has set."""
    return SocketOptions(reuseaddr=REUSEADDR in reuse, reuseport=REUSEPORT in reuse, v6only=v6only)


def at(address: str, **fields: Any) -> SocketFacts:
    """A listener on an address, dual-stack where that can be."""
    family = "inet6" if ":" in address else "inet"
    special = address == "::" or address.startswith("::ffff:")
    v6only = None if family == "inet" else not special
    return row(**{"family": family, "address": address, "v6only": v6only, **fields})


def held(facts: SocketFacts, *reuse: ReuseOption) -> Occupant:
    """A socket whose options are known."""
    return Occupant(row=facts, options=options(*reuse, v6only=facts.v6only))


def blind(facts: SocketFacts) -> Occupant:
    """A socket whose options are not."""
    return Occupant(row=facts, options=None)


def scene(*occupants: Occupant, **fields: Any) -> BindScene:
    """A plain TCP newcomer on 127.0.0.1 among them."""
    values = {"newcomer": newcomer(), "permission": ALLOWED, "occupants": occupants}
    return BindScene(**{**values, **fields})


def binds(found: BindScene, reuse: Collection[ReuseOption] = PLAIN) -> bool | None:
    """Whether the bind would succeed with these options."""
    return can_bind(found, frozenset(reuse))


def judged(found: BindScene, look: HolderScan | None = None, **fields: Any) -> BindAnswer:
    """The answer, with the sockets joined as the host does it; pid 10 holds all, or as told."""
    rows = [one.row for one in found.occupants]
    inodes = {facts.inode for facts in rows if facts.inode}
    look = look or scan(*((inode, 10, GROUP) for inode in sorted(inodes)))
    sockets = join(rows, CGROUPS, look, ManagerRoots())
    values = {"address": found.newcomer.address, "port": 80, "protocol": found.newcomer.protocol}
    return judge_bind(BindSpec(**{**values, **fields}), found, sockets)


CHILD = row(state="ESTABLISHED", peer_address="127.0.0.1", peer_port=4711)
OLD = row(state="TIME_WAIT", inode=None, cgroup_id=None, expires_us=42_000_000)


# Addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.2", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("::ffff:127.0.0.1", "127.0.0.2", False),
        ("::ffff:127.0.0.1", "::", True),
        ("127.0.0.1", "::", True),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("::1", "::", True),
        ("::1", "::1", True),
        ("::1", "0.0.0.0", False),
        ("0.0.0.0", "::1", False),
        ("::1", "::2", False),
    ],
)
def test_addresses_overlap_as_the_kernel_has_it(ours: str, theirs: str, expected: bool) -> None:
    """A wildcard has every address of its family, and :: those of IPv4 too."""
    facts = at(theirs)
    assert expected is overlaps(newcomer(ours), facts, facts.v6only)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [("127.0.0.1", "::", False), ("::1", "::", True)]
)
def test_v6only_takes_no_ipv4(ours: str, theirs: str, expected: bool) -> None:
    """On either side of the two."""
    assert expected is overlaps(newcomer(ours), at(theirs), True)
    only = newcomer(theirs, v6only=True)
    assert expected is overlaps(only, at(ours), at(ours).v6only)


def test_connection_of_a_dual_stack_server_counts_for_ipv4() -> None:
    """It has an address of IPv6 and is not for IPv6 alone: a bind of 0.0.0.0 meets it."""
    child = at("::1", state="ESTABLISHED")
    answers = [overlaps(newcomer("0.0.0.0"), child, known) for known in (True, False, None)]
    assert [False, True, None] == answers
    assert None is overlaps(newcomer("127.0.0.6"), child, False)


ADDRESSES = ("0.0.0.0", "127.0.0.1", "127.0.0.2", "::", "::1", "::ffff:127.0.0.1")


@given(st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES), st.booleans(), st.booleans())
def test_overlap_is_symmetric(first: str, second: str, one: bool, two: bool) -> None:
    """Of two bound sockets it does not matter which came first."""
    ours = one if first == "::" else newcomer(first).v6only
    theirs = two if second == "::" else newcomer(second).v6only
    there = overlaps(newcomer(first, v6only=ours), at(second), theirs)
    back = overlaps(newcomer(second, v6only=theirs), at(first), ours)
    assert there is back
    assert there is not None


# TCP -----------------------------------------------------------------------------------------


def test_free_port_can_be_had() -> None:
    """With nobody there, whatever the options."""
    assert [True] * 3 == [binds(scene(), reuse) for reuse in (PLAIN, (REUSEADDR,), BOTH)]


@pytest.mark.parametrize(
    ("state", "theirs", "ours", "expected"),
    [
        ("LISTEN", BOTH, PLAIN, False),
        ("LISTEN", (REUSEADDR,), (REUSEADDR,), False),
        ("LISTEN", (REUSEPORT,), (REUSEPORT,), True),
        ("LISTEN", PLAIN, BOTH, False),
        ("BOUND", (REUSEADDR,), (REUSEADDR,), True),
        ("ESTABLISHED", (REUSEADDR,), (REUSEADDR,), True),
        ("ESTABLISHED", (REUSEADDR,), PLAIN, False),
        ("ESTABLISHED", PLAIN, (REUSEADDR,), False),
        ("CLOSE_WAIT", (REUSEPORT,), (REUSEPORT,), True),
        ("SYN_SENT", (REUSEADDR,), (REUSEPORT,), False),
    ],
)
def test_tcp_shares_an_address_by_options_of_both(
    state: str, theirs: tuple[ReuseOption, ...], ours: tuple[ReuseOption, ...], expected: bool
) -> None:
    """SO_REUSEADDR does while nobody listens, SO_REUSEPORT does always."""
    assert expected is binds(scene(held(row(state=state), *theirs)), ours)


def test_reuseport_is_for_one_user() -> None:
    """Of another's socket it is known without its options that it does not help."""
    assert False is binds(scene(held(row(uid=1000), REUSEPORT)), (REUSEPORT,))
    assert False is binds(scene(blind(row(uid=1000))), BOTH)
    assert None is binds(scene(blind(row())), (REUSEPORT,))


def test_what_nobody_holds_does_not_tell_its_options() -> None:
    """A plain bind fails for certain, and one with options may."""
    answers = [binds(scene(blind(OLD)), reuse) for reuse in (PLAIN, (REUSEADDR,), (REUSEPORT,))]
    assert [False, None, None] == answers


def test_who_asks_for_a_connection_is_not_in_the_way() -> None:
    """Its listener is; alone it is a doubt."""
    asking = row(state="SYN_RECV", inode=None)
    assert False is binds(scene(blind(asking), held(row(inode=501))))
    assert None is binds(scene(blind(asking)))


def test_devices_keep_sockets_apart() -> None:
    """Two bound to different ones never meet; one that is bound to none meets both."""
    on_two = held(row(interface=2))
    apart = scene(on_two, newcomer=newcomer(interface=3), meeting=((2, True), (3, True)))
    assert True is binds(apart)
    answers = [binds(scene(on_two, meeting=((2, meets),))) for meets in (True, False, None)]
    assert [False, True, None] == answers


def test_kernel_waves_in_the_like_of_what_it_remembers() -> None:
    """Beside a listener of IPv4, one on :: for IPv6 alone may let in one on :: for both."""
    listener = held(row(inode=501))
    alike = held(at("::", v6only=True, state="BOUND"), REUSEPORT)
    ours = newcomer("::")
    assert False is binds(scene(listener, newcomer=ours), (REUSEPORT,))
    assert None is binds(scene(listener, alike, newcomer=ours), (REUSEPORT,))
    assert False is binds(scene(listener, alike, newcomer=ours))


def test_kernel_waves_in_the_like_of_ipv4_in_ipv6() -> None:
    """Beside an IPv6 connection of a dual-stack server, which is in the way of IPv4 itself."""
    child = held(at("::1", state="FIN_WAIT1", v6only=False, uid=1000), REUSEADDR)
    mapped = held(at("::ffff:0.0.0.0", inode=501), REUSEPORT)
    ours = newcomer("0.0.0.0")
    assert False is binds(scene(child, newcomer=ours), (REUSEPORT,))
    assert None is binds(scene(child, mapped, newcomer=ours), (REUSEPORT,))
    assert False is binds(scene(child, mapped, newcomer=ours))


# UDP -----------------------------------------------------------------------------------------


def datagram(address: str = "127.0.0.1", **fields: Any) -> SocketFacts:
    """A bound UDP socket."""
    return at(address, **{"protocol": "udp", "type": "dgram", "state": "UNCONN", **fields})


UDP = {"newcomer": newcomer(protocol="udp")}


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (BOTH, PLAIN, False),
        ((REUSEADDR,), (REUSEADDR,), True),
        ((REUSEPORT,), (REUSEPORT,), True),
        ((REUSEPORT,), (REUSEADDR,), False),
        (PLAIN, BOTH, False),
    ],
)
def test_udp_shares_an_address_by_either_option(
    theirs: tuple[ReuseOption, ...], ours: tuple[ReuseOption, ...], expected: bool
) -> None:
    """On both sides the same one; there is nobody who listens."""
    assert expected is binds(scene(held(datagram(), *theirs), **UDP), ours)


def test_connected_udp_counts_by_its_own_address() -> None:
    """Not by the wildcard that it was bound to."""
    here = held(datagram("127.0.0.2", state="ESTABLISHED"))
    assert True is binds(scene(here, **UDP))
    assert False is binds(scene(here, newcomer=newcomer("0.0.0.0", protocol="udp")))


def test_order_of_udp_sockets_decides_about_reuseport() -> None:
    """The first that shares the port ends the kernel's search, and nobody tells which that is."""
    shares = held(datagram("127.0.0.2", inode=501), REUSEPORT)
    wildcard = newcomer("0.0.0.0", protocol="udp")
    assert None is binds(scene(held(datagram()), shares, newcomer=wildcard), (REUSEPORT,))
    assert True is binds(scene(shares, newcomer=wildcard), (REUSEPORT,))


def test_crowd_of_udp_sockets_may_be_overlooked() -> None:
    """By a wildcard, on some kernels; another wildcard is always seen."""
    crowd = [held(datagram(f"127.0.0.{n}", inode=500 + n)) for n in range(1, CROWD + 2)]
    wildcard = newcomer("0.0.0.0", protocol="udp")
    assert None is binds(scene(*crowd, newcomer=wildcard))
    assert False is binds(scene(*crowd, held(datagram("0.0.0.0")), newcomer=wildcard))
    assert False is binds(scene(*crowd[:CROWD], newcomer=wildcard))


# Any situation -------------------------------------------------------------------------------

TCP_STATES = ("LISTEN", "BOUND", "ESTABLISHED", "TIME_WAIT", "FIN_WAIT2", "SYN_RECV", "CLOSE_WAIT")


@st.composite
def scenes(draw: st.DrawFn) -> BindScene:
    """Up to four sockets in any state, and any newcomer."""
    protocol = draw(st.sampled_from(("tcp", "udp")))
    states = TCP_STATES if protocol == "tcp" else ("UNCONN", "ESTABLISHED")
    occupants = []
    for inode in range(draw(st.integers(0, 4))):
        facts = at(
            draw(st.sampled_from(ADDRESSES)),
            protocol=protocol,
            state=draw(st.sampled_from(states)),
            inode=draw(st.sampled_from((None, 500 + inode))),
            uid=draw(st.sampled_from((0, 1000))),
            interface=draw(st.sampled_from((None, None, 2, 3))),
        )
        if draw(st.booleans()) and facts.state != "LISTEN":
            facts = replace(facts, v6only=None)
        reuse = draw(st.sets(st.sampled_from(ReuseOption)))
        known = options(*reuse, v6only=at(facts.address).v6only)
        occupants.append(Occupant(row=facts, options=known))
    ours = newcomer(draw(st.sampled_from(ADDRESSES)), protocol=protocol)
    interface = draw(st.sampled_from((None, None, 2)))
    meeting = ((2, draw(st.sampled_from((True, False)))), (3, True))
    ours = replace(ours, interface=interface)
    return scene(*occupants, newcomer=ours, meeting=meeting)


@given(scenes(), st.sets(st.sampled_from(ReuseOption)), st.data())
def test_to_know_less_changes_no_answer(
    found: BindScene, reuse: set[ReuseOption], data: st.DataObject
) -> None:
    """Where options are hidden the answer is the same, or there is none."""
    hidden = replace(
        found,
        occupants=tuple(
            replace(one, options=None) if data.draw(st.booleans()) else one
            for one in found.occupants
        ),
        meeting=data.draw(st.sampled_from((found.meeting, ()))),
    )
    assert binds(hidden, reuse) in (None, binds(found, reuse))


@given(scenes())
def test_every_situation_has_an_answer(found: BindScene) -> None:
    """The verdict is that of a plain bind, a yes needs nothing, and all else has its reason."""
    answer = judged(found)
    verdicts = {True: BindVerdict.YES, False: BindVerdict.NO, None: BindVerdict.UNKNOWN}
    assert verdicts[binds(found)] == answer.verdict
    is_yes = answer.verdict is BindVerdict.YES
    assert (is_yes, is_yes) == (answer.needs == (), answer.needs_reason is None)
    assert is_yes != bool(answer.conflicts)
    if answer.needs:
        assert True is binds(found, answer.needs)


# The verdict ---------------------------------------------------------------------------------


def test_yes_needs_nothing() -> None:
    """Other addresses of the port may be taken."""
    answer = judged(scene(held(at("127.0.0.2"))))
    assert (BindVerdict.YES, (), None) == (answer.verdict, answer.needs, answer.needs_reason)
    assert () == answer.conflicts


def test_no_names_the_unit_in_the_way() -> None:
    """The listener before its connections, with the peer of each."""
    answer = judged(scene(held(replace(CHILD, inode=501)), held(row())))
    assert (BindVerdict.NO, "EADDRINUSE: 2 sockets are in the way") == (
        answer.verdict,
        answer.verdict_reason,
    )
    seen = [(one.unit, one.socket.state, one.socket.peer) for one in answer.conflicts]
    assert [(UNIT, "LISTEN", None), (UNIT, "ESTABLISHED", "127.0.0.1:4711")] == seen


@pytest.mark.parametrize(
    ("occupants", "expected"),
    [
        ([held(CHILD, REUSEADDR)], (REUSEADDR,)),
        ([held(CHILD, *BOTH)], (REUSEADDR,)),
        ([held(row(), REUSEPORT)], (REUSEPORT,)),
        ([held(CHILD, REUSEADDR), held(row(inode=501), REUSEPORT)], BOTH),
        ([held(row(), REUSEADDR)], None),
        ([blind(OLD)], None),
    ],
)
def test_needs_are_the_least_that_helps(
    occupants: list[Occupant], expected: tuple[ReuseOption, ...] | None
) -> None:
    """One option before both; None where none would, or nobody knows."""
    assert expected == judged(scene(*occupants)).needs


@pytest.mark.parametrize(
    ("occupant", "words"),
    [
        (held(row()), "none: with a listener"),
        (held(row(uid=1000), REUSEPORT), "this one is of uid 1000"),
        (held(CHILD), "none: the socket in ESTABLISHED has not set either option"),
        (blind(CHILD), "not known: options of sockets may not be read: needs root"),
        (blind(OLD), "not known: nobody holds the socket in TIME_WAIT"),
    ],
)
def test_reason_of_the_needs_says_what_is_missing(occupant: Occupant, words: str) -> None:
    """In the words of who could do something about it."""
    answer = judged(scene(occupant, options_reason="needs root"))
    assert words in (answer.needs_reason or "")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("ESTABLISHED", "waits to be accepted"),
        ("CLOSE_WAIT", "waits to be accepted"),
        ("FIN_WAIT2", "is not through with its peer"),
        ("TIME_WAIT", "waits for late packets"),
    ],
)
def test_connection_without_a_holder_says_what_it_is(state: str, words: str) -> None:
    """Not accepted yet, or closed by us: the one is of a server that runs, the other of nobody."""
    (conflict,) = judged(scene(blind(row(state=state, inode=None, peer_port=9)))).conflicts
    assert words in conflict.reason


def test_unit_that_is_not_known_has_its_reason() -> None:
    """No unit is one thing, and one that may not be seen another."""
    elsewhere = held(row(cgroup_id=None))
    hidden = HolderScan(reason="1 process may not be looked into")
    cases = [
        (scene(held(row())), scan((500, 10, GROUP)), UNIT, None),
        (scene(held(row())), scan((500, 10, "/")), None, None),
        (scene(held(row())), hidden, UNIT, None),
        (scene(elsewhere), hidden, None, "1 process may not be looked into"),
        (scene(held(row())), scan(), None, "no process holds it"),
        (scene(blind(OLD)), scan(), None, None),
    ]
    for found, look, unit, reason in cases:
        (conflict,) = judged(found, look).conflicts
        assert unit == conflict.unit
        assert (reason is None) == (conflict.unit_reason is None)
        assert (reason or "") in (conflict.unit_reason or "")


def test_forbidden_port_is_a_no() -> None:
    """Whoever has it: no option helps."""
    denied = PortPermission(permitted=False, reason="EACCES: ports below 1024 need it")
    answer = judged(scene(held(CHILD, REUSEADDR), permission=denied))
    assert (BindVerdict.NO, None) == (answer.verdict, answer.needs)
    assert "EACCES: ports below 1024 need it" == answer.verdict_reason


@pytest.mark.parametrize("code", ["EADDRNOTAVAIL", "EAFNOSUPPORT", "ENODEV", "EXOTIC"])
def test_refused_address_is_a_no(code: str) -> None:
    """With the errno and what it is about, and no sockets: none is in the way."""
    answer = judged(scene(held(row()), newcomer=newcomer(refusal=code)))
    assert (BindVerdict.NO, None, ()) == (answer.verdict, answer.needs, answer.conflicts)
    assert answer.verdict_reason.startswith(f"{code}: ")


@pytest.mark.parametrize("code", ["EPERM", "EACCES"])
def test_forbidden_trial_is_no_answer(code: str) -> None:
    """A rule that forbids to bind without a port may allow this one."""
    answer = judged(scene(newcomer=newcomer(refusal=code)))
    assert (BindVerdict.UNKNOWN, None, ()) == (answer.verdict, answer.needs, answer.conflicts)
    assert answer.verdict_reason.startswith(f"{code}: ")
    assert "it may allow this one" in answer.verdict_reason
    assert "not known, as the verdict" == answer.needs_reason


def test_forbidden_trial_leaves_a_forbidden_port_a_no() -> None:
    """Whatever else is forbidden."""
    denied = PortPermission(permitted=False, reason="EACCES: ports below 1024 need it")
    answer = judged(scene(newcomer=newcomer(refusal="EPERM"), permission=denied))
    assert (BindVerdict.NO, None) == (answer.verdict, answer.needs)


ANY = (0, 0, 0, 0)
EIGHTY = (socket.AF_INET, socket.IPPROTO_TCP, 1, 80)
RANGE6 = (socket.AF_INET6, 0, 3, 79)
Rule = tuple[int, int, int, int]


@pytest.mark.parametrize(
    ("refusal", "deny", "allow", "expected"),
    [
        (None, [], [ANY], True),
        (None, [EIGHTY], [], None),
        (None, [RANGE6], [], True),
        (None, [EIGHTY], [ANY], True),
        (None, [ANY], [EIGHTY], True),
        ("EPERM", [ANY], [EIGHTY], True),
        ("EPERM", [ANY], [RANGE6], False),
        ("EPERM", [EIGHTY], [], None),
        ("EACCES", [ANY], [], None),
    ],
)
def test_rules_of_a_unit_are_weighed(
    refusal: str | None, deny: list[Rule], allow: list[Rule], expected: bool | None
) -> None:
    """What is allowed is not denied; that a rule is in force shows where it forbids the trial."""
    rules = [BindRules(unit=UNIT, allow=parse_port_rules(allow), deny=parse_port_rules(deny))]
    spec = BindSpec(address="127.0.0.1", port=80)

    found = weigh_rules(spec, newcomer(refusal=refusal), ALLOWED, rules)

    assert expected is found.permitted
    assert (expected is True) == (found.reason is None)
    assert (expected is False) == (found.reason or "").startswith("EPERM: SocketBindDeny= of web")


def test_rules_of_every_unit_count() -> None:
    """One that is not in force may be the one that forbids the port."""
    rules = [
        BindRules(unit="a.slice", allow=parse_port_rules([EIGHTY]), deny=parse_port_rules([ANY])),
        BindRules(unit=UNIT, allow=(), deny=parse_port_rules([EIGHTY])),
    ]
    spec = BindSpec(address="127.0.0.1", port=80)
    found = weigh_rules(spec, newcomer(refusal="EPERM"), ALLOWED, rules)
    assert None is found.permitted
    assert f"SocketBindDeny= of {UNIT}" in (found.reason or "")


def test_rules_lift_no_other_refusal() -> None:
    """A low port is one with rules and without."""
    denied = PortPermission(permitted=False, reason="EACCES: ports below 1024 need it")
    rules = [BindRules(unit=UNIT, allow=(), deny=parse_port_rules([ANY]))]
    spec = BindSpec(address="127.0.0.1", port=80)
    assert denied == weigh_rules(spec, newcomer(), denied, rules)


def test_port_rules_are_read_as_the_manager_has_them() -> None:
    """No number is every port."""
    assert (
        PortRule(family=None, protocol=None, first=0, last=65535),
        PortRule(family="inet", protocol="tcp", first=80, last=80),
        PortRule(family="inet6", protocol=None, first=79, last=81),
    ) == parse_port_rules([ANY, EIGHTY, RANGE6])


@pytest.mark.parametrize(
    ("address", "words"),
    [("fe80::1", "%DEVICE"), ("::ffff:127.0.0.1", "bindv6only"), ("ff02::1", "tcp has no such")],
)
def test_invalid_address_says_why(address: str, words: str) -> None:
    """One errno has three reasons."""
    assert words in explain_refusal(newcomer(address, refusal="EINVAL"))


def test_unseen_sockets_make_a_yes_unknown() -> None:
    """Not a no: who is seen in the way is in the way. And no option is promised to help."""
    unseen = {"unseen_reason": "this kernel does not list some"}
    answer = judged(scene(**unseen))
    assert (BindVerdict.UNKNOWN, None) == (answer.verdict, answer.needs)
    assert "this kernel does not list some" == answer.verdict_reason
    answer = judged(scene(held(CHILD, REUSEADDR), **unseen))
    assert (BindVerdict.NO, None) == (answer.verdict, answer.needs)


def test_unknown_shows_what_may_be_in_the_way() -> None:
    """With the reason why it is not known."""
    child = at("::1", state="TIME_WAIT", inode=None, v6only=None)
    answer = judged(scene(blind(child), newcomer=newcomer("0.0.0.0")))
    assert BindVerdict.UNKNOWN is answer.verdict
    assert "nobody holds ::1 port 80 in TIME_WAIT" in answer.verdict_reason
    assert 1 == len(answer.conflicts)


WILDCARD = newcomer("0.0.0.0")
UDP_WILDCARD = newcomer("0.0.0.0", protocol="udp")
CROWDED = [held(datagram(f"127.0.0.{n}", inode=500 + n)) for n in range(1, CROWD + 2)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (scene(*CROWDED, newcomer=UDP_WILDCARD), "with so many sockets on one port"),
        (scene(held(row(interface=2))), "(VRF) could not be tried out"),
        (
            scene(blind(at("::1", state="ESTABLISHED", v6only=None)), newcomer=WILDCARD),
            "counts for IPv4 is not known: its holder was not found",
        ),
        (
            scene(blind(datagram("::1", state="ESTABLISHED", v6only=None)), newcomer=UDP_WILDCARD),
            "counts for IPv4 is not known: its holder was not found",
        ),
    ],
)
def test_doubt_has_its_own_reason(found: BindScene, words: str) -> None:
    """Each is lifted by something else."""
    answer = judged(found)
    assert BindVerdict.UNKNOWN is answer.verdict
    assert words in answer.verdict_reason


def test_options_belong_to_the_socket_of_their_inode() -> None:
    """What nobody holds has none."""
    look = OptionScan(by_inode=((500, options(REUSEADDR)),))
    found = occupy([row(), row(inode=501), OLD], look)
    assert [options(REUSEADDR), None, None] == [one.options for one in found]


# Shown ---------------------------------------------------------------------------------------


def printed(*answers: BindAnswer) -> str:
    """What stands on a wide terminal without colours."""
    console = Console(file=io.StringIO(), width=300)
    console.print(render_binds(answers))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_verdict_stands_first_and_the_remedy_last() -> None:
    """Each conflict is a line between them: unit, address, state, why, and who holds it."""
    head, conflict, remedy = printed(judged(scene(held(CHILD, REUSEADDR)))).splitlines()
    assert "127.0.0.1:80/tcp  no  EADDRINUSE: 1 socket is in the way" == head.strip()
    assert conflict.startswith(f"  {UNIT}  127.0.0.1:80 ESTABLISHED with 127.0.0.1:4711: ")
    assert "pid 10 (p10)" in conflict
    assert remedy.startswith("  (SO_REUSEADDR would help: ")


def test_time_wait_is_shown_with_its_end() -> None:
    """And with nobody's name."""
    text = printed(judged(scene(blind(OLD))))
    assert "no process  127.0.0.1:80 TIME_WAIT: " in text
    assert "free in 42 s" in text


def test_busy_port_is_cut_short() -> None:
    """The rest is a number."""
    crowd = [held(replace(CHILD, inode=500 + n)) for n in range(SHOWN + 3)]
    assert "  and 3 sockets more" in printed(judged(scene(*crowd)))


def test_crowd_of_holders_is_cut_short() -> None:
    """With how many are left; of a unit that may not be seen it says so, and why."""
    many = scan(*((500, 10 + n, GROUP) for n in range(NAMED + 2)))
    text = printed(judged(scene(held(row())), many))
    assert (
        f"; pids 10 (p10), 11 (p11), 12 (p12), {9 + NAMED} (p{9 + NAMED}) and 2 processes" in text
    )
    hidden = HolderScan(reason="needs root")
    text = printed(judged(scene(held(row(cgroup_id=None))), hidden))
    assert "unknown unit  127.0.0.1:80 LISTEN" in text
    assert "holders not visible (the kernel names no creating cgroup for it; needs root)" in text


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (BindSpec(address="127.0.0.1", port=80), "127.0.0.1:80/tcp"),
        (BindSpec(address="::1", port=80, protocol="udp"), "[::1]:80/udp"),
        (BindSpec(address="fe80::1", port=80, interface="lo"), "[fe80::1%lo]:80/tcp"),
        (BindSpec(address="::", port=80, dual=True), "*:80/tcp"),
    ],
)
def test_spec_is_written_as_it_is_typed(spec: BindSpec, expected: str) -> None:
    """With the protocol always."""
    assert expected == str(spec)


def test_json_has_the_names_of_the_model() -> None:
    """The contract that scripts rely on."""
    plain = to_plain(judged(scene(held(CHILD, REUSEADDR))))
    assert [
        *("address", "port", "protocol", "interface", "v6only", "verdict", "verdict_reason"),
        *("needs", "needs_reason", "conflicts"),
    ] == list(plain)
    assert ("no", ["SO_REUSEADDR"]) == (plain["verdict"], plain["needs"])
    names = ["socket", "unit", "unit_reason", "manager", "reason"]
    assert names == list(plain["conflicts"][0])
