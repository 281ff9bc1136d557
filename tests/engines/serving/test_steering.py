from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.engines.serving.arrivals import draw_arrivals, read_arrivals
from tocom_export.engines.serving.policy import Load, State
from tocom_export.engines.serving.simulation import Outcome, simulate
from tocom_export.engines.serving.steering import Steering
from tocom_export.errors import InputError

SECONDS = {"r00": 0.045, "r04": 0.039, "r08": 0.0335, "r12": 0.028, "r16": 0.0243}
"""What a request takes; r16 serves 1.85 times as many as r00."""
LADDER = list(SECONDS)
CAPACITY = 1 / SECONDS["r00"]
SLO = 0.255
"""Of which 0.2295 s are planned with."""
LENGTH = 60
BATCHED = {
    name: {1: took, 2: 1.6 * took, 4: 2.8 * took, 8: 5.2 * took} for name, took in SECONDS.items()
}
"""As on a device that a batch fills better."""


def steering(**changes: Any) -> Steering:
    return Steering(**{"seconds": SECONDS, "slo": SLO, **changes})


def state_at(load: Load, state: State | None = None, **changes: Any) -> State:
    made = steering(**changes)
    return made.step(state or made.start(), load)


def variant_at(load: Load, state: State | None = None, **changes: Any) -> str:
    return state_at(load, state, **changes).variant


def waiting(queued: int, now: float = 0.0, waited: float = 0.0) -> Load:
    return Load(now, queued, waited)


def test_it_starts_with_the_best_variant():
    assert steering().start() == State("r00")
    assert steering().start().slowdown == 1


@pytest.mark.parametrize(
    ("queued", "variant"),
    [(1, "r00"), (5, "r00"), (6, "r08"), (7, "r12"), (8, "r12"), (9, "r16"), (500, "r16")],
)
def test_the_queue_is_to_be_served_within_the_latency(queued: int, variant: str):
    """It may be several variants faster at once."""
    assert variant_at(waiting(queued)) == variant


@pytest.mark.parametrize(
    ("waited", "variant"),
    [(0.183, "r00"), (0.186, "r04"), (0.193, "r08"), (0.2, "r12"), (0.203, "r16"), (9, "r16")],
)
def test_what_the_oldest_request_has_waited_counts(waited: float, variant: str):
    assert variant_at(waiting(1, waited=waited)) == variant


def test_a_longer_latency_asks_for_less():
    assert variant_at(waiting(7), slo=0.4) == "r00"
    assert variant_at(waiting(1), slo=0.01) == "r16"


def test_workers_share_the_queue():
    assert variant_at(waiting(10), workers=2) == "r00"
    assert variant_at(waiting(11), workers=2) == "r08"
    assert variant_at(waiting(11), workers=3) == "r00"
    # One request takes what it takes.
    assert variant_at(waiting(1, waited=0.2), workers=8) == "r12"


@pytest.mark.parametrize(
    ("slacks", "variant"),
    [
        ((0.25, 0.25, 0.25), "r00"),
        ((0.2, 0.15, 0.1), "r16"),  # 0.0729 of 0.0745 s
        ((0.25, 0.25, 0.12), "r12"),  # 0.084 of 0.0945 s
        ((0.06, 0.25, 0.25), "r08"),
        ((0.01, 9, 9), "r16"),  # it can't be helped
        ((9, 9, 9), "r00"),
    ],
)
def test_each_request_may_have_a_latency_of_its_own(slacks: tuple[float, ...], variant: str):
    assert variant_at(Load(0, 3, 5.0, slacks)) == variant


def test_of_requests_between_oldest_and_newest_it_is_assumed_that_they_came_evenly():
    for workers, waited, queued in product((1, 2, 3), (0.0, 0.05, 0.1, 0.15, 0.2), range(1, 30)):
        slacks = [SLO - waited * (1 - i / max(1, queued - 1)) for i in range(queued)]
        options = {"seconds": BATCHED, "workers": workers}
        known = state_at(Load(0, queued, waited, slacks), **options)
        assert known == state_at(waiting(queued, waited=waited), **options)


