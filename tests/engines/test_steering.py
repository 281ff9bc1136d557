from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.engines.serving.simulation import Outcome, recorded, simulate, synthetic
from tocom_export.engines.serving.steering import Load, State, Steering
from tocom_export.errors import InputError

SECONDS = {0: 0.045, 4: 0.039, 8: 0.0335, 12: 0.028, 16: 0.0243}
"""What a request takes; r = 16 serves 1.85 times as many as r = 0."""
CAPACITY = 1 / SECONDS[0]
SLO = 0.25
LENGTH = 60


def steering(**changes: Any) -> Steering:
    return Steering(**{"seconds": SECONDS, "slo": SLO, **changes})


def degree_at(load: Load, state: State | None = None, **changes: Any) -> int:
    made = steering(**changes)
    return made.step(state or made.start(), load).degree


def waiting(queued: int, now: float = 0.0, waited: float = 0.0) -> Load:
    return Load(now, queued, waited)


def test_it_starts_at_the_best_degree():
    assert steering().start() == State(0)
    assert steering().start().slowdown == 1


@pytest.mark.parametrize(
    ("queued", "degree"), [(1, 0), (4, 0), (5, 4), (6, 12), (7, 12), (8, 16), (500, 16)]
)
def test_the_queue_is_to_be_served_within_the_latency(queued: int, degree: int):
    """With headroom: 0.2 of 0.25 s. Several degrees are taken at once."""
    assert degree_at(waiting(queued)) == degree


@pytest.mark.parametrize(
    ("waited", "degree"), [(0.154, 0), (0.156, 4), (0.165, 8), (0.17, 12), (0.175, 16), (9, 16)]
)
def test_what_the_oldest_request_has_waited_counts(waited: float, degree: int):
    assert degree_at(waiting(1, waited=waited)) == degree


def test_a_longer_latency_asks_for_less():
    assert degree_at(waiting(7), slo=0.4) == 0
    assert degree_at(waiting(1), slo=0.01) == 16


def test_workers_share_the_queue():
    assert degree_at(waiting(8), workers=2) == 0
    assert degree_at(waiting(9), workers=2) == 4
    assert degree_at(waiting(9), workers=3) == 0
    assert degree_at(waiting(1, waited=0.17), workers=8) == 12  # one request takes what it takes


def states(loads: list[Load], state: State, **changes: Any) -> list[State]:
    made, found = steering(**changes), [state]
    for load in loads:
        found.append(made.step(found[-1], load))
    return found[1:]


def test_the_next_slower_degree_is_taken_after_a_time_of_calm():
    calm = [waiting(1, now=7 + 0.25 * tick) for tick in range(12)]
    degrees = [state.degree for state in states(calm, State(16))]
    assert degrees == [16] * 4 + [12] * 5 + [8] * 3  # each one asks for a second anew
    assert [s.degree for s in states(calm, State(16), hold=2.5)] == [16] * 10 + [12] * 2


def test_without_holding_each_request_is_a_step():
    calm = [waiting(1, now=7)] * 6
    assert [s.degree for s in states(calm, State(16), hold=0)] == [12, 8, 4, 0, 0, 0]


def test_calm_that_is_interrupted_begins_anew():
    """Four at r = 12 would be answered in time, but not in half of it."""
    loads = [waiting(1, now=0), waiting(1, now=0.9), waiting(5, now=0.95), waiting(1, now=1.1)]
    found = states([*loads, waiting(1, now=2.0), waiting(1, now=2.2)], State(16))
    assert [s.degree for s in found] == [16, 16, 16, 16, 16, 12]
    assert [s.calm_since for s in found] == [0, 0, None, 1.1, 1.1, None]


def test_a_degree_that_was_just_taken_is_kept():
    found = states([waiting(1), waiting(7, now=5), waiting(1, now=5.1)], State(8, calm_since=None))
    assert [s.degree for s in found] == [8, 12, 12]
    assert found[1].calm_since is None
    assert found[2].calm_since == 5.1


def test_between_calm_and_late_nothing_changes():
    load = waiting(4, now=100)  # at r = 4, 0.156 s: in time, and more than half of it
    state = State(8, calm_since=1.0)
    assert steering().step(state, load) == State(8)


def test_floor_and_ceiling():
    assert steering(floor=4).start().degree == 4
    assert steering(floor=4, ceiling=8).ladder == (4, 8)
    assert steering(floor=5).ladder == (8, 12, 16)
    assert degree_at(waiting(500), ceiling=12) == 12
    calm = [waiting(1, now=tick) for tick in range(0, 100, 10)]
    assert {s.degree for s in states(calm, State(8), floor=8)} == {8}
    assert steering(floor=8, ceiling=8).ladder == (8,)


