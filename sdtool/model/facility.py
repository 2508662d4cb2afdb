"""What sdtool can see on this machine, and what it costs the answers when it cannot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Facility:
    """One source of facts.

    Attributes:
        facility: Its name: bus, manager, cgroups, pidfd ...
        reason: What was found, or why it is not available and what would lift that.
        gives: The answers that stand on it.
        costs: What the answers lack without it; None where it is available.
    """

    facility: str
    available: bool
    reason: str
    gives: str
    costs: str | None = None