@pytest.mark.parametrize(
    ("rate", "spread", "variant"),
    [(0, 1, "r00"), (30.5, 1, "r00"), (30.8, 1, "r04"), (31.1, 1, "r08"), (31.3, 1, "r12"),
     (33, 1, "r16"), (99, 1, "r16"), (15, 4, "r00"), (20, 4, "r16"), (20, 99, "r16"),
     (15, 99, "r00"), (37, 0.25, "r00"), (40, 0.25, "r16"), (37, 0, "r00"), (40, 0, "r16")],
)  # fmt: skip
def test_a_server_that_is_busy_takes_no_risk(rate: float, spread: float, variant: str):
    """What the fastest can't make up for is not begun: it serves 41 a second."""
    assert variant_at(waiting(1), State("r00", rate=rate, variance=spread * rate)) == variant


def test_how_many_come_is_learnt_from_the_queue():
    """From those that wait and were not there, over the time since; at first slowly."""
    made = steering()
    state = made.step(made.start(), waiting(3, now=7.0))
    assert (state.rate, state.seen, state.left) == (0, 7.0, 2)
    state = made.step(state, waiting(6, now=7.1))  # four more
    share = 1 - math.exp(-0.1 / (4 * SLO))
    assert state.rate == pytest.approx(40 * share)
    assert (state.seen, state.left) == (7.1, 5)
    assert made.step(state, waiting(6, now=7.1)).rate == state.rate  # another worker
    state = made.step(state, waiting(1, now=7.2))  # some gave up
    assert state.rate == pytest.approx(40 * share * (1 - share))
    for tick in range(100):
        state = made.step(state, waiting(1, now=8 + 0.05 * tick))
    assert state.rate == pytest.approx(20, rel=0.05)


def learn_spread(gaps: list[float]) -> float:
    """Of arrivals that are counted every 0.1 s, variance over mean."""
    made, arrivals = steering(), np.cumsum(gaps)
    rate = len(gaps) / float(arrivals[-1])
    state = State("r00", rate=rate, variance=rate, seen=0.0)
    for now in np.arange(0.1, arrivals[-1], 0.1):
        came = int(((arrivals > now - 0.1) & (arrivals <= now)).sum())
        state = made.step(dataclasses.replace(state, left=0), waiting(came, now=float(now)))
    return state.variance / rate


def test_how_unevenly_they_come_is_learnt_too():
    rng = np.random.default_rng(0)
    assert learn_spread([0.01] * 4000) < 0.25
    assert 0.6 < learn_spread(list(rng.exponential(0.01, 4000))) < 1.6
    assert learn_spread(([0.0001] * 19 + [0.1981]) * 200) > 4


def test_a_look_between_two_batches():
    """It is for a request that comes then, and doesn't count as one."""
    made = steering()
    busy = made.step(State("r16", rate=60.0, seen=7.0, left=0), waiting(2, now=7.05))
    assert busy.variant == "r16"
    idle = made.step(made.step(busy, Load(7.2, 0, 0.0)), Load(14.0, 0, 0.0))
    assert (idle.variant, idle.batch, idle.left, idle.seen) == ("r00", 1, 0, 14.0)
    assert idle.rate < 0.1
    straight = made.step(busy, Load(14.0, 0, 0.0))
    assert straight.rate == pytest.approx(idle.rate)


def test_the_better_variant_is_taken_as_soon_as_it_will_do():
    assert variant_at(waiting(1), State("r16")) == "r00"
    assert variant_at(waiting(6), State("r16")) == "r08"


def states(loads: list[Load], state: State, **changes: Any) -> list[State]:
    made, found = steering(**changes), [state]
    for load in loads:
        found.append(made.step(found[-1], load))
    return found[1:]


def test_holding_a_variant():
    """A better one is taken after it would have done for so long; a faster one at once."""
    calm = [waiting(1, now=7 + 0.25 * tick) for tick in range(6)]
    found = states([*calm, waiting(9, now=9), waiting(1, now=9.1)], State("r12"), hold=1.0)
    assert [s.variant for s in found] == ["r12"] * 4 + ["r00"] * 2 + ["r16"] * 2
    assert [s.calm_since for s in found] == [7, 7, 7, 7, None, None, None, 9.1]


