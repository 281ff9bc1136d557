from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tocom_export.compression.schedule import MAX_DEGREE, MOST, Schedule
from tocom_export.errors import DegreeError
from tocom_export.model.spec import VitSpec

DEIT = VitSpec(
    model="deit", image_size=(224, 224), patch_size=(16, 16), width=768, depth=12, heads=12,
    mlp_width=3072, classes=1000,
)  # fmt: skip
COUNTS = (181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11)


def test_the_papers_counts():
    schedule = Schedule.of(DEIT, 16)
    assert schedule.tokens_out == COUNTS
    assert schedule.tokens_in == (197, *COUNTS[:-1])
    assert schedule.removed == (*[16] * 11, 10)


def test_degree_zero_removes_nothing():
    assert Schedule.of(DEIT, 0).tokens_out == (197,) * 12


def test_a_degree_per_layer():
    degrees = [0, 16, 3, 0, 0, 0, 0, 0, 0, 0, 0, 200]
    assert Schedule.of(DEIT, degrees).tokens_out == (197, 181, *[178] * 9, 178 - 177 // 2)
    assert Schedule.of(DEIT, [16] * 12) == Schedule.of(DEIT, 16)


@pytest.mark.parametrize("length", [0, 11, 13])
def test_list_of_another_length(length: int):
    with pytest.raises(DegreeError, match=f"deit has 12 layers; .* each, not {length}"):
        Schedule.of(DEIT, [4] * length)


@pytest.mark.parametrize("degree", [MOST, [0] * 11 + [MOST]])
def test_more_than_there_is(degree: int | list[int]):
    assert Schedule.of(DEIT, degree).tokens_out[-1] < 197
    with pytest.raises(DegreeError, match=str(MOST + 1)):
        Schedule.of(DEIT, MOST + 1)


@pytest.mark.parametrize("degree", [-1, [4] * 11 + [-1]])
def test_negative_degree(degree: int | list[int]):
    with pytest.raises(DegreeError, match="-1"):
        Schedule.of(DEIT, degree)


@given(
    tokens=st.integers(1, 600),
    prefix=st.integers(0, 6),
    degrees=st.lists(st.integers(0, 40), min_size=1, max_size=14),
)
def test_counts_hold_for_any_schedule(tokens: int, prefix: int, degrees: list[int]):
    schedule = Schedule(tokens + prefix, prefix, tuple(degrees))
    assert schedule.tokens_in[0] == tokens + prefix
    for before, gone, after, degree in zip(
        schedule.tokens_in, schedule.removed, schedule.tokens_out, degrees, strict=True
    ):
        assert after == before - gone
        assert gone == min(degree, (before - prefix) // 2)
        assert after > prefix
    assert schedule.tokens_in[1:] == schedule.tokens_out[:-1]


@given(low=st.integers(0, MAX_DEGREE), high=st.integers(0, MAX_DEGREE))
def test_a_higher_degree_leaves_fewer_tokens_and_costs_less(low: int, high: int):
    if low > high:
        low, high = high, low
    first, second = Schedule.of(DEIT, low), Schedule.of(DEIT, high)
    assert all(a >= b for a, b in zip(first.tokens_out, second.tokens_out, strict=True))
    assert first.macs(DEIT) >= second.macs(DEIT)


def test_multiply_adds_of_deit_base():
    dense = Schedule.of(DEIT, 0).macs(DEIT)
    assert dense == pytest.approx(17.6e9, rel=0.01)


@pytest.mark.parametrize(("degree", "ratio"), [(4, 1.15), (8, 1.34), (12, 1.61), (16, 2.00)])
def test_speed_up_by_multiply_adds_alone(degree: int, ratio: float):
    dense = Schedule.of(DEIT, 0).macs(DEIT)
    assert dense / Schedule.of(DEIT, degree).macs(DEIT) == pytest.approx(ratio, abs=0.01)


def test_multiply_adds_by_hand(make_spec: Callable[..., VitSpec]):
    spec = make_spec(width=8, heads=2, depth=1, mlp_width=12, classes=5, image_size=[16, 16])
    schedule = Schedule.of(spec, 1)  # 5 tokens, then 4
    patches = 4 * 8 * 3 * 8 * 8
    attention = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8
    total = patches + attention + 4 * 2 * 8 * 12 + 8 * 5
    assert schedule.macs(spec) == total
    adapted = dataclasses.replace(spec, adapter_width=3)
    assert schedule.macs(adapted) == total + 4 * 2 * 8 * 3


SIX = VitSpec(
    model="six", image_size=(64, 64), patch_size=(8, 8), width=64, depth=6, heads=4,
    mlp_width=128, classes=10,
)  # fmt: skip
"""65 tokens, 6 layers: what docs and method measure schedules on."""


@pytest.mark.parametrize(
    ("degrees", "targets"),
    [
        ([20, 17, 11, 6, 1, 3], (16, 16, 16, 16, 15, 11.5)),
        ([24, 16, 12, 0, 0, 0], (16, 16, 16, 16, 13.5, 10.5)),
        ([0, 0, 0, 0, 0, 16], (0, 0, 0, 0, 0, 0)),
        ([0, 0, 0, 0, 6, 16], (0, 0, 0, 0, 0, 1.2)),
        ([8, 0, 8, 0, 8, 0], (8, 8, 4, 16 / 3, 4, 4.8)),
        ([3, 2, 1, 0, 0, 0], (3, 3, 2.5, 2, 1.5, 1.2)),
        ([99, 0, 0, 0, 0, 0], (16, 16, 16, 32 / 3, 8, 6.4)),
        ([99] * 5 + [98], (16,) * 6),
    ],
)
def test_targets_by_hand(degrees: list[int], targets: tuple[float, ...]):
    assert Schedule.of(SIX, degrees).targets == pytest.approx(targets)


@pytest.mark.parametrize("degree", [*range(17), 17, 99])
@pytest.mark.parametrize("spec", [DEIT, SIX])
def test_a_constant_list_is_compensated_for_its_degree(spec: VitSpec, degree: int):
    """Also where ToMe's bound lets several degrees bring a layer as many tokens."""
    assert Schedule.of(spec, degree).targets == (min(degree, MAX_DEGREE),) * spec.depth


def test_the_target_of_one_layer(make_spec: Callable[..., VitSpec]):
    assert Schedule.of(make_spec(depth=1), 7).targets == (7,)


lists = st.lists(st.integers(0, 40), min_size=2, max_size=8)


def varied(degrees: list[int]) -> bool:
    return len(set(degrees)) > 1


@given(tokens=st.integers(1, 600), prefix=st.integers(0, 6), degrees=lists)
def test_targets_are_degrees(tokens: int, prefix: int, degrees: list[int]):
    targets = Schedule(tokens + prefix, prefix, tuple(degrees)).targets
    assert len(targets) == len(degrees)
    assert all(0 <= target <= MAX_DEGREE for target in targets)
    assert targets[0] == targets[1]


@given(tokens=st.integers(1, 600), prefix=st.integers(0, 6), degrees=lists.filter(varied))
def test_as_many_tokens_reach_a_layer_at_its_target(tokens: int, prefix: int, degrees: list[int]):
    schedule = Schedule(tokens + prefix, prefix, tuple(degrees))
    grid = range(MAX_DEGREE + 1)
    constant = [
        Schedule(tokens + prefix, prefix, (degree,) * len(degrees)).tokens_in for degree in grid
    ]
    for layer in range(1, len(degrees)):
        counts = [listed[layer] for listed in constant]
        target, reaching = schedule.targets[layer], schedule.tokens_in[layer]
        expected = max(reaching, counts[MAX_DEGREE])
        assert np.interp(target, grid, counts) == pytest.approx(expected)
        if 1e-6 < target < MAX_DEGREE:  # it is the smallest such degree
            assert np.interp(target - 1e-6, grid, counts) > expected


@given(
    tokens=st.integers(1, 600),
    prefix=st.integers(0, 6),
    pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), min_size=2, max_size=8),
)
def test_who_removes_more_is_compensated_for_more(
    tokens: int, prefix: int, pairs: list[tuple[int, int]]
):
    fewer, more = [low for low, _ in pairs], [low + rise for low, rise in pairs]
    assume(varied(fewer) and varied(more))
    low, high = (Schedule(tokens + prefix, prefix, tuple(d)).targets for d in (fewer, more))
    assert all(a <= b for a, b in zip(low, high, strict=True))


@given(
    tokens=st.integers(1, 600),
    degrees=lists.filter(varied),
    layer=st.integers(0, 7),
    removed=st.integers(0, 40),
)
def test_what_a_layer_removes_concerns_those_behind_it(
    tokens: int, degrees: list[int], layer: int, removed: int
):
    layer %= len(degrees)
    changed = [*degrees[:layer], removed, *degrees[layer + 1 :]]
    assume(varied(changed))
    before, after = (Schedule(tokens + 1, 1, tuple(d)).targets for d in (degrees, changed))
    assert before[1 : layer + 1] == after[1 : layer + 1]


@pytest.mark.parametrize("degree", ["8", 8.0, None, [8.0] * 12, ["8"] * 12, [[8]] * 12])
def test_no_degree(degree: Any):
    with pytest.raises(DegreeError):
        Schedule.of(DEIT, degree)
