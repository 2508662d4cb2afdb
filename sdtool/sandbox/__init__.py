"""A throwaway real systemd, for the demo, the tests and whoever rehearses a stop.

Three kinds with one interface (``Sandbox``: ``environment``, ``argv``, ``run``). PrivateManager
boots a user manager of its own in the machine's namespaces, Container a whole system beside it;
both need root, and a guardian ends them whatever happens to their owner. BorrowedManager is a
guest in the caller's own user manager, which must run already. ``find_manager`` picks the demo's.
"""

from __future__ import annotations

from sdtool.sandbox.box import Sandbox
from sdtool.sandbox.container import Container
from sdtool.sandbox.demo import BorrowedManager, find_manager
from sdtool.sandbox.private import PrivateManager
from sdtool.sandbox.units import units_directory

__all__ = [
    "BorrowedManager",
    "Container",
    "PrivateManager",
    "Sandbox",
    "find_manager",
    "units_directory",
]