def test_calm_that_is_interrupted_begins_anew():
    loads = [waiting(1, now=0), waiting(1, now=0.9), waiting(1, now=0.95, waited=0.198)]
    loads += [waiting(1, now=1.1), waiting(1, now=2.0), waiting(1, now=2.2)]
    found = states(loads, State("r12"), hold=1.0)
    assert [s.variant for s in found] == ["r12", "r12", "r12", "r12", "r12", "r00"]
    assert [s.calm_since for s in found] == [0, 0, None, 1.1, 1.1, None]


def test_a_variant_that_is_held_is_given_up_for_a_faster_one():
    state = State("r08", calm_since=3.0)
    assert variant_at(waiting(9, now=3.5), state, hold=1.0) == "r16"
    found = state_at(waiting(7, now=3.5), State("r16", calm_since=3.0), hold=1.0)
    assert (found.variant, found.calm_since) == ("r16", 3.0)  # r12 would do


@pytest.mark.parametrize(
    ("queued", "variant", "batch"),
    [(1, "r00", 1), (3, "r00", 3), (5, "r00", 5), (7, "r00", 4), (8, "r04", 8), (12, "r16", 8),
     (14, "r16", 8), (16, "r16", 8), (40, "r16", 8)],
)  # fmt: skip
def test_batches(queued: int, variant: str, batch: int):
    """That by which all are served soonest, unless one that comes now were late by it."""
    found = state_at(waiting(queued), seconds=BATCHED)
    assert (found.variant, found.batch, found.left) == (variant, batch, queued - batch)


def test_batches_where_some_are_late_whatever_is_done():
    """Those that can be are answered in time: eight together would all be late."""
    found = state_at(Load(0, 12, 0.2), seconds=BATCHED)
    assert (found.variant, found.batch) == ("r16", 2)
    found = state_at(Load(0, 12, 0.15), seconds=BATCHED)
    assert (found.variant, found.batch) == ("r16", 4)
    assert state_at(Load(0, 12, 9.0), seconds=BATCHED).batch == 8  # all late


def test_a_batch_that_an_old_request_can_t_wait_for():
    """Alone it is answered in time; with three others it wouldn't be."""
    assert state_at(Load(0, 4, 0.1), seconds=BATCHED).batch == 4
    assert state_at(Load(0, 4, 0, (0.08, 0.25, 0.25, 0.25)), seconds=BATCHED).batch == 1


def test_batches_are_no_larger_than_asked_for():
    assert state_at(waiting(40)).batch == 1
    assert state_at(waiting(40), seconds=BATCHED, max_batch=6).batch == 6
    assert state_at(waiting(3), seconds=BATCHED, max_batch=1).batch == 1


def test_workers_share_batches():
    """Two of four rather than one of eight."""
    assert state_at(waiting(8), seconds=BATCHED, workers=2).batch == 4
    assert state_at(waiting(8), seconds=BATCHED, workers=8).batch == 1


def test_some_variants_to_choose_from():
    assert steering(variants=["r04", "r08"]).start().variant == "r04"
    # Their order is that of their quality; one that is slower than a better one is of no use.
    assert steering(variants=["r08", "r04"]).ladder == ("r08",)
    assert steering(variants=["r08", "r12", "r16"]).ladder == ("r08", "r12", "r16")
    assert variant_at(waiting(500), variants=["r00", "r04", "r12"]) == "r12"
    assert variant_at(waiting(1), State("r12"), variants=("r08", "r12")) == "r08"
    assert steering(variants=["r08"]).ladder == ("r08",)


def test_of_variants_that_are_equally_fast_the_first_is_kept():
    assert steering(seconds={"r00": 0.045, "r08": 0.045, "r12": 0.03}).ladder == ("r00", "r12")


def test_a_slower_variant_counts_as_better_where_accuracies_are_not_known():
    """Whatever it is called."""
    seconds = {"fast": 0.03, "r00": 0.045, "careful": 0.05}
    assert steering(seconds=seconds).ladder == ("careful", "r00", "fast")


