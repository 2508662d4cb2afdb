"""Which service manager is meant; a module of its own, so that start-up loads no other model."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """Which manager is asked: PID 1, or the calling user's own."""

    SYSTEM = "system"
    USER = "user"


def is_foreign(manager: str | None) -> bool:
    """Whether a manager is neither the system's nor the one that was asked.

    Args:
        manager: A ``Scope``, or the user@UID.service that runs another one; None for none.
    """
    return manager is not None and manager not in tuple(Scope)
