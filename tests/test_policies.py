"""What ``benchmarks/policies.py`` promises of steering, on its own traces."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tocom_export.engines.serving.policy import Load, Policy
from tocom_export.engines.serving.simulation import Outcome, simulate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def policies() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("policies")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def slo(policies) -> float:
    return 6 * policies.SECONDS["r00"][1]


def serve(policies: Any, trace: str, seed: int, policy: Policy) -> Outcome:
    return simulate(policies.draw(seed)[trace], policy, scatter=policies.SCATTER, seed=seed)


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_bursts(policies, slo: float, seed: int):
    """In time, and no fixed variant that is in time, too, answers better."""
    found = {
        name: serve(policies, "burst 1.5×", seed, policy)
        for name, policy in policies.list_policies(slo).items()
    }
    steered = found["steering"]
    assert steered.met >= 95
    assert found["r00"].met < 60
    fixed = {name: found[name] for name in policies.SECONDS}
    for name, outcome in fixed.items():
        assert outcome.met < 95 or steered.accuracy >= outcome.accuracy, name
    assert steered.accuracy > 29
    assert found["AIMD r00"].met < 60
    assert found["AIMD r16"].accuracy < steered.accuracy


@SEEDS
def test_steady_requests(policies, slo: float, seed: int):
    found = serve(policies, "steady 0.7×", seed, policies.list_policies(slo)["steering"])
    assert found.met >= 99
    assert found.shares["r00"] >= 90


@SEEDS
@pytest.mark.parametrize("trace", ["gamma 0.7×, CV 2", "recorded, 1.1×", "diurnal 0.1 to 1.2×"])
def test_it_is_better_than_slackfit_at_being_in_time(policies, slo: float, trace: str, seed: int):
    made = policies.list_policies(slo)
    ours, theirs = (serve(policies, trace, seed, made[name]) for name in ("steering", "SlackFit"))
    assert ours.met > theirs.met


def test_overload_is_left_to_the_fastest_variant(policies, slo: float):
    made = policies.list_policies(slo)
    ours, fixed = (serve(policies, "overload 2.5×", 0, made[name]) for name in ("steering", "r16"))
    assert ours.shares["r16"] > 99
    assert ours.p99_ms == pytest.approx(fixed.p99_ms, rel=0.02)


def test_batches_grow_by_one_and_shrink_by_a_tenth(policies):
    made = policies.Aimd("r08", {"r08": {1: 0.1, 8: 0.4}}, 0.3)
    state, load = made.start(), Load(0, 50, 0.0)
    picked = []
    for took in (0.1, 0.1, 0.1, 0.1, 0.31, 0.1):
        state = made.step(state, load)
        picked.append(state.batch)
        state = made.observe(state, "r08", took, state.batch)
    assert picked == [1, 2, 3, 4, 5, 4]
    assert state.limit == pytest.approx(5.5)
    assert made.step(state, Load(0, 2, 0.0)).batch == 2
    partial = made.observe(state, "r08", 0.1, 2)
    assert partial.limit == state.limit


def test_the_table(policies):
    outcome = Outcome(9, 98.76, {"r00": 100.0}, 30.5, 1, 2, 3, 0)
    worse = Outcome(9, 97.04, {"r00": 100.0}, 30.4, 1, 2, 3, 0)
    assert policies.format_table({"steady": {"steering": [outcome, worse], "r00": [outcome]}}) == (
        "| | steering | r00 |\n|---|---:|---:|\n| steady | 97.0 / 30.45 | 98.8 / 30.50 |"
    )
