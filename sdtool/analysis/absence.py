"""What became of a unit and of its job while the manager was out of reach?

Nobody told it: what the manager says when it is back is all there is to conclude it from.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdtool.model.manager import ManagerGap
from sdtool.model.stop import Event, EventKind
from sdtool.model.unit import UnitDetails

ENDS = frozenset({EventKind.PROCESS_EXIT, EventKind.CGROUP_EMPTY, EventKind.CGROUP_REMOVED})


def is_job_gone(path: str | None, details: UnitDetails | None) -> bool:
    """Whether a stop job that was there is over.

    Args:
        path: The job's own; None where any stop job of the unit is the one that is meant.
        details: The unit now; None when the manager knows it no more.
    """
    if details is None:
        return True
    return details.unit.job != "stop" if path is None else details.job_path != path


def end_of_forgotten(events: Iterable[Event], gap: ManagerGap) -> int:
    """When a unit became inactive that the manager has forgotten: with the last that ended."""
    last = max((e.at_us for e in events if e.kind in ENDS), default=gap.since_us)
    return min(max(last, gap.since_us), gap.until_us)


def result_of_forgotten(details: UnitDetails) -> tuple[str | None, str | None]:
    """(the result of a unit that the manager has forgotten, why it is not known)."""
    if details.collect_mode == "inactive":
        # A unit that had failed would have been kept.
        return "success", None
    return None, "the manager forgot the unit while it was out of reach"
