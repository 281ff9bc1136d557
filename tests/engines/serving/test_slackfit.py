from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.engines.serving.arrivals import draw_arrivals
from tocom_export.engines.serving.policy import Load, State
from tocom_export.engines.serving.simulation import simulate
from tocom_export.engines.serving.slackfit import SlackFit
from tocom_export.errors import InputError

SECONDS = {"r00": {1: 0.04, 2: 0.07, 4: 0.13}, "r16": {1: 0.02, 2: 0.032, 4: 0.056}}
SLO = 0.2


def pick(load: Load, state: State | None = None, **changes: Any) -> tuple[str, int]:
    made = SlackFit(**{"seconds": SECONDS, "slo": SLO, **changes})
    found = made.step(state or made.start(), load)
    return found.variant, found.batch


@pytest.mark.parametrize(
    ("queued", "waited", "picked"),
    [
        (1, 0, ("r00", 1)),
        (2, 0, ("r00", 2)),
        (4, 0, ("r00", 4)),
        (9, 0, ("r00", 4)),
        (4, 0.07, ("r00", 3)),  # 0.1 s; four in r16 take half of the time that is left
        (4, 0.1, ("r00", 2)),
        (4, 0.12, ("r16", 4)),  # 0.056 s of 0.06
        (4, 0.13, ("r16", 3)),
        (1, 0.155, ("r16", 1)),
        (1, 0.19, ("r16", 1)),  # late, whatever is done
        (4, 9, ("r16", 4)),
        (9, 9, ("r16", 4)),
    ],
)
def test_what_just_fits(queued: int, waited: float, picked: tuple[str, int]):
    assert pick(Load(0, queued, waited)) == picked


def test_of_batches_that_take_about_as_long_the_largest():
    """A sixteenth of the latency wanted is about as long."""
    seconds = {"r00": {1: 0.1, 2: 0.2}, "r16": {1: 0.05, 2: 0.098}}
    assert pick(Load(0, 2, 0.0), seconds=seconds, slo=0.15) == ("r00", 1)
    assert pick(Load(0, 2, 0.0), seconds=seconds | {"r16": {1: 0.05, 2: 0.101}}, slo=0.15) == (
        "r16", 2
    )  # fmt: skip


def test_the_most_urgent_request_decides():
    assert pick(Load(0, 3, 0.0, (0.2, 0.07, 0.2))) == ("r16", 3)
    assert pick(Load(0, 3, 9.0, (0.2, 0.2, 0.2))) == ("r00", 3)


def test_a_look_between_two_batches():
    assert pick(Load(0, 0, 0.0)) == pick(Load(0, 0, 0.0, ())) == ("r00", 1)


def test_a_slow_machine():
    assert pick(Load(0, 4, 0.0), State("r00", slowdown=2.0)) == ("r00", 2)
    made = SlackFit(SECONDS, SLO)
    state = made.observe(State("r16", batch=2), "r16", 0.064, 2)
    assert state == State("r16", pytest.approx(1.1), batch=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="variant fast can't have taken"):
        made.observe(state, "fast", 1)


def test_some_variants_and_batches():
    assert pick(Load(0, 9, 0.0), variants=["r16"]) == ("r16", 4)
    assert pick(Load(0, 9, 0.0), max_batch=2) == ("r00", 2)
    assert SlackFit(SECONDS, SLO, {"r00": 70, "r16": 71}).start().variant == "r16"


@given(st.integers(1, 60), st.floats(0, 0.5), st.floats(0.5, 3))
def test_what_is_picked_fits(queued: int, waited: float, slowdown: float):
    made = SlackFit(SECONDS, SLO)
    found = made.step(State("r00", slowdown), Load(1, queued, waited))
    assert 1 <= found.batch <= min(queued, 4)
    assert found.slowdown == slowdown
    if slowdown * 0.02 <= 0.899 * SLO - waited:
        assert slowdown * made.times.take(found.variant, found.batch) <= 0.901 * SLO - waited
    else:
        assert found.variant == "r16"


@given(st.integers(1, 60), st.floats(0, 0.15), st.floats(0, 0.15))
def test_less_time_never_asks_for_a_longer_batch(queued: int, waited: float, more: float):
    """As long as something fits."""
    made = SlackFit(SECONDS, SLO)
    before, after = (made.step(made.start(), Load(1, queued, w)) for w in sorted((waited, more)))
    took = [made.times.take(found.variant, found.batch) for found in (before, after)]
    width = (SLO - 0.02) / 16
    assert took[1] <= took[0] + width  # of the same bucket, maybe


@pytest.mark.parametrize("slo", [0, -1, math.nan])
def test_a_latency_that_is_none(slo: float):
    with pytest.raises(InputError, match="`slo` is a positive number"):
        SlackFit(SECONDS, slo)


def test_no_variant_to_choose():
    with pytest.raises(InputError, match="`variants`: steering needs at least one"):
        SlackFit({}, SLO)


def test_bursts():
    """In time where the dense model isn't."""
    arrivals = draw_arrivals("burst", 25, 60)
    made = SlackFit(SECONDS, 0.24, {"r00": 80, "r16": 75})
    found = simulate(arrivals, made)
    dense = simulate(arrivals, dataclasses.replace(made, variants=("r00",)))
    assert found.met > 90 > 60 > dense.met
    assert found.accuracy is not None and found.accuracy > 76
