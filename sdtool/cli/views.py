"""What each command shows to people; rich and the renderer load only when something is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sdtool.model.binding import BindAnswer
    from sdtool.model.facility import Facility
    from sdtool.model.ports import ListeningSocket, PortOwnership
    from sdtool.model.process import ProcessOwner
    from sdtool.model.stop import StopReport
    from sdtool.model.unit import ListedUnit, Trace


def show_units(units: Sequence[ListedUnit]) -> RenderableType:
    """The table of ``list``."""
    from sdtool.render.tables import render_units

    return render_units(units)


def show_traces(traces: Sequence[Trace]) -> RenderableType:
    """The trees of ``trace``."""
    from sdtool.render.trace import render_traces

    return render_traces(traces)


def show_ports(answers: Sequence[PortOwnership]) -> RenderableType:
    """The owners of ``port``."""
    from sdtool.render.tables import render_ports

    return render_ports(answers)


def show_binds(answers: Sequence[BindAnswer]) -> RenderableType:
    """The verdicts of ``port --bind``."""
    from sdtool.render.binding import render_binds

    return render_binds(answers)


def show_listeners(rows: Sequence[ListeningSocket]) -> RenderableType:
    """The table of ``ports``."""
    from sdtool.render.tables import render_listeners

    return render_listeners(rows)


def show_owners(owners: Sequence[ProcessOwner]) -> RenderableType:
    """The answers of ``pid``."""
    from sdtool.render.tables import render_owners

    return render_owners(owners)


def show_facilities(facilities: Sequence[Facility]) -> RenderableType:
    """The table of ``doctor``."""
    from sdtool.render.tables import render_facilities

    return render_facilities(facilities)


def show_reports(reports: Sequence[StopReport]) -> RenderableType:
    """The verdicts of ``stop``."""
    from sdtool.render.timeline import render_reports

    return render_reports(reports)
