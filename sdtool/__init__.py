"""sdtool: systemd's units with their processes, ports and stops, observed.

The library's API is ``Host``, the types of ``sdtool.model`` and the errors of ``sdtool.errors``.
``Host`` loads when it is first used: it brings asyncio and a D-Bus library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdtool import errors, model

if TYPE_CHECKING:
    from sdtool.host import Host, ListFilter, StopOptions
    from sdtool.model.scope import Scope

__version__ = "0.1.0"

__all__ = ["Host", "ListFilter", "Scope", "StopOptions", "__version__", "errors", "model"]


def __getattr__(name: str) -> Any:
    """Load what is heavy on its first use."""
    if name in ("Host", "ListFilter", "Scope", "StopOptions"):
        from sdtool import host

        return getattr(host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
