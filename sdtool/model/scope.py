"""Which service manager is meant; a module of its own, so that start-up loads no other model."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """Which manager is asked: PID 1, or the calling user's own."""

    SYSTEM = "system"
    USER = "user"