def test_a_degree_that_is_no_faster_is_left_out():
    assert steering(seconds={0: 0.045, 4: 0.05, 8: 0.045, 12: 0.03}).ladder == (0, 12)


@pytest.mark.parametrize(
    ("accuracy", "ladder"),
    [
        ({0: 80, 4: 79, 8: 78, 12: 77, 16: 76}, (0, 4, 8, 12, 16)),
        ({0: 80, 4: 79, 8: 77, 12: 78, 16: 76}, (0, 4, 12, 16)),  # r = 8: slower and worse
        ({0: 80, 4: 81, 8: 78, 12: 77, 16: 76}, (4, 8, 12, 16)),  # more than the dense model's
        ({0: 80, 4: 80, 8: 80, 12: 77, 16: 76}, (8, 12, 16)),
        ({0: 70, 4: 71, 8: 72, 12: 73, 16: 74}, (16,)),  # trained at 16
        ({0: 70, 4: 71, 8: 72, 12: 73}, (0, 4, 8, 12, 16)),  # not known everywhere: not used
        ({0: 70, 16: 99, 2: 1}, (0, 4, 8, 12, 16)),
    ],
)
def test_accuracy_says_which_degree_is_better(accuracy: dict[int, float], ladder: tuple[int, ...]):
    made = steering(accuracy=accuracy)
    assert made.ladder == ladder
    assert made.start().degree == ladder[0]


def test_accuracy_that_a_higher_degree_has_more_of():
    """Steps go along the ladder, not along the degrees."""
    found = steering(seconds={0: 0.02, 8: 0.04}, accuracy={0: 70, 8: 80})
    assert found.ladder == (8, 0)
    assert found.step(found.start(), waiting(9)).degree == 0
    calm = found.step(State(0, calm_since=0), waiting(1, now=1))
    assert calm.degree == 8


def test_accuracy_is_asked_for_within_floor_and_ceiling_alone():
    assert steering(accuracy={4: 70, 8: 75}, floor=4, ceiling=8).ladder == (8,)


def test_a_slowdown_is_learnt_and_forgotten():
    made = steering()
    state = made.start()
    for _ in range(100):
        state = made.measured(state, 0, 2 * SECONDS[0])
    assert state.slowdown == pytest.approx(2, abs=1e-3)
    assert made.step(made.start(), waiting(3)).degree == 0
    assert made.step(state, waiting(3)).degree == 12
    for _ in range(100):
        state = made.measured(state, 12, SECONDS[12])
    assert state.slowdown == pytest.approx(1, abs=1e-3)
    assert made.step(state, waiting(3)).degree == 0


def test_one_slow_request_changes_little():
    made = steering()
    state = made.measured(State(8, calm_since=3.0), 8, 2 * SECONDS[8])
    assert state == State(8, pytest.approx(1.1), 3.0)  # type: ignore[arg-type]


def test_a_slow_machine_is_not_calm():
    """Three at r = 4 would do on the machine that was measured."""
    load, hold = waiting(3, now=9), {"calm_since": 0.0}
    assert steering().step(State(8, 1.0, **hold), load).degree == 4
    assert steering().step(State(8, 1.2, **hold), load) == State(8, 1.2)


def test_a_slowdown_is_kept_with_the_degree():
    made = steering()
    assert made.step(State(0, 1.5), waiting(50)).slowdown == 1.5
    assert made.step(State(8, 1.5, 0.0), waiting(1, now=9)) == State(4, 1.5)


def test_it_is_a_function_of_what_it_is_given():
    made, state, load = steering(), State(4, 1.2, 0.5), waiting(2, now=3)
    assert made.step(state, load) == made.step(state, load)
    assert state == State(4, 1.2, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.degree = 8  # type: ignore[misc]


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40), st.floats(0, 1)), max_size=60),
    st.floats(0.3, 3),
    st.floats(0, 3),
)
def test_whatever_comes(loads: list[tuple[float, int, float]], slowdown: float, hold: float):
    """Never late where a degree would do, and one step slower at most, after ``hold`` seconds."""
    made = steering(hold=hold)
    state, now, changed = State(0, slowdown), 0.0, -math.inf
    for passed, queued, waited in loads:
        now += passed
        load = Load(now, queued, waited)
        after = made.step(state, load)
        each = {degree: seconds * slowdown for degree, seconds in SECONDS.items()}
        in_time = [d for d in each if max(waited, (queued - 1) * each[d]) + each[d] <= 0.799 * SLO]
        assert after.degree == 16 or any(after.degree >= degree for degree in in_time)
        if after.degree < state.degree:
            assert after.degree == state.degree - 4
            assert now - changed >= hold
        if after.degree != state.degree:
            changed = now
        state = after


