"""Who manages what is in a cgroup? Its path tells: manager, unit, slice, session, container.

Source: sd-login(3) for reading a path; the container runtimes' own names for theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

from sdtool.analysis.phases import ENDED
from sdtool.model.names import UNIT_TYPES
from sdtool.model.process import Container
from sdtool.model.scope import Scope
from sdtool.model.unit import CgroupOwner, ManagerRoots, Unit

USER_MANAGER = re.compile(r"user@\d+\.service")
SESSION = re.compile(r"session-(.+)\.scope")
INIT_SCOPE = "init.scope"

CONTAINERS = (
    ("docker", re.compile(r"/docker-([0-9a-f]{64})\.scope(?:/|$)")),
    ("podman", re.compile(r"/libpod-([0-9a-f]{64})(?:\.scope)?(?:/|$)")),
    ("crio", re.compile(r"/crio-([0-9a-f]{64})(?:\.scope)?(?:/|$)")),
    ("containerd", re.compile(r"/(?:cri-containerd|nerdctl)-([0-9a-f]{64})\.scope(?:/|$)")),
    ("nspawn", re.compile(r"/systemd-nspawn@([^/]+)\.service(?:/|$)")),
    ("qemu", re.compile(r"/machine-(qemu[^/]+)\.scope(?:/|$)")),
    ("nspawn", re.compile(r"/machine-([^/]+)\.scope(?:/|$)")),
    ("docker", re.compile(r"/docker/([0-9a-f]{64})(?:/|$)")),
    ("lxc", re.compile(r"/lxc\.payload\.([^/]+)")),
    ("kubepods", re.compile(r"/kubepods/.*pod[0-9a-f-]{36}/([0-9a-f]{64})(?:/|$)")),
)
"""Runtimes and the names that they give to cgroups, as systemd's units or without it (cgroupfs).

"kubepods" is whatever runtime Kubernetes uses, where the path does not tell.
"""

POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f_-]{27})(?:\.slice)?(?:/|$)")


def read_path(path: str, roots: ManagerRoots) -> CgroupOwner:
    """Who manages the processes of a cgroup, from its path alone, as sd-login(3) reads it."""
    if roots.user is not None and (inside := _below(path, roots.user)) is not None:
        slice_name, user_unit, _ = _split(inside)
        return CgroupOwner(
            unit=_system_part(path, roots)[1],
            user_unit=user_unit,
            slice=slice_name,
            asked=user_unit is not None,
        )
    slice_name, unit, rest = _system_part(path, roots)
    if unit is not None and USER_MANAGER.fullmatch(unit):
        inner_slice, user_unit, _ = _split(rest)
        return CgroupOwner(unit=unit, user_unit=user_unit, slice=inner_slice or slice_name)
    session = SESSION.fullmatch(unit or "")
    return CgroupOwner(unit=unit, slice=slice_name, session=session[1] if session else None)


def read_levels(path: str, roots: ManagerRoots) -> list[tuple[str, list[str]]]:
    """Every manager that a cgroup is under, outermost first, with the units that it is in.

    The units of one manager stand from "-.slice" to the innermost; the manager is named as in
    ``CgroupOwner.manager``.
    """
    asked = None if roots.user is None else _below(path, roots.user)
    parts = _below(path, roots.system)
    levels: list[tuple[str, list[str]]] = []
    if parts is not None:
        _, unit, rest = _split(parts)
        levels.append((Scope.SYSTEM, _units_on_the_way(parts, unit)))
        if asked is None and unit is not None and USER_MANAGER.fullmatch(unit):
            levels.append((unit, _units_on_the_way(rest, _split(rest)[1])))
    if asked is not None:
        levels.append((Scope.USER, _units_on_the_way(asked, _split(asked)[1])))
    return levels


def running_user_managers(units: Iterable[Unit]) -> list[str]:
    """Those of the system's units that run a user manager now, by uid.

    One on its way down counts: what keeps it from ending is asked for then most of all.
    """
    running = [unit.name for unit in units if unit.active_state not in ENDED]
    return sorted(filter(USER_MANAGER.fullmatch, running), key=uid_of_manager)


def uid_of_manager(unit: str) -> int:
    """The uid that user@UID.service runs the manager of."""
    return int(unit.removeprefix("user@").removesuffix(".service"))


def _units_on_the_way(parts: Sequence[str], unit: str | None) -> list[str]:
    slices = takewhile(lambda part: part.endswith(".slice"), parts)
    return ["-.slice", *slices, *([unit] if unit else [])]


def _system_part(path: str, roots: ManagerRoots) -> tuple[str | None, str | None, list[str]]:
    return _split(_below(path, roots.system) or [])


def _below(path: str, root: str) -> list[str] | None:
    """The components of a path below a root, None when it is elsewhere."""
    root = root.rstrip("/")
    if path != root and not path.startswith(f"{root}/"):
        return None
    return [part for part in path[len(root) :].split("/") if part]


def _split(parts: list[str]) -> tuple[str | None, str | None, list[str]]:
    """(innermost slice, the unit right below the slices, what is below the unit)."""
    slice_name = None
    for index, part in enumerate(parts):
        # systemd escapes names that clash with the kernel's own files by a leading "_".
        name = part.removeprefix("_")
        kind = name.rpartition(".")[2] if "." in name else ""
        if kind == "slice":
            slice_name = name
        elif kind in UNIT_TYPES:
            return slice_name, name, parts[index + 1 :]
        else:
            break
    return slice_name, None, []


def read_container(path: str) -> Container | None:
    """The container that a cgroup path belongs to, by the names that runtimes give."""
    for runtime, pattern in CONTAINERS:
        found = pattern.search(path)
        if found:
            pod = POD.search(path)
            uid = pod[1].replace("_", "-") if pod else None
            return Container(runtime=runtime, id=found[1], pod=uid)
    return None
