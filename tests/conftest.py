"""The tiers of tests, by folder, and what each needs of the machine.

A tier that cannot run is skipped and says why; with SDTOOL_REQUIRE=1 in the environment that
is a failure. The only reason a single test may be skipped for is a capability of the machine
from the short list below, asked for with ``@pytest.mark.capability("memory")``.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtool.errors import SdtoolError
from sdtool.sandbox.requirements import require_container, require_private
from sdtool.sources.cgroups import read_mount
from sdtool.sources.copies import may_copy
from sdtool.sources.processes import is_initial_pid_namespace

_CAP_SYS_RESOURCE = 24


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers of this file, and hear the signals that tests are about."""
    config.addinivalue_line("markers", "unit: needs nothing; the whole tier takes < 3 s")
    config.addinivalue_line("markers", f"capability(name): one of {', '.join(_CAPABILITIES)}")
    # nohup and a job in the background ignore them, and every command would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the tier it is in: the folder below tests/."""
    for item in items:
        tier = _tier_of(item)
        if tier in _TIERS:
            item.add_marker(tier)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run on this machine, or fail where it has to."""
    obstacle = _TIERS.get(_tier_of(item), _needs_nothing)()
    if obstacle is not None:
        if os.environ.get("SDTOOL_REQUIRE") == "1":
            pytest.fail(f"the tier must run here, but: {obstacle}", pytrace=False)
        pytest.skip(obstacle)
    for mark in item.iter_markers("capability"):
        if lack := _CAPABILITIES[mark.args[0]]():
            pytest.skip(lack)


def _tier_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def _needs_nothing() -> str | None:
    return None


@functools.cache
def _bus_obstacle() -> str | None:
    return None if shutil.which("dbus-daemon") else "there is no dbus-daemon (apt install dbus)"


@functools.cache
def _system_obstacle() -> str | None:
    # Inside a container the manager is there already.
    return None if "SDTOOL_TEST_SCOPE" in os.environ else _refusal(require_private)


@functools.cache
def _container_obstacle() -> str | None:
    return _refusal(functools.partial(require_container, build=True))


def _refusal(require: Callable[[], None]) -> str | None:
    try:
        require()
    except SdtoolError as error:
        return f"{error} ({error.hint})"
    return None


def _lacks_controller(name: str) -> str | None:
    """A cgroup controller counts when the root of cgroup2 hands it to its children."""
    handed_down = (read_mount().path / "cgroup.subtree_control").read_text().split()
    return None if name in handed_down else f"cgroup2 has no {name} controller here"


def _lacks_sys_resource() -> str | None:
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    has = int(status["CapEff"], 16) >> _CAP_SYS_RESOURCE & 1
    return None if has else "this process lacks CAP_SYS_RESOURCE"


_TIERS: dict[str, Callable[[], str | None]] = {
    "unit": _needs_nothing,
    "bus": _bus_obstacle,
    "system": _system_obstacle,
    "container": _container_obstacle,
}


def _lacks_root() -> str | None:
    return None if os.geteuid() == 0 else "an ordinary user cannot become another one"


def _lacks_namespaces() -> str | None:
    ordinary = "an ordinary user neither makes network namespaces for others nor enters them"
    return None if os.geteuid() == 0 else ordinary


def _lacks_bound_sockets() -> str | None:
    major, minor = map(int, os.uname().release.split(".")[:2])
    old = "before Linux 6.8 sock_diag does not show sockets that are bound only"
    return old if (major, minor) < (6, 8) else None


def _lacks_freezable_manager() -> str | None:
    inside = os.environ.get("SDTOOL_TEST_SCOPE") == "system"
    return "PID 1 hears no SIGSTOP from inside its own system" if inside else None


def _lacks_unbooted_machine() -> str | None:
    booted = Path("/run/systemd/system").exists()
    return "this machine was booted with systemd" if booted else None


def _lacks_cgroup_v1() -> str | None:
    mounts = Path("/proc/self/mountinfo").read_text()
    return None if "name=systemd" in mounts else "this machine has no cgroup v1 hierarchy to show"


def _lacks_pidfd_getfd() -> str | None:
    forbidden = "a filter of system calls forbids pidfd_getfd here"
    return None if may_copy() else forbidden


def _lacks_tracefs() -> str | None:
    """The trace is root's, in the initial pid namespace."""
    ours = os.geteuid() == 0 and is_initial_pid_namespace()
    return None if ours else "the trace is not for us"


_CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "bound sockets": _lacks_bound_sockets,
    "cgroup v1": _lacks_cgroup_v1,
    "namespaces": _lacks_namespaces,
    "root": _lacks_root,
    "freezable manager": _lacks_freezable_manager,
    "unbooted machine": _lacks_unbooted_machine,
    "memory": lambda: _lacks_controller("memory"),
    "pids": lambda: _lacks_controller("pids"),
    "pidfd_getfd": _lacks_pidfd_getfd,
    "CAP_SYS_RESOURCE": _lacks_sys_resource,
    "tracefs": _lacks_tracefs,
}