@pytest.mark.parametrize(
    ("accuracy", "ladder"),
    [
        (
            {"r00": 80, "r04": 79, "r08": 78, "r12": 77, "r16": 76},
            ("r00", "r04", "r08", "r12", "r16"),
        ),
        (
            {"r00": 80, "r04": 79, "r08": 77, "r12": 78, "r16": 76},
            ("r00", "r04", "r12", "r16"),
        ),  # r08: slower and worse
        (
            {"r00": 80, "r04": 81, "r08": 78, "r12": 77, "r16": 76},
            ("r04", "r08", "r12", "r16"),
        ),  # more than the dense model's
        ({"r00": 80, "r04": 80, "r08": 80, "r12": 77, "r16": 76}, ("r08", "r12", "r16")),
        ({"r00": 70, "r04": 71, "r08": 72, "r12": 73, "r16": 74}, ("r16",)),  # trained at 16
        (
            {"r00": 70, "r04": 71, "r08": 72, "r12": 73},
            ("r00", "r04", "r08", "r12", "r16"),
        ),  # not known everywhere: not used
        ({"r00": 70, "r16": 99, "r02": 1}, ("r00", "r04", "r08", "r12", "r16")),
    ],
)
def test_accuracy_says_which_variant_is_better(accuracy: dict[str, float], ladder: tuple[str, ...]):
    made = steering(accuracy=accuracy)
    assert made.ladder == ladder
    assert made.start().variant == ladder[0]


def test_a_variant_that_is_faster_and_listed_first():
    """Steps go along the ladder, not along the order of the variants."""
    found = steering(seconds={"r00": 0.02, "r08": 0.04}, accuracy={"r00": 70, "r08": 80})
    assert found.ladder == ("r08", "r00")
    assert found.step(found.start(), waiting(9)).variant == "r00"
    assert found.step(State("r00"), waiting(1)).variant == "r08"


def test_accuracy_is_asked_for_of_the_variants_to_choose_from_alone():
    assert steering(accuracy={"r04": 70, "r08": 75}, variants=["r04", "r08"]).ladder == ("r08",)


def test_a_slowdown_is_learnt_and_forgotten():
    made = steering()
    state = made.start()
    for _ in range(100):
        state = made.observe(state, "r00", 2 * SECONDS["r00"])
    assert state.slowdown == pytest.approx(2, abs=1e-3)
    assert made.step(made.start(), waiting(3)).variant == "r00"
    assert made.step(state, waiting(3)).variant == "r08"
    for _ in range(100):
        state = made.observe(state, "r12", SECONDS["r12"])
    assert state.slowdown == pytest.approx(1, abs=1e-3)
    assert made.step(state, waiting(3)).variant == "r00"


def test_a_slowdown_is_learnt_from_batches():
    made = steering(seconds=BATCHED)
    assert made.observe(made.start(), "r00", 2.8 * SECONDS["r00"], 4) == made.start()
    assert made.observe(made.start(), "r00", 2.8 * SECONDS["r00"], 1).slowdown > 1.1


def test_one_slow_request_changes_little():
    made = steering()
    state = made.observe(State("r08", calm_since=3.0), "r08", 2 * SECONDS["r08"])
    assert state == State("r08", pytest.approx(1.1), 3.0)  # type: ignore[arg-type]


def test_a_slowdown_is_kept_with_the_variant():
    assert state_at(waiting(50), State("r00", 1.5)).slowdown == 1.5
    assert state_at(waiting(1, now=9), State("r08", 1.5, 0.0)).slowdown == 1.5


