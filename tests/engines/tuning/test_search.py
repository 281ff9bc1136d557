"""The search for schedules of one cost, on losses whose least is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tocom_export.compression.schedule import Schedule
from tocom_export.engines.tuning.cost import LatencyModel, list_probes
from tocom_export.engines.tuning.search import Search, fit, list_starts
from tocom_export.model.spec import VitSpec

SPEC = VitSpec(
    model="small", image_size=(56, 56), patch_size=(8, 8), width=64, depth=4, heads=4,
    mlp_width=128, classes=10,
)  # fmt: skip
LIMIT = Schedule.of(SPEC, 8).macs(SPEC)


def count_macs(schedule: Schedule) -> float:
    return float(schedule.macs(SPEC))


@pytest.mark.parametrize("weights", list(list_starts(SPEC.depth)), ids=str)
def test_a_direction_is_as_large_as_it_must_be(weights: np.ndarray):
    degrees = fit(SPEC, weights, count_macs, LIMIT)
    if degrees is None:  # so few layers can't be as cheap
        return
    schedule = Schedule.of(SPEC, degrees)
    assert schedule.removed == degrees, "within ToMe's bound"
    assert schedule.macs(SPEC) <= LIMIT
    fewer = [max(0, degree - 2) for degree in degrees]
    assert Schedule.of(SPEC, fewer).macs(SPEC) > LIMIT


def test_what_is_out_of_reach():
    assert fit(SPEC, np.ones(4), count_macs, LIMIT / 100) is None
    assert Search(SPEC, count_macs, lambda *_: 0.0, LIMIT / 100, 20).run() == []


def cost_of(prices: tuple[float, ...]) -> Callable[[tuple[int, ...], float], float]:
    return lambda degrees, best: float(np.dot(prices, degrees))


def test_tokens_go_where_they_cost_least():
    prices = (9.0, 1.0, 4.0, 9.0)
    search = Search(SPEC, count_macs, cost_of(prices), LIMIT, 120)
    best, *others = search.run()
    constant = next(c for c in others if len(set(c.degrees)) == 1)
    assert best.loss < 0.6 * constant.loss
    assert max(range(4), key=lambda layer: best.degrees[layer]) == 1
    assert [c.loss for c in (best, *others)] == sorted(c.loss for c in (best, *others))


def test_the_same_seed_finds_the_same_and_no_more_than_asked_for():
    def run(seed: int) -> list[tuple[int, ...]]:
        search = Search(SPEC, count_macs, cost_of((3.0, 1.0, 2.0, 5.0)), LIMIT, 60, seed)
        return [candidate.degrees for candidate in search.run()]

    assert run(0) == run(0)
    assert len(run(0)) == len(set(run(0))) <= 60
    assert run(0) != run(1)


def test_a_latency_model_gives_back_what_it_was_made_of():
    true = LatencyModel(SPEC, (0.5, 6.0, 2.0, 0.4, 0.3, 0.0))
    probes = list_probes(SPEC)
    assert len(probes) >= 8
    found = LatencyModel.of(SPEC, {probe: true.predict(probe) for probe in probes})
    assert min(found.shares) >= 0
    for degrees in ((8, 8, 8, 8), (0, 20, 0, 0), (3, 9, 1, 0)):
        schedule = Schedule.of(SPEC, degrees)
        assert found.predict(schedule) == pytest.approx(true.predict(schedule), rel=1e-3)


def test_a_latency_model_is_right_where_it_decides():
    """Where no sum of layers explains what was measured, it is for the cheapest schedule."""
    true = LatencyModel(SPEC, (0.5, 6.0, 2.0, 0.4, 0.3, 0.0))
    measured = {probe: true.predict(probe) for probe in list_probes(SPEC)}
    fastest = min(measured, key=lambda probe: measured[probe])
    measured[fastest] *= 0.7
    fitted = LatencyModel.of(SPEC, measured)
    assert fitted.predict(fastest) > 1.05 * measured[fastest]
    right = fitted.adjust(measured, measured[fastest])
    assert right.predict(fastest) == pytest.approx(measured[fastest])
