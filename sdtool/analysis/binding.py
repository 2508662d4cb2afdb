"""Would a bind succeed now; if not, who is in the way, and which option would help?

The rules are those of ``conflicts``; here they become a verdict with its reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sdtool.analysis.conflicts import CROWD, PLAIN, Reuse, can_bind, meets
from sdtool.analysis.ownership import doubt_owner
from sdtool.analysis.ports import socket_owners
from sdtool.model.binding import (
    BindAnswer,
    BindConflict,
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
)
from sdtool.model.sockets import Socket, SocketFacts

REUSEADDR, REUSEPORT = ReuseOption.REUSEADDR, ReuseOption.REUSEPORT
REMEDIES: tuple[tuple[ReuseOption, ...], ...] = (
    (REUSEADDR,),
    (REUSEPORT,),
    (REUSEADDR, REUSEPORT),
)
"""In the order in which one is preferred."""

FORBIDDEN = ("EPERM", "EACCES")
"""What a rule says to a bind: it may be about ports, and then it is not about every port."""

TRYING = "to try the address out without a port; it may allow this one"

LINK_LOCAL = ("fe8", "fe9", "fea", "feb")

STATE_WORDS = {
    "LISTEN": "listens on it",
    "UNCONN": "takes datagrams on it",
    "BOUND": "is bound to it, and does not listen",
    "SYN_SENT": "connects from it",
    "SYN_RECV": "is being asked for a connection on it",
    "ESTABLISHED": "has a connection with it",
    "CLOSE_WAIT": "has a connection with it, which the peer has closed",
    "TIME_WAIT": "an old connection waits for late packets",
}
WAITING = "a connection waits to be accepted by who listens"
ORPHAN = "a closed connection is not through with its peer"


def occupy(rows: Iterable[SocketFacts], scan: OptionScan) -> tuple[Occupant, ...]:
    """Sockets with their options, in the same order."""
    options = dict(scan.by_inode)
    return tuple(Occupant(row=row, options=options.get(row.inode or 0)) for row in rows)


def judge_bind(spec: BindSpec, scene: BindScene, sockets: Sequence[Socket]) -> BindAnswer:
    """Whether the bind would succeed, and what would help.

    Args:
        sockets: The occupants' sockets joined with their owners, in the same order.
    """
    verdict, reason = _judge(scene)
    needs, needs_reason = _find_remedy(scene, verdict)
    return BindAnswer(
        address=spec.address,
        port=spec.port,
        protocol=spec.protocol,
        interface=spec.interface,
        v6only=scene.newcomer.v6only,
        verdict=verdict,
        verdict_reason=reason,
        needs=needs,
        needs_reason=needs_reason,
        conflicts=tuple(_list_conflicts(scene, sockets, verdict)),
    )


# Rules ---------------------------------------------------------------------------------------


def weigh_rules(
    spec: BindSpec, newcomer: Newcomer, permission: PortPermission, rules: Sequence[BindRules]
) -> PortPermission:
    """Whether a port is ours to bind under the rules of the units that we are in.

    That they are in force is seen only where they forbid to bind without a port too: systemd does
    without them where it, or the kernel, was built without BPF.

    Args:
        permission: What it is without rules.
    """
    against = [one for one in rules if _denies(one, spec, spec.port)]
    if permission.permitted is False or not against:
        return permission
    named = f"SocketBindDeny= of {against[0].unit} is against port {spec.port}"
    against_trial = [one for one in rules if _denies(one, spec, 0)]
    in_force = newcomer.refusal == "EPERM" and against_trial
    # Which of them is in force is not seen: each has to be against the port too.
    if in_force and all(one in against for one in against_trial):
        return PortPermission(permitted=False, reason=f"EPERM: {named}")
    return PortPermission(permitted=None, reason=f"{named}; whether it is in force is not known")


def _denies(rules: BindRules, spec: BindSpec, port: int) -> bool:
    """As systemd's program has it (socket-bind.bpf.c): what is allowed is not denied."""
    return not any(_is_about(rule, spec, port) for rule in rules.allow) and any(
        _is_about(rule, spec, port) for rule in rules.deny
    )


