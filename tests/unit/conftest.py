"""How hypothesis runs here, and the command line run in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings

from sdtool.cli import main

# The same examples on every run: this tier is a gate, not a search.
settings.register_profile("unit", max_examples=40, deadline=None, database=None, derandomize=True)
settings.load_profile("unit")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the command line left: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def sdtool(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Run]]:
    """The command line in this process; the signal handlers that it sets are put back."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def run(*arguments: str) -> Run:
        status = main(arguments)
        printed = capsys.readouterr()
        return Run(status, printed.out, printed.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
