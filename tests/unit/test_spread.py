"""Work spread over threads comes back whole and in order."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtool.sources.spread import Crew, spread


@given(st.integers(0, 2000))
def test_parts_cover_all_items_in_order(many: int) -> None:
    """Whatever the number, and however many processors there are."""
    parts = spread(range(many), list)
    assert list(range(many)) == [item for part in parts for item in part]


def test_failure_in_a_thread_comes_out() -> None:
    """It is not lost with the thread."""

    def work(items: Sequence[int]) -> None:
        if 999 in items:
            raise LookupError("the last one")

    with pytest.raises(LookupError, match="the last one"):
        spread(range(1000), work)


def test_no_thread_is_left() -> None:
    """Everything is done when the answer is there."""
    before = threading.active_count()
    spread(range(1000), len)
    assert before == threading.active_count()


def test_work_is_done_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """TasksMax= of a unit: then by ourselves."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(range(1000)) == [item for part in spread(range(1000), list) for item in part]


def test_failure_beside_us_comes_out_when_we_are_done() -> None:
    """And so does our own, not before the threads are gone."""
    before = threading.active_count()
    crew = Crew([lambda: 1 // 0])
    with pytest.raises(ZeroDivisionError), crew.helpers(1):
        pass
    with pytest.raises(LookupError), Crew([lambda: 1]).helpers(1):
        raise LookupError
    assert before == threading.active_count()
