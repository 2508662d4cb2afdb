"""Containers to test in: one of each suite that nobody spoils, fresh ones for hostile hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from subprocess import CompletedProcess
from typing import Any

import pytest

from sdtool.sandbox import Container
from tests.container.suites import INSIDE, REQUIREMENTS, SUITES, Inside, run_inside
from tests.container.system import System
from tests.machine import end_demo_units

Boot = Callable[..., System]

Results = dict[Inside, Future[CompletedProcess[str]]]

_POOL = pytest.StashKey[Executor]()
_RESULTS = pytest.StashKey[Results]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask last how the runs inside containers ended: they go on beside all other tests."""
    items.sort(key=_is_about_inside)


def _is_about_inside(item: pytest.Item) -> bool:
    return item.path.name == "test_inside.py"


def pytest_runtestloop(session: pytest.Session) -> None:
    """Begin with the runs inside containers before the first test, one after the other."""
    if session.config.option.collectonly:
        return
    chosen = " ".join(item.name for item in filter(_is_about_inside, session.items))
    runs = [run for run in INSIDE if f"[{run.title}]" in chosen]
    # A process of its own: tests change what is common to all threads, who we are for example.
    pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
    session.config.stash[_POOL] = pool
    session.config.stash[_RESULTS] = {run: pool.submit(run_inside, run) for run in runs}


def pytest_unconfigure(config: pytest.Config) -> None:
    """Wait for what has begun; what has not does not begin any more."""
    if pool := config.stash.get(_POOL, None):
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    """The runs inside containers, each as it ends."""
    return request.config.stash[_RESULTS]


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
def system(suite: str) -> Iterator[System]:
    """A system with a second user, where root's password is "secret"."""
    with Container(suite, requirements=REQUIREMENTS) as container:
        system = System(container)
        made = system.shell("echo root:secret | chpasswd; useradd --create-home other")
        assert 0 == made.status, made.stderr
        yield system


@pytest.fixture
def healthy(_healthy: System) -> Iterator[System]:
    """A system with nothing wrong, and a user manager for tester; no demo unit runs in it."""
    yield _healthy
    end_demo_units(_healthy.run, "--system")
