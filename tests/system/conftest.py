"""One manager for all system tests, and the clients to use in it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sdtool.errors import SdtoolError
from tests.machine import end_demo_units
from tests.system.bench import Bench, Client, flag_of, open_bench
from tests.system.situations import Situations, find_port


@pytest.fixture(scope="session", autouse=True)
def _own_ports() -> Iterator[None]:
    """Wait until no other run of these tests uses the demo units' ports.

    They are fixed, so the lock is on what they are unique in: the network namespace.
    """
    with Path("/proc/self/ns/net").open("rb") as namespace:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session", autouse=True)
def _version(record_testsuite_property: Callable[[str, str], None]) -> None:
    """Say in the report which systemd it is about."""
    shown = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True)
    record_testsuite_property("systemd", shown.stdout.split("(")[1].split(")")[0])


@pytest.fixture(scope="session")
def manager() -> Iterator[Bench]:
    """The manager; when it cannot boot, the whole run ends here."""
    bench = open_bench()
    try:
        bench.start()
    except SdtoolError as error:
        pytest.exit(f"the manager does not boot: {error}", returncode=1)
    yield bench
    bench.stop()


@pytest.fixture
def systemctl(manager: Bench) -> Client:
    """The oracle: systemctl, on the manager."""

    def run(*arguments: str, timeout: float = 60.0) -> CompletedProcess[str]:
        return manager.run(["systemctl", flag_of(manager), *arguments], timeout=timeout)

    return run


@pytest.fixture
def sdtool(manager: Bench) -> Client:
    """The command line under test, inside."""

    def run(*arguments: str, timeout: float = 60.0) -> CompletedProcess[str]:
        command = [sys.executable, "-m", "sdtool", *arguments, flag_of(manager)]
        return manager.run(command, timeout=timeout)

    return run


@pytest.fixture
def situations(manager: Bench, tmp_path: Path) -> Iterator[Situations]:
    """Units with the sockets that a test is about."""
    tmp_path.chmod(0o755)
    situations = Situations(manager, tmp_path)
    yield situations
    situations.close()


@pytest.fixture
def port() -> int:
    """A port for a test alone."""
    return find_port()


AS_NOBODY = """
import ctypes, importlib, os, pkgutil, sys
import asyncio, psutil, sdtool, sdtool.cli
for module in pkgutil.walk_packages(sdtool.__path__, "sdtool."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
importlib.import_module("sdtool.sources.bus").load_library()
os.setgroups([]), os.setgid(65534), os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: as if it had been started by that user
sys.exit(sdtool.cli.main(sys.argv[1:]))
"""


@pytest.fixture
def sdtool_as_nobody(manager: Bench) -> Client:
    """The command line under test as another user, who need not be able to read the checkout.

    Everything is imported before the user changes; with --json nothing is left to import.
    """

    def run(*arguments: str, timeout: float = 60.0) -> CompletedProcess[str]:
        command = [sys.executable, "-c", AS_NOBODY, *arguments, "--json"]
        return manager.run(command, timeout=timeout)

    return run


@pytest.fixture(autouse=True)
def _clean_slate(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the next test a manager without demo units, if this one has used it."""
    yield
    if "manager" in request.fixturenames:
        manager = request.getfixturevalue("manager")
        end_demo_units(manager.run, flag_of(manager))
