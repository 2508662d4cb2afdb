"""How much of a stop can be seen, by the observers that work and that are wanted?"""

from __future__ import annotations

from sdtool.model.stop import Tier


def tier_of(*, sees_signals: bool, sees_births: bool, sees_status: bool) -> Tier:
    """The best tier of which all works."""
    if sees_signals:
        return Tier.A
    if sees_births:
        return Tier.B
    return Tier.C if sees_status else Tier.D


def explain_switch(name: str, wanted: frozenset[str] | None) -> str | None:
    """Why an observer is not used; None where it is.

    Args:
        name: One of ``OBSERVERS``.
        wanted: Those to use; None for all.
    """
    return None if wanted is None or name in wanted else "switched off"
