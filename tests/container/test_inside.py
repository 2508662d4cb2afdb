"""The system tests, once more: as real units of a booted system, as root and as its user."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.container.conftest import Results
from tests.container.suites import INSIDE, REPORTS, Inside


@pytest.mark.parametrize("inside", INSIDE, ids=lambda inside: inside.title)
def test_system_tests_pass_inside(results: Results, inside: Inside) -> None:
    """Units stop, ports and processes are found, and oracles agree, in this suite too."""
    done = results[inside].result()

    assert 0 == done.returncode, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
    cases = list(ET.parse(REPORTS / f"{inside.title}.xml").getroot().iter("testcase"))
    assert len(cases) > 100