def _is_about(rule: PortRule, spec: BindSpec, port: int) -> bool:
    family = "inet6" if ":" in spec.address else "inet"
    return (
        rule.family in (None, family)
        and rule.protocol in (None, spec.protocol)
        and rule.first <= port <= rule.last
    )


# The verdict ---------------------------------------------------------------------------------


def is_refused(newcomer: Newcomer) -> bool:
    """Whether the address is refused for certain, whatever the port."""
    return newcomer.refusal is not None and newcomer.refusal not in FORBIDDEN


def _judge(scene: BindScene) -> tuple[BindVerdict, str]:
    permission = scene.permission
    if is_refused(scene.newcomer):
        return BindVerdict.NO, explain_refusal(scene.newcomer)
    if permission.permitted is False:
        return BindVerdict.NO, permission.reason or ""
    if scene.newcomer.refusal is not None:
        return BindVerdict.UNKNOWN, explain_refusal(scene.newcomer)
    free = can_bind(scene)
    if free is False:
        return BindVerdict.NO, f"EADDRINUSE: {_count_blocking(scene)} in the way"
    doubt = _doubt_sockets(scene) if free is None else None
    doubt = doubt or scene.unseen_reason or permission.reason
    if doubt is not None:
        return BindVerdict.UNKNOWN, doubt
    return BindVerdict.YES, "no socket is in the way"


def explain_refusal(newcomer: Newcomer) -> str:
    """What the errno that an address met is about."""
    address = newcomer.address
    family = "IPv6" if ":" in address else "IPv4"
    switched_off = ", or IPv6 is switched off (disable_ipv6)" if family == "IPv6" else ""
    words = {
        "EADDRNOTAVAIL": f"{address} is no address of this network namespace{switched_off}",
        "EAFNOSUPPORT": f"the kernel has no {family}, or RestrictAddressFamilies= forbids it",
        "ENODEV": "there is no such device here",
        "EINVAL": _explain_invalid(address, newcomer.protocol),
        "EPERM": f"a rule for this process (SocketBindDeny=, BPF) forbids {TRYING}",
        "EACCES": f"a security module (SELinux, Landlock) forbids {TRYING}",
    }
    reason = words.get(newcomer.refusal or "", "the kernel refuses the address")
    return f"{newcomer.refusal}: {reason}"


def _explain_invalid(address: str, protocol: str) -> str:
    if address.startswith(LINK_LOCAL) or (protocol == "udp" and address.startswith("ff")):
        return f"an address of one link needs its device: [{address}%DEVICE]"
    if address.startswith("::ffff:"):
        return "net.ipv6.bindv6only is 1: an IPv6 socket takes no IPv4"
    return f"{protocol} has no such addresses"


def _count_blocking(scene: BindScene) -> str:
    number = sum(meets(scene, one) is True for one in scene.occupants)
    return "1 socket is" if number == 1 else f"{number} sockets are"


def _doubt_sockets(scene: BindScene) -> str:
    """Why it is not known whether the sockets that may be in the way are."""
    doubtful = [one.row for one in scene.occupants if meets(scene, one) is None]
    row = doubtful[0]
    where = f"{row.address} port {row.port} in {row.state}"
    if row.protocol == "udp" and len(scene.occupants) > CROWD:
        return f"with so many sockets on one port, some kernels overlook {where}"
    if row.protocol == "tcp" and row.interface != scene.newcomer.interface:
        return f"whether {where} shares its device's ports (VRF) could not be tried out"
    if row.inode is None:
        return f"nobody holds {where}, and the kernel does not tell whether it counts for IPv4"
    return (
        f"whether {where} counts for IPv4 is not known: "
        f"{scene.options_reason or 'its holder was not found'}"
    )


# What would help -----------------------------------------------------------------------------


