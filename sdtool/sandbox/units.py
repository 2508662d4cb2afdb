"""Where the demo units are: beside the package once installed, in the checkout otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from sdtool.errors import Unavailable

_PACKAGE = Path(__file__).resolve().parent.parent


def units_directory() -> Path:
    """Find the directory of the demo units, with their payloads in its ``bin``.

    Raises:
        Unavailable: They were not installed with sdtool.
    """
    for directory in (_PACKAGE / "units", _PACKAGE.parent / "units"):
        if os.access(directory / "bin", os.X_OK):
            return directory
    raise Unavailable(
        f"The demo units are missing: there is no units directory in {_PACKAGE}.",
        hint="reinstall sdtool from its wheel, or run it from its checkout",
    )
