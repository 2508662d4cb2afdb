"""The system tests, once more: as real units of a booted system, as root and as its user."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.container.suites import REPORTS, RUNS, Run, run_inside

Results = dict[Run, Future[CompletedProcess[str]]]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """All the runs, two at a time: most of what they do is to wait."""
    pool = ThreadPoolExecutor(max_workers=2)
    yield {run: pool.submit(run_inside, run) for run in RUNS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.title)
def test_system_tests_pass_inside(results: Results, run: Run) -> None:
    """Units stop, ports and processes are found, and oracles agree, in this suite too."""
    done = results[run].result()

    assert 0 == done.returncode, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
    cases = list(ET.parse(REPORTS / f"{run.title}.xml").getroot().iter("testcase"))
    assert len(cases) > 100
