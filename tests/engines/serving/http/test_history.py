"""How a model was served of late, in steps."""

from __future__ import annotations

import pytest

from tocom_export.engines.serving.http.history import STEP, History, average_accuracy


def test_steps_that_have_ended():
    history = History(100.0)
    assert history.read(101.0) == ()
    history.note(101.0, 0.2, "r00", 3)
    history.note(102.0, 0.4, "r08", 1)
    history.note(106.0, 9.0, "r08", 1)
    (first,) = history.read(107.0)
    assert (first.end, first.images, first.answered) == (105.0, 4, {"r00": 1, "r08": 1})
    assert first.latencies_ms == pytest.approx((300, 398))
    first, second, third = history.read(116.0)  # nobody came meanwhile
    assert second.latencies_ms == (9000, 9000)
    assert (third.images, third.latencies_ms) == (0, None)


def test_five_minutes_are_kept():
    history = History(0.0)
    for second in range(0, 2000, 2):
        history.note(float(second), 0.1, "r00", 1)
    steps = history.read(2000.0)
    assert len(steps) == 300 / STEP
    assert steps[-1].end == 2000
    assert all(step.images for step in steps)
    steps = history.read(9000.0)
    assert len(steps) == 300 / STEP
    assert not any(step.images for step in steps)


def test_many_latencies_are_a_sample():
    history = History(0.0)
    for number in range(20_000):
        history.note(1.0, number / 20_000, "r00", 1)
    (step,) = history.read(6.0)
    assert (len(step.latencies), step.answered.total()) == (512, 20_000)
    assert step.latencies_ms == pytest.approx((500, 990), abs=80)


def test_accuracy_of_what_answered():
    assert average_accuracy({"r00": 3, "r08": 1}, {"r00": 80.0, "r08": 60.0}) == 75
    assert average_accuracy({"r00": 3, "r08": 1}, {"r00": 80.0}) is None
    assert average_accuracy({}, {"r00": 80.0}) is None
