from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from tocom_export.engines.serving.policy import Load, State
from tocom_export.engines.serving.simulation import (
    compare_steering,
    simulate,
    summarise_requests,
)
from tocom_export.engines.serving.steering import Steering


def test_a_summary():
    names = ["r00", "fast", "fast", "r04"]
    accuracy = {"r00": 80.0, "fast": 70.0, "r04": 78.0, "r16": 60.0}
    found = summarise_requests([0.1, 0.2, 0.3, 0.4], names, 0.3, accuracy)
    assert dataclasses.asdict(found) == {
        "requests": 4, "met": 75, "shares": {"fast": 50, "r00": 25, "r04": 25},
        "accuracy": pytest.approx(74.5), "p50_ms": pytest.approx(250),
        "p95_ms": pytest.approx(385), "p99_ms": pytest.approx(397), "switches": 2,
    }  # fmt: skip
    assert list(found.shares) == ["fast", "r00", "r04"]  # the largest first
    assert dataclasses.asdict(summarise_requests([1.0], ["r16"], 0.5)) == {
        "requests": 1, "met": 0, "shares": {"r16": 100}, "accuracy": None, "p50_ms": 1000,
        "p95_ms": 1000, "p99_ms": 1000, "switches": 0,
    }  # fmt: skip


def test_the_accuracy_of_what_answered_alone_is_needed():
    assert summarise_requests([1.0], ["r16"], 0.5, {"r16": 75.5}).accuracy == 75.5
    assert summarise_requests([1.0, 1.0], ["r16", "r00"], 0.5, {"r16": 75.5}).accuracy is None


@pytest.fixture
def server() -> SimpleNamespace:
    """In place of a policy: r04 for the first two batches, "fast" for the others."""
    loads: list[Load] = []
    times: list[tuple[str, float, int]] = []

    def step(state: State, load: Load) -> State:
        loads.append(load)
        return State("r04" if len(loads) < 3 else "fast", batch=found.batch)

    def observe(state: State, variant: str, seconds: float, batch: int) -> State:
        times.append((variant, seconds, batch))
        return state

    found = SimpleNamespace(
        seconds={"r04": 0.5, "fast": {1: 0.25, 2: 0.375}}, slo=0.75, start=lambda: State("r04"),
        step=step, observe=observe, accuracy={"r04": 80, "fast": 75}, loads=loads, times=times,
        batch=1,
    )  # fmt: skip
    return found


def test_requests_are_served_one_after_another(server: SimpleNamespace):
    found = simulate(np.array([0, 0.125, 0.5, 0.75, 4]), server)
    assert server.loads == [
        Load(0, 1, 0),
        Load(0.5, 2, 0.375),  # one that comes at this moment waits, too
        Load(1, 2, 0.5),
        Load(1.25, 1, 0.5),
        Load(4, 1, 0),
    ]
    assert server.times == [("r04", 0.5, 1)] * 2 + [("fast", 0.25, 1)] * 3
    # latencies: 0.5, 0.875, 0.75, 0.75, 0.25
    assert (found.requests, found.met, found.p50_ms) == (5, 80, 750)
    assert (found.shares, found.switches) == ({"fast": 60, "r04": 40}, 1)
    assert found.accuracy == pytest.approx(77)


def test_batches_of_as_many_as_wait(server: SimpleNamespace):
    """A batch of a size that wasn't measured takes more in proportion."""
    server.batch = 3
    found = simulate(np.array([0, 0.125, 0.25, 1.25, 1.25, 3]), server)
    assert server.loads == [Load(0, 1, 0), Load(0.5, 2, 0.375), Load(1.5, 2, 0.25), Load(3, 1, 0)]
    assert server.times == [("r04", 0.5, 1), ("r04", 1, 2), ("fast", 0.375, 2), ("fast", 0.25, 1)]
    # latencies: 0.5, 1.375, 1.25, 0.625, 0.625, 0.25
    assert (found.requests, found.met) == (6, pytest.approx(100 * 4 / 6))
    assert found.shares == {"r04": 50, "fast": 50}


def test_times_that_scatter():
    """By so much, around the mean; the same with the same seed."""
    fixed = Steering({"r00": 1.0}, 9)
    arrivals = np.arange(0.0, 40_000, 20)
    even, scattered = simulate(arrivals, fixed), simulate(arrivals, fixed, scatter=0.2)
    assert (even.p50_ms, even.p99_ms) == (1000, 1000)
    assert scattered.p50_ms == pytest.approx(1000 * np.exp(-0.02), rel=0.02)
    assert scattered.p99_ms == pytest.approx(1000 * np.exp(-0.02 + 2.326 * 0.2), rel=0.04)
    assert simulate(arrivals, fixed, scatter=0.2, seed=0) == scattered
    assert simulate(arrivals, fixed, scatter=0.2, seed=1) != scattered


def test_a_slow_machine_is_measured_as_it_is(server: SimpleNamespace):
    """The slowdown is that of the moment when a request is begun."""
    slow: Callable[[float], float] = lambda now: 2.0 if now >= 1 else 1.0  # noqa: E731
    simulate(np.array([0, 0.75, 0.875, 1.5]), server, slow)
    assert server.times == [("r04", 0.5, 1), ("r04", 0.5, 1), ("fast", 0.5, 1), ("fast", 0.5, 1)]
    assert [load.now for load in server.loads] == [0, 0.75, 1.25, 1.75]


def test_a_fixed_variant():
    fixed = Steering({"r00": 0.5, "fast": 0.25}, 0.3, variants=["fast"])
    found = simulate(np.array([0.0, 0.25, 0.5, 0.5]), fixed)
    assert (found.shares, found.met, found.switches) == ({"fast": 100}, 75, 0)


@pytest.mark.parametrize("variants", [None, ["r00", "fast"]])
def test_steering_beside_each_variant_alone(variants: list[str] | None):
    seconds = {"r00": 0.5, "fast": 0.25} | ({"r16": 0.1} if variants else {})
    steering = Steering(seconds, 0.6, {"r00": 80, "fast": 75}, variants, hold=0)
    arrivals = np.array([0.0, 0.25, 0.5, 0.5, 9])
    found = compare_steering(steering, arrivals)
    assert found.steered == simulate(arrivals, steering)
    assert list(found.fixed) == ["r00", "fast"]
    for name, outcome in found.fixed.items():
        assert (outcome.shares, outcome.switches) == ({name: 100}, 0)
        assert outcome.accuracy == steering.accuracy[name]
    assert found.fixed["r00"].met < found.steered.met
