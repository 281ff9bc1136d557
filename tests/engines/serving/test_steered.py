"""The variant of each call of a server, from what the calls alone tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.serving import steered
from tocom_export.engines.serving.steered import Steered, measure_seconds

SECONDS = {"r00": {1: 0.04, 4: 0.16}, "r08": {1: 0.03, 4: 0.12}, "r16": {1: 0.02, 4: 0.08}}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(fresh: Bundle, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steered]:
    """One whose variants take what is said above, with calls of 8 images at the most."""
    monkeypatch.setattr(steered, "measure_seconds", lambda pool, largest: SECONDS)

    def call(slo: float) -> Steered:
        with EnginePool(fresh.path, threads=1) as pool:
            return Steered(pool, slo, 8, 0.001, clock)

    return call


def serve(found: Steered, clock: Clock, images: int) -> str:
    """One call, which takes what it should; the clock stands at its end."""
    found.begin(images)
    variant = found.choose()
    took = images * SECONDS[variant][1]
    clock.now += took
    found.observe(variant, images, took)
    found.end()
    return variant


def test_what_is_measured(fresh: Bundle):
    with EnginePool(fresh.path, threads=1) as pool:
        found = measure_seconds(pool, 32)
        assert {name: {*sizes} for name, sizes in found.items()} == {
            "r00": {1, 4}, "r08": {1, 4}, "r16": {1, 4}
        }  # fmt: skip
        assert all(0 < took < 10 for sizes in found.values() for took in sizes.values())
        assert {*measure_seconds(pool, 2)["r08"]} == {1, 2}
        assert {*measure_seconds(pool, 1)["r08"]} == {1}


def test_single_requests_get_the_best(make: Any, clock: Clock):
    found = make(0.2)
    for _ in range(10):
        clock.now += 1
        assert serve(found, clock, 1) == "r00"


def test_the_more_come_at_once_the_faster(make: Any, clock: Clock):
    """All of a call have to be answered within 0.9 of 0.2 s."""
    chosen = []
    for images in (1, 4, 8):
        found = make(0.2)
        clock.now += 10
        chosen.append(serve(found, clock, images))
    assert chosen[0] == "r00"
    assert chosen[-1] == "r16"
    assert chosen == sorted(chosen)


def test_calls_one_after_another_have_waited(make: Any, clock: Clock):
    """The same three images: best after a pause, faster where they came while others ran."""
    found = make(0.2)
    clock.now += 10
    serve(found, clock, 3)
    busy = [serve(found, clock, 3) for _ in range(5)]
    assert busy[-1] > "r00"
    clock.now += 100
    assert serve(found, clock, 1) == "r00"


def test_variants_that_it_knows(make: Any):
    found = make(0.2)
    assert found.knows("r08")
    assert not found.knows("fast")