@pytest.mark.parametrize(
    "changes",
    [
        {"floor": 17},
        {"floor": 8, "ceiling": 4},
        {"floor": 5, "ceiling": 7},
        {"ceiling": -1},
        {"seconds": {}},
    ],
    ids=str,
)
def test_no_degree_to_choose(changes: dict[str, Any]):
    with pytest.raises(InputError, match="no degree lies within floor and ceiling"):
        steering(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"slo": 0},
        {"slo": -1},
        {"workers": 0},
        {"hold": -0.1},
        {"slo": math.nan},
        {"hold": math.nan},
        {"seconds": {0: 0.045, 8: math.nan}},
        {"seconds": {0: 0.045, 8: 0}},
        {"seconds": {0: -0.045, 8: 0.03}},
    ],
    ids=str,
)
def test_numbers_that_are_not_positive(changes: dict[str, Any]):
    with pytest.raises(InputError, match="are positive numbers"):
        steering(**changes)


def served(
    shape: str,
    seed: int = 0,
    slowdown: Callable[[float], float] = lambda _: 1.0,
    **changes: Any,
) -> Outcome:
    arrivals = synthetic(shape, CAPACITY, LENGTH, seed)
    return simulate(arrivals, steering(**changes), slowdown)


DENSE = {"floor": 0, "ceiling": 0}
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_bursts(seed: int):
    """Beyond what the dense model can serve for a while, and within what r = 16 can."""
    steered, dense = served("burst", seed), served("burst", seed, **DENSE)
    assert dense.met < 60
    assert steered.met >= 95
    assert steered.mean_degree < 12
    assert steered.p99_ms < dense.p99_ms / 10


@SEEDS
def test_a_ramp(seed: int):
    steered, dense = served("ramp", seed), served("ramp", seed, **DENSE)
    assert dense.met < 60
    assert steered.met >= 95
    assert steered.mean_degree < 12


@SEEDS
def test_steady_requests(seed: int):
    """Three quarters of the time the dense model, or close to it, and nobody is late."""
    steered = served("steady", seed)
    assert steered.met == 100 > served("steady", seed, **DENSE).met
    assert steered.mean_degree < 6
    assert served("steady", seed, slo=1.0).mean_degree == 0


@SEEDS
def test_more_than_any_degree_can_serve(seed: int):
    """It stays at the fastest, which leaves the shortest queue."""
    steered, dense = served("overload", seed), served("overload", seed, **DENSE)
    fastest = served("overload", seed, floor=16, ceiling=16)
    assert steered.mean_degree > 15.9
    assert steered.met >= dense.met
    assert steered.switches <= 4
    assert steered.p99_ms < 0.3 * dense.p99_ms
    assert steered.p99_ms == pytest.approx(fastest.p99_ms, rel=0.01)


@SEEDS
def test_a_machine_that_becomes_slower(seed: int):
    def slower(now: float) -> float:
        return 1.0 if now < LENGTH / 2 else 1.3

    steered, dense = served("steady", seed, slower), served("steady", seed, slower, **DENSE)
    assert steered.met >= 99
    assert dense.met < 85
    assert steered.mean_degree > served("steady", seed).mean_degree + 1


@SEEDS
@pytest.mark.parametrize("shape", ["steady", "burst", "ramp", "overload"])
def test_the_degree_does_not_flutter(shape: str, seed: int):
    assert served(shape, seed).switches <= 50
    assert served(shape, seed, hold=10).switches <= 20
    if shape != "overload":
        assert served(shape, seed, hold=0).switches > served(shape, seed).switches


def test_recorded_arrivals():
    """Those of the eight clients of scripts/soak.py in its first seconds."""
    arrivals = recorded(Path(__file__).with_name("arrivals.txt"))
    dense = 1.3 * float(arrivals[-1]) / len(arrivals)  # too slow for them by 30 %
    seconds = {degree: dense * took / SECONDS[0] for degree, took in SECONDS.items()}
    slo = 8 * dense
    steered = simulate(arrivals, Steering(seconds, slo))
    fixed = simulate(arrivals, Steering(seconds, slo, floor=0, ceiling=0))
    assert fixed.met < 60
    assert steered.met > 95
    assert steered.mean_degree < 16
