"""Containers to test in: one of each suite that nobody spoils, fresh ones for hostile hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sdtool.sandbox import Container
from tests.container.suites import REQUIREMENTS, SUITES
from tests.container.system import Run, System
from tests.machine import end_demo_units

Boot = Callable[..., System]


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """Each suite under test."""
    name: str = request.param
    return name


@pytest.fixture
def boot(suite: str) -> Iterator[Boot]:
    """Boot a fresh container of the suite, with whatever is wrong with it."""
    with ExitStack() as stack:

        def boot_one(**options: Any) -> System:
            container = Container(suite, requirements=REQUIREMENTS, **options)
            return System(stack.enter_context(container))

        yield boot_one


@pytest.fixture(scope="session")
def _healthy(suite: str) -> Iterator[System]:
    with Container(suite, requirements=REQUIREMENTS) as container:
        container.log_in()
        yield System(container)


@pytest.fixture(scope="module")
def run(suite: str) -> Iterator[Run]:
    """Run a command in a system with a second user, where root's password is "secret"."""
    with Container(suite, requirements=REQUIREMENTS) as container:
        system = System(container)
        made = system.shell("echo root:secret | chpasswd; useradd --create-home other")
        assert 0 == made.status, made.stderr
        yield system.run


@pytest.fixture
def healthy(_healthy: System) -> Iterator[System]:
    """A system with nothing wrong, and a user manager for tester; no demo unit runs in it."""
    yield _healthy
    end_demo_units(_healthy.run, "--system")