def test_it_is_a_function_of_what_it_is_given():
    made, state, load = steering(), State("r04", 1.2, 0.5), waiting(2, now=3)
    assert made.step(state, load) == made.step(state, load)
    assert state == State("r04", 1.2, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.variant = "r08"  # type: ignore[misc]


@st.composite
def machines(draw: st.DrawFn) -> dict[str, dict[int, float]]:
    """Times of up to five variants, each faster than the one before at every batch."""
    fixed, each = draw(st.floats(0, 0.1)), draw(st.floats(0.001, 0.05))
    factors = sorted({1.0, *draw(st.lists(st.floats(0.3, 0.99), max_size=4))}, reverse=True)
    sizes = {1, *draw(st.lists(st.integers(2, 32), max_size=3))}
    return {
        f"v{number}": {size: factor * (fixed + each * size) for size in sizes}
        for number, factor in enumerate(factors)
    }


CONDITIONS = {
    "seconds": machines(),
    "state": st.builds(
        State,
        st.just("v0"),
        st.floats(0.5, 3),
        rate=st.floats(0, 200),
        variance=st.floats(0, 900),
        seen=st.none() | st.floats(0, 0.99),
        left=st.integers(0, 30),
    ),
    "workers": st.integers(1, 3),
    "queued": st.integers(1, 60),
    "waited": st.floats(0, 0.5),
    "more": st.tuples(st.integers(0, 9), st.floats(0, 0.2), st.floats(0, 1)),
}


@given(**CONDITIONS)
def test_more_load_never_asks_for_a_better_variant(
    seconds, state: State, workers: int, queued: int, waited: float, more
):
    """More that wait, or longer, or on a slower machine."""
    made = Steering(seconds, 0.3, workers=workers)
    before = made.step(state, Load(1, queued, waited))
    queued, waited = queued + more[0], waited + more[1]
    state = dataclasses.replace(state, slowdown=state.slowdown + more[2])
    after = made.step(state, Load(1, queued, waited))
    assert made.ladder.index(after.variant) >= made.ladder.index(before.variant)


@given(**{**CONDITIONS, "more": st.floats(0, 200)})
def test_more_that_come_never_ask_for_a_better_variant(
    seconds, state: State, workers: int, queued: int, waited: float, more: float
):
    made, state = Steering(seconds, 0.3, workers=workers), dataclasses.replace(state, seen=None)
    load = Load(1, queued, waited)
    before = made.step(state, load)
    for changed in ({"rate": state.rate + more}, {"variance": state.variance + more}):
        after = made.step(dataclasses.replace(state, **changed), load)
        assert made.ladder.index(after.variant) >= made.ladder.index(before.variant)


@given(**{**CONDITIONS, "more": st.lists(st.floats(0.01, 1), min_size=1, max_size=40)})
def test_all_that_wait_are_answered_in_time_wherever_one_variant_could(
    seconds, state: State, workers: int, queued: int, waited: float, more: list[float]
):
    """And the best one where it alone could, and few come."""
    made = Steering(seconds, 0.3, workers=1)
    slacks, slowdown = sorted(more), state.slowdown
    found = made.step(state, Load(1, len(slacks), waited, slacks))
    assert 1 <= found.batch <= min(len(slacks), made.times.largest)
    assert found.left == len(slacks) - found.batch

    def in_time(variant: str, batch: int, share: float) -> bool:
        times = [made.times.take(variant, min(batch, len(slacks) - first)) * slowdown
                 for first in range(0, len(slacks), batch)]  # fmt: skip
        done = [sum(times[: n // batch + 1]) for n in range(len(slacks))]
        return all(d <= s - 0.3 * (1 - share) for d, s in zip(done, slacks, strict=True))

    batches = made.times.list_batches(len(slacks))
    if any(in_time(name, batch, 0.89) for name in made.ladder for batch in batches):
        assert in_time(found.variant, found.batch, 0.9 - 1e-6)
    if found.variant != made.ladder[-1]:
        assert in_time(found.variant, found.batch, 0.9 - 1e-6)


@given(machines(), st.floats(0.5, 3))
def test_a_request_alone_gets_the_best_variant_that_can_answer_it(seconds, slowdown: float):
    made = Steering(seconds, 0.3)
    found = made.step(State(made.ladder[-1], slowdown), Load(1, 1, 0.05))
    fastest = made.times.take(made.ladder[-1], 1)
    for name in made.ladder:
        took = made.times.take(name, 1)
        if slowdown * took <= 0.219 and slowdown * (took + fastest) <= 0.269:
            assert made.ladder.index(found.variant) <= made.ladder.index(name)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40), st.floats(0, 1)), max_size=60),
    st.floats(0, 3),
)
def test_a_variant_that_is_held(loads: list[tuple[float, int, float]], hold: float):
    """It changes for a better one only after so many seconds, whatever comes."""
    made = steering(hold=hold)
    state, now, changed = made.start(), 0.0, -math.inf
    for passed, queued, waited in loads:
        now += passed
        after = made.step(state, Load(now, queued, waited))
        if after.variant < state.variant:
            assert now - changed >= hold
        if after.variant != state.variant:
            changed = now
        state = after


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": {}},
        {"variants": []},
        {"seconds": {}, "variants": []},
    ],
    ids=str,
)
def test_no_variant_to_choose(changes: dict[str, Any]):
    with pytest.raises(InputError, match="`variants`: steering needs at least one"):
        steering(**changes)


