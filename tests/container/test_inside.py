"""The system tests, once more: as real units of a booted system, as root and as its user."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.container.suites import RUNS, Run, run_inside

Results = dict[Run, Future[CompletedProcess[str]]]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """All the runs, two at a time: most of what they do is to wait."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {run: pool.submit(run_inside, run) for run in RUNS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.title)
def test_system_tests_pass_inside(results: Results, run: Run) -> None:
    """Units stop, ports and processes are found, and oracles agree, in this suite too."""
    done = results[run].result()

    assert 0 == done.returncode, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
