"""port --bind: would an address and port be ours to bind now, and who is in the way."""

from __future__ import annotations

import logging
from dataclasses import replace

from sdtool.analysis.binding import is_refused, judge_bind, occupy, weigh_rules
from sdtool.analysis.cgroups import read_levels
from sdtool.errors import SdtoolError
from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.binding import BindAnswer, BindRules, BindScene, BindSpec, Newcomer
from sdtool.model.scope import is_foreign
from sdtool.model.sockets import HolderScan, SocketFacts, SocketFilter, inodes_of
from sdtool.sources import binding, cgroups, sockets
from sdtool.sources.copies import read_options

log = logging.getLogger(__name__)

HIDES_BOUND = "this kernel does not list TCP sockets that are bound and do not listen"
MAY_HIDE_BOUND = (
    "whether this kernel lists TCP sockets that are bound and do not listen could not be tried out"
)

INTERFACES = {
    name.lower(): name for name in ("Service", "Scope", "Slice", "Socket", "Mount", "Swap")
}
"""The types of units that have processes, and so a SocketBindDeny=."""


async def try_bind(session: Session, spec: BindSpec) -> BindAnswer:
    """Whether a bind would succeed now, by whoever asks.

    Raises:
        Unavailable: No socket can be made just now to try it out.
    """
    with binding.tell_exhaustion():
        # Sockets of our own first: they are closed again before anybody else's are looked at.
        newcomer = binding.read_newcomer(spec)
        permission = binding.read_port_permission(spec.port)
        if not is_refused(newcomer) and permission.permitted is not False:
            rules = await _read_rules(session)
            permission = weigh_rules(spec, newcomer, permission, rules)
        scene = BindScene(newcomer=newcomer, permission=permission, occupants=())
        if newcomer.refusal is not None:
            return judge_bind(spec, scene, ())
        return await _look_around(session, spec, scene)


async def _look_around(session: Session, spec: BindSpec, scene: BindScene) -> BindAnswer:
    """The answer for a good address: it is up to the sockets that are there."""
    survey = Survey(session)
    rows, unseen = _read_occupants(survey, spec)
    inodes = inodes_of(rows)
    scan = survey.sweep.holders_of(inodes) if inodes else HolderScan(complete=True)
    options = read_options(survey.sweep.find(inodes) if inodes else ())
    scene = replace(
        scene,
        occupants=occupy(rows, options),
        meeting=_read_meeting(spec, scene.newcomer, rows),
        options_reason=options.reason or scan.reason,
        unseen_reason=unseen,
    )
    return judge_bind(spec, scene, await survey.join(rows, scan) if rows else ())


def _read_meeting(
    spec: BindSpec, newcomer: Newcomer, rows: tuple[SocketFacts, ...]
) -> tuple[tuple[int, bool | None], ...]:
    if spec.protocol != "tcp" or not rows:
        return ()
    devices = {row.interface for row in rows} | {newcomer.interface}
    return binding.read_meeting((device for device in devices if device), spared=spec.port)


def _read_occupants(survey: Survey, spec: BindSpec) -> tuple[tuple[SocketFacts, ...], str | None]:
    """The sockets that have the port here, and why there may be more."""
    wanted = SocketFilter(protocols=(spec.protocol,), port=spec.port)
    # Once more before nothing is said to be there: one that changed its state was in no list.
    rows = sockets.read_sockets(wanted) or sockets.read_sockets(wanted)
    shows_bound = spec.protocol != "tcp" or binding.shows_bound_sockets(spec)
    if shows_bound:
        return rows, None
    listed = {row.inode for row in rows}
    deeper = (row for row in survey.read_deeper(wanted) if not row.elsewhere)
    hidden = tuple(row for row in deeper if row.inode not in listed)
    why = survey.caveat
    if why is None and survey.sweep.outside:
        why = "there may be processes outside of this pid namespace"
    about = MAY_HIDE_BOUND if shows_bound is None else HIDES_BOUND
    return rows + hidden, f"{about}: {why}" if why else None


async def _read_rules(session: Session) -> tuple[BindRules, ...]:
    """The rules about ports of the units that we are in; none where nobody can be asked.

    The managers of other users are not asked: they may load no BPF programs.
    """
    path = cgroups.read_process_cgroup("self")
    try:
        levels = read_levels(path, await session.roots()) if path is not None else []
    except SdtoolError as error:
        log.debug("the units that we are in are not known: %s", error)
        return ()
    found: list[BindRules] = []
    for manager, units in levels:
        if not is_foreign(manager):
            found += await _ask_rules(session, manager, units)
    return tuple(found)


async def _ask_rules(session: Session, manager: str, units: list[str]) -> list[BindRules]:
    allow, deny = "SocketBindAllow", "SocketBindDeny"
    found: list[BindRules] = []
    try:
        door = await session.manager_of(manager)
        for unit in units:
            interface = INTERFACES.get(unit.rpartition(".")[2])
            if interface is None:
                continue
            asked = [(interface, allow), (interface, deny)]
            values = (await door.read_properties([unit], asked))[unit]
            allowed, denied = (
                binding.parse_port_rules(values.get(name) or ()) for name in (allow, deny)
            )
            if denied:
                found.append(BindRules(unit=unit, allow=allowed, deny=denied))
    except SdtoolError as error:
        log.debug("what %s says of ports is not known: %s", manager, error)
    return found