def test_variants_of_which_no_time_is_known():
    with pytest.raises(InputError, match=r"`variants` fast, r17: `seconds` .* has r00, r04, "):
        steering(variants=["r08", "fast", "r17"])


@pytest.mark.parametrize("variant, seconds", [("fast", 0.1), ("r08", 0), ("r08", math.nan)])
def test_what_can_t_have_been_measured(variant: str, seconds: float):
    made = steering()
    with pytest.raises(InputError, match=f"variant {variant} can't have taken"):
        made.observe(made.start(), variant, seconds)


@pytest.mark.parametrize(
    "changes",
    [
        {"slo": 0},
        {"slo": -1},
        {"workers": 0},
        {"hold": -0.1},
        {"slo": math.nan},
        {"hold": math.nan},
        {"seconds": {"r00": 0.045, "r08": math.nan}},
        {"seconds": {"r00": 0.045, "r08": 0}},
        {"seconds": {"r00": -0.045, "r08": 0.03}},
    ],
    ids=str,
)
def test_numbers_that_are_not_positive(changes: dict[str, Any]):
    with pytest.raises(InputError, match="are positive numbers"):
        steering(**changes)


def test_a_batch_that_is_none():
    with pytest.raises(InputError, match="`max_batch`: batches are whole numbers"):
        steering(max_batch=0)


def served(
    shape: str,
    seed: int = 0,
    slowdown: Callable[[float], float] = lambda _: 1.0,
    **changes: Any,
) -> Outcome:
    arrivals = draw_arrivals(shape, CAPACITY, LENGTH, seed)
    return simulate(arrivals, steering(**changes), slowdown)


def mean_degree(outcome: Outcome) -> float:
    return sum(int(name[1:]) * share / 100 for name, share in outcome.shares.items())


DENSE = {"variants": ["r00"]}
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_bursts(seed: int):
    """Beyond what the dense model can serve for a while, and within what r16 can."""
    steered, dense = served("burst", seed), served("burst", seed, **DENSE)
    assert dense.met < 60
    assert steered.met >= 97
    assert mean_degree(steered) < 12
    assert steered.p99_ms < dense.p99_ms / 10


@SEEDS
def test_a_ramp(seed: int):
    steered, dense = served("ramp", seed), served("ramp", seed, **DENSE)
    assert dense.met < 60
    assert steered.met >= 95
    assert mean_degree(steered) < 12


@SEEDS
def test_steady_requests(seed: int):
    """Nearly all of the time the dense model, and nobody is late."""
    steered = served("steady", seed)
    assert steered.met >= 99.5 > served("steady", seed, **DENSE).met
    assert steered.shares["r00"] > 90
    assert mean_degree(served("steady", seed, slo=1.0)) == 0


@SEEDS
def test_more_than_any_variant_can_serve(seed: int):
    """It stays at the fastest, which leaves the shortest queue."""
    steered, dense = served("overload", seed), served("overload", seed, **DENSE)
    fastest = served("overload", seed, variants=["r16"])
    assert mean_degree(steered) > 15.9
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
    assert mean_degree(steered) > mean_degree(served("steady", seed)) + 1


@SEEDS
def test_holding_makes_for_fewer_changes(seed: int):
    assert served("burst", seed, hold=1).switches < 0.5 * served("burst", seed).switches
    assert served("burst", seed, hold=10).switches <= 20


def test_arrivals_from_a_file():
    """Those of the eight clients of scripts/soak.py in its first seconds."""
    arrivals = read_arrivals(Path(__file__).with_name("arrivals.txt"))
    dense = 1.3 * float(arrivals[-1]) / len(arrivals)  # too slow for them by 30 %
    seconds = {name: dense * took / SECONDS["r00"] for name, took in SECONDS.items()}
    slo = 8 * dense
    steered = simulate(arrivals, Steering(seconds, slo))
    fixed = simulate(arrivals, Steering(seconds, slo, variants=["r00"]))
    assert fixed.met < 60
    assert steered.met > 95
    assert mean_degree(steered) < 16
