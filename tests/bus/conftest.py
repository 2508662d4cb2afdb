"""A private broker with a fake systemd1 behind it, for each test and on both D-Bus libraries."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import FrameType

import pytest
from fake_systemd import FakeSystemd
from private_broker import Broker

from sdtool.host import contact
from sdtool.sources import reach, systemd

TOO_LONG_S = 25

UNPRIVILEGED = """\
import os, sys
os.geteuid = lambda: 65534
from sdtool.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Runs the command line as somebody who does not look for the system manager's own socket."""

Run = Callable[..., CompletedProcess[str]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function; whatever hangs, or spins, ends by an alarm."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    before = signal.signal(signal.SIGALRM, _raise_timeout)
    signal.alarm(TOO_LONG_S)
    try:
        asyncio.run(pyfuncitem.obj(**arguments))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return True


def _raise_timeout(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"the test has not ended after {TOO_LONG_S} s")


@pytest.fixture(autouse=True, params=["next", "fast"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The D-Bus library that sdtool uses in this test."""
    monkeypatch.setenv("SDTOOL_DBUS", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _quiet_libraries(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which a library, or asyncio, has logged an error or lost an exception."""
    yield
    gc.collect()
    records = [r for when in ("setup", "call", "teardown") for r in caplog.get_records(when)]
    assert [] == [r.getMessage() for r in records if r.levelno >= logging.ERROR]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An XDG_RUNTIME_DIR with nobody in it, and no bus anywhere."""
    nowhere = f"unix:path={tmp_path}/nowhere"
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", nowhere)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", nowhere)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def broker(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """A broker that is the system's bus and the user's."""
    daemon = Broker(runtime)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", daemon.address)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", daemon.address)
    yield daemon
    daemon.kill()


@pytest.fixture
def fake(broker: Broker) -> Iterator[FakeSystemd]:
    """A fake systemd1 on the broker."""
    with FakeSystemd(address=broker.address) as systemd1:
        yield systemd1


@pytest.fixture
def private(runtime: Path) -> Iterator[FakeSystemd]:
    """A fake user manager behind its private socket."""
    with FakeSystemd(private=runtime / "systemd/private") as systemd1:
        yield systemd1


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> float:
    """Shorten the time to connect, and return what a connect may take with it."""
    monkeypatch.setattr(reach, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(systemd, "PATIENCE_S", 0.5)
    return 2.0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give questions, and a manager that is lost while units stop, little time."""
    monkeypatch.setattr(systemd, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(systemd, "PATIENCE_S", 0.5)
    monkeypatch.setattr(contact, "RETURN_S", 1.0)


@pytest.fixture
def sdtool() -> Run:
    """Run the command line in a process of its own."""

    def run(*arguments: str, unprivileged: bool = False) -> CompletedProcess[str]:
        how = ["-c", UNPRIVILEGED] if unprivileged else ["-m", "sdtool"]
        command = [sys.executable, "-W", "error", *how, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TOO_LONG_S, env=dict(os.environ)
        )

    return run
