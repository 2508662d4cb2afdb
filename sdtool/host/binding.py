"""port --bind: would an address and port be ours to bind now, and who is in the way."""

from __future__ import annotations

from sdtool.analysis.binding import judge_bind, occupy
from sdtool.host.session import Session
from sdtool.host.survey import Survey
from sdtool.model.binding import BindAnswer, BindScene, BindSpec
from sdtool.model.sockets import HolderScan, SocketFacts, Wanted
from sdtool.sources import binding, sockets
from sdtool.sources.copies import read_options

HIDES_BOUND = "this kernel does not list TCP sockets that are bound and do not listen"


async def try_bind(session: Session, spec: BindSpec) -> BindAnswer:
    """Whether a bind would succeed now, by whoever asks."""
    # Sockets of our own first: they are closed again before anybody else's are looked at.
    newcomer = binding.read_newcomer(spec)
    survey = Survey(session)
    rows, unseen = _read_occupants(survey, spec)
    inodes = frozenset(row.inode for row in rows if row.inode)
    scan = survey.sweep.holders_of(inodes) if inodes else HolderScan(complete=True)
    options = read_options(survey.sweep.find(inodes) if inodes else ())
    devices = {row.interface for row in rows} | {newcomer.interface}
    scene = BindScene(
        newcomer=newcomer,
        permission=binding.read_port_permission(spec.port),
        occupants=occupy(rows, options),
        meeting=binding.read_meeting(device for device in devices if device) if rows else (),
        options_reason=options.reason or scan.reason,
        unseen_reason=unseen,
    )
    return judge_bind(spec, scene, await survey.join(rows, scan) if rows else ())


def _read_occupants(survey: Survey, spec: BindSpec) -> tuple[tuple[SocketFacts, ...], str | None]:
    """The sockets that have the port here, and why there may be more."""
    wanted = Wanted(protocols=(spec.protocol,), port=spec.port)
    rows = sockets.read_sockets(wanted)
    if spec.protocol != "tcp" or binding.shows_bound_sockets():
        return rows, None
    hidden = tuple(row for row in survey.read_deeper(wanted) if not row.elsewhere)
    why = survey.caveat
    if why is None and survey.sweep.outside:
        why = "there may be processes outside of this pid namespace"
    return rows + hidden, f"{HIDES_BOUND}: {why}" if why else None
