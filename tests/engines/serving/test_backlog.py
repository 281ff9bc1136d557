"""How long requests may have waited, told from the calls that they come in."""

from __future__ import annotations

import pytest

from tocom_export.engines.serving.backlog import Backlog


@pytest.fixture
def backlog() -> Backlog:
    return Backlog(capacity=4, delay=0.001)


def call(backlog: Backlog, start: float, images: int, took: float = 0.1) -> float:
    waited = backlog.begin(start, images)
    backlog.end(start + took)
    return waited


def test_after_a_pause_nothing_waited_but_for_the_delay(backlog: Backlog):
    assert call(backlog, 5, 1) == pytest.approx(0.001)
    assert call(backlog, 9, 4) == pytest.approx(0.001)


def test_what_comes_while_a_call_runs_waits_as_long_as_it_runs_at_most(backlog: Backlog):
    call(backlog, 0, 1, 0.1)
    assert call(backlog, 0.1, 2, 0.2) == pytest.approx(0.1)
    assert call(backlog, 0.301, 1) == pytest.approx(0.201)


def test_a_full_call_may_leave_some_behind(backlog: Backlog):
    call(backlog, 0, 4)
    assert call(backlog, 0.1, 4) == pytest.approx(0.101)
    assert call(backlog, 0.2, 4) == pytest.approx(0.201)
    assert call(backlog, 0.3, 3) == pytest.approx(0.301)  # the last that can be of the first ones
    assert call(backlog, 0.4, 1) == pytest.approx(0.1)


def test_the_wait_for_others_is_no_pause():
    backlog = Backlog(capacity=4, delay=0.05)
    call(backlog, 0, 1, 0.1)
    assert call(backlog, 0.15, 1) == pytest.approx(0.15)