def _find_remedy(
    scene: BindScene, verdict: BindVerdict
) -> tuple[tuple[ReuseOption, ...] | None, str | None]:
    if verdict is BindVerdict.YES:
        return (), None
    if is_refused(scene.newcomer) or scene.permission.permitted is False:
        return None, "none: no option helps against that"
    if verdict is BindVerdict.UNKNOWN:
        return None, "not known, as the verdict"
    doubt = scene.unseen_reason or scene.permission.reason
    found = {remedy: can_bind(scene, frozenset(remedy)) for remedy in REMEDIES}
    for remedy in (remedy for remedy, helps in found.items() if helps is True):
        return (None, f"not known: {doubt}") if doubt else (remedy, _explain_help(remedy))
    if None in found.values():
        return None, f"not known: {_doubt_options(scene, found[REMEDIES[0]])}"
    return None, f"none: {_explain_blocking(scene)}"


def _explain_help(remedy: Sequence[ReuseOption]) -> str:
    if tuple(remedy) == (REUSEADDR,):
        return "each socket in the way has it set too, and none of them listens"
    if tuple(remedy) == (REUSEPORT,):
        return "each socket in the way has it set too, and is of the same user"
    return "each socket in the way has one of them set too"


def _doubt_options(scene: BindScene, by_address: bool | None) -> str:
    """Why it is not known whether an option would help.

    Args:
        by_address: Whether SO_REUSEADDR alone does.
    """
    blind = [one for one in scene.occupants if one.options is None and meets(scene, one)]
    if any(one.row.inode is not None for one in blind):
        return f"options of sockets may not be read: {scene.options_reason or 'no holder found'}"
    if blind and by_address is None:
        return (
            f"nobody holds the socket in {blind[0].row.state}, so its options cannot be read; "
            "SO_REUSEADDR helps if the old server had set it too"
        )
    return "whether SO_REUSEPORT helps depends on what was bound before, which nobody tells"


def _explain_blocking(scene: BindScene) -> str:
    """Why no option lets the newcomer in, by the socket that is most in the way."""
    every = frozenset({REUSEADDR, REUSEPORT})
    row, options = next(
        (one.row, one.options) for one in scene.occupants if _blocks_alone(scene, one, every)
    )
    if row.state == "LISTEN":
        rule = "with a listener an address is shared by SO_REUSEPORT on both, of the same user"
        if row.uid != scene.newcomer.uid:
            return f"{rule}: this one is of uid {row.uid}"
        return f"{rule}: this one has not set it"
    which = "either option" if options is not None else "SO_REUSEPORT for the same user"
    return f"the socket in {row.state} has not set {which}"


def _blocks_alone(scene: BindScene, occupant: Occupant, reuse: Reuse = PLAIN) -> bool:
    alone = BindScene(
        newcomer=scene.newcomer,
        permission=scene.permission,
        occupants=(occupant,),
        meeting=scene.meeting,
    )
    return can_bind(alone, reuse) is False


# What is in the way --------------------------------------------------------------------------


def _list_conflicts(
    scene: BindScene, sockets: Sequence[Socket], verdict: BindVerdict
) -> Iterator[BindConflict]:
    """Listeners first; of what may be in the way only where that makes the verdict."""
    if scene.newcomer.refusal is not None or verdict is BindVerdict.YES:
        return
    wanted = (True,) if can_bind(scene) is False else (True, None)
    pairs = zip(scene.occupants, sockets, strict=True)
    met = [(one.row, socket) for one, socket in pairs if meets(scene, one) in wanted]
    for row, socket in sorted(met, key=lambda pair: _by_weight(pair[0])):
        units = dict.fromkeys((o.unit, o.manager) for o in socket_owners(socket))
        for unit, manager in units or {(None, None): None}:
            yield BindConflict(
                socket=socket,
                unit=unit,
                unit_reason=None if units else doubt_owner(socket),
                manager=manager,
                reason=_explain_row(row),
            )


def _by_weight(row: SocketFacts) -> tuple[int, bool]:
    order = ("LISTEN", "UNCONN", "BOUND")
    return order.index(row.state) if row.state in order else len(order), row.inode is None


def _explain_row(row: SocketFacts) -> str:
    if row.inode is None and row.state in ("ESTABLISHED", "CLOSE_WAIT"):
        return WAITING
    if row.inode is None and row.state not in ("TIME_WAIT", "SYN_RECV"):
        return ORPHAN
    return STATE_WORDS.get(row.state, "closes a connection with it")
