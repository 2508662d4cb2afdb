"""A throwaway real systemd, for the demo, the tests and whoever rehearses a stop.

Two kinds with one interface (``Sandbox``: ``environment``, ``argv``, ``run``): PrivateManager
boots a manager of its own and needs root; BorrowedManager is a guest in the caller's own user
manager, which must run already. ``find_manager`` chooses.
"""

from __future__ import annotations

from sdtool.sandbox.box import Sandbox
from sdtool.sandbox.demo import BorrowedManager, find_manager
from sdtool.sandbox.private import PrivateManager
from sdtool.sandbox.units import units_directory

__all__ = ["BorrowedManager", "PrivateManager", "Sandbox", "find_manager", "units_directory"]
