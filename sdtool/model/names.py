"""Unit names: as users write them, as systemd escapes them, as D-Bus paths carry them.

Source: systemd.unit(5) "String Escaping", systemd-escape(1), sd_bus_path_encode(3).
"""

from __future__ import annotations

import re

from sdtool.errors import InvalidArgument

POLKIT = "polkit.service"
"""The unit of what decides who may stop others."""

POLKIT_NAME = "org.freedesktop.PolicyKit1"
"""Its name on the bus."""

MANAGE_UNITS = "org.freedesktop.systemd1.manage-units"
"""What polkit calls it to start and stop units."""

UNIT_TYPES = frozenset(
    {"service", "socket", "target", "device", "mount", "automount", "swap", "timer", "path"}
    | {"slice", "scope"}
)


def unit_name(text: str) -> str:
    """The unit that a user means, as systemctl reads it: ``.service`` implied, paths escaped.

    Raises:
        InvalidArgument: It is empty, too long, or has a NUL or a newline.
    """
    if not text or len(text) > 255 or any(char in text for char in "\0\n"):
        raise InvalidArgument(f"{text[:40]!r} is no unit name.", subject=text[:255] or None)
    if text.startswith("/"):
        kind = "device" if text.startswith(("/dev/", "/sys/")) else "mount"
        return f"{_escape_path(text)}.{kind}"
    prefix, _, kind = text.rpartition(".")
    if prefix and kind in UNIT_TYPES:
        return _escape(text)
    return f"{_escape(text)}.service"


def is_glob(text: str) -> bool:
    """Whether a unit argument is a pattern rather than a name."""
    return any(char in text for char in "*?[")


def _escape(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9:_.\\@*?\[\]!-]", _hex, text.replace("/", "-"))


def _escape_path(path: str) -> str:
    inner = "/".join(part for part in path.split("/") if part)
    if not inner:
        return "-"
    escaped = re.sub(r"[^A-Za-z0-9:_./]", _hex, inner)
    return re.sub(r"^\.", r"\\x2e", escaped).replace("/", "-")


def _hex(match: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in match[0].encode(errors="surrogateescape"))


def unit_path(name: str) -> str:
    """The object path of a loaded unit (sd_bus_path_encode(3))."""
    encoded = "".join(
        char if char.isascii() and char.isalnum() and not (index == 0 and char.isdigit())
        else "".join(f"_{byte:02x}" for byte in char.encode(errors="surrogateescape"))
        for index, char in enumerate(name)
    )  # fmt: skip
    return f"/org/freedesktop/systemd1/unit/{encoded or '_'}"
