from __future__ import annotations

import math
from typing import Any

import pytest

from tocom_export.engines.serving.service_times import ServiceTimes
from tocom_export.errors import InputError

TABLE = {"r00": {1: 4.0, 2: 6.0, 8: 18.0}, "r16": {2: 3.0, 4: 5.0}}


def test_one_time_is_that_of_one_request():
    times = ServiceTimes.of({"r00": 0.5, "r08": 0.25})
    assert (times.largest, times.sizes) == (1, (1,))
    assert times.took == {"r00": [0, 0.5], "r08": [0, 0.25]}
    assert times.take("r08", 3) == 0.75


def test_times_of_some_batches():
    times = ServiceTimes.of(TABLE)
    assert (times.largest, times.sizes) == (8, (1, 2, 4, 8))
    assert times.took["r00"] == [0, 4, 6, 8, 10, 12, 14, 16, 18]
    assert times.took["r16"] == [0, 3, 3, 4, 5, 6.25, 7.5, 8.75, 10]
    assert times.take("r16", 16) == 20


def test_no_larger_batch_than_asked_for():
    times = ServiceTimes.of(TABLE, 3)
    assert (times.largest, times.sizes) == (3, (1, 2, 3))
    assert times.took["r00"] == [0, 4, 6, 8]
    larger = ServiceTimes.of({"r00": 0.5}, 4)
    assert (larger.largest, larger.sizes) == (4, (1, 4))
    assert larger.took["r00"] == [0, 0.5, 1, 1.5, 2]


def test_times_that_were_measured_badly():
    """A larger batch never takes less."""
    assert ServiceTimes.of({"r00": {1: 3, 2: 2, 3: 4}}).took["r00"] == [0, 3, 3, 4]


@pytest.mark.parametrize(
    ("queued", "batches"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (500, [1, 2, 4, 8])],
)
def test_batches_worth_considering(queued: int, batches: list[int]):
    assert ServiceTimes.of(TABLE).list_batches(queued) == batches


def test_variants_are_ranked_by_what_they_take_at_the_largest_batch():
    """Few images don't fill a device: removing tokens may cost more than it spares."""
    times = ServiceTimes.of({"r00": {1: 2, 8: 8}, "r08": {1: 3, 8: 5}, "r16": {1: 2.5, 8: 6}})
    assert times.rank(None, {}) == ("r00", "r16", "r08")
    assert times.rank(("r00", "r08", "r16"), {}) == ("r00", "r08")
    assert times.rank(None, {"r00": 80, "r08": 81, "r16": 79}) == ("r08",)


def test_a_slowdown_is_learnt_from_batches():
    times = ServiceTimes.of(TABLE)
    assert times.learn(1.0, "r00", 12.0, 2) == pytest.approx(1.1)
    assert times.learn(1.5, "r00", 18.0, 8) == pytest.approx(1.45)
    assert times.learn(1.0, "r16", 20.0, 16) == pytest.approx(1)


@pytest.mark.parametrize(
    ("variant", "seconds", "batch"),
    [("fast", 0.1, 1), ("r00", 0, 1), ("r00", math.nan, 1), ("r00", math.inf, 1), ("r00", 1, 0)],
)
def test_what_can_t_have_been_measured(variant: str, seconds: float, batch: int):
    with pytest.raises(InputError, match=f"variant {variant} can't have taken {seconds} s"):
        ServiceTimes.of(TABLE).learn(1.0, variant, seconds, batch)


@pytest.mark.parametrize(
    "seconds",
    [{"r00": 0}, {"r00": -1}, {"r00": math.nan}, {"r00": math.inf}, {"r00": {1: 1, 2: 0}},
     {"r00": {}}],
    ids=str,
)  # fmt: skip
def test_times_that_are_none(seconds: Any):
    with pytest.raises(InputError, match="`seconds`: times are positive numbers"):
        ServiceTimes.of(seconds)


@pytest.mark.parametrize(
    ("sizes", "largest"),
    [((0, 1), None), ((1, 1025), None), ((1.5,), None), ((1,), 0), ((1,), 1.5)],
)
def test_batches_that_are_none(sizes: tuple[Any, ...], largest: Any):
    with pytest.raises(InputError, match="batches are whole numbers, 1 to 1024"):
        ServiceTimes.of({"r00": dict.fromkeys(sizes, 1.0)}, largest)
