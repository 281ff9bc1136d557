from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.compression.bank_groups import (
    Arithmetic,
    coefficients,
    groups_of,
)

ARITHMETICS = get_args(Arithmetic)

degrees = st.integers(0, 16)
reals = st.floats(0, 16)


def summed(arithmetic: Arithmetic, source: int, target: float) -> list[float]:
    """How often each group is added."""
    vector = coefficients(arithmetic, source, target)
    assert vector.shape == (groups_of(arithmetic),)
    return list(map(float, vector))


def test_there_are_three():
    assert ARITHMETICS == ("steps", "shared", "no-inversion")
    assert [groups_of(arithmetic) for arithmetic in ARITHMETICS] == [16, 1, 32]


@pytest.mark.parametrize(
    ("arithmetic", "source", "target", "groups", "sign"),
    [
        ("steps", 3, 5, [3, 4], 1),
        ("steps", 5, 3, [3, 4], -1),
        ("steps", 0, 16, list(range(16)), 1),
        ("shared", 3, 5, [0], 1),
        ("shared", 16, 0, [0], 1),
        ("no-inversion", 3, 5, [3, 4], 1),
        ("no-inversion", 5, 3, [19, 20], 1),
        ("no-inversion", 16, 0, list(range(16, 32)), 1),
    ],
)
def test_groups_and_sign(arithmetic, source: int, target: int, groups: list[int], sign: int):
    expected = [sign if group in groups else 0 for group in range(groups_of(arithmetic))]
    assert summed(arithmetic, source, target) == expected


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@given(degree=degrees)
def test_nothing_between_equal_degrees(arithmetic, degree: int):
    assert not any(summed(arithmetic, degree, degree))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@given(source=degrees, target=degrees)
def test_something_between_others(arithmetic, source: int, target: int):
    assert any(summed(arithmetic, source, target)) == (source != target)


@given(source=degrees, middle=degrees, target=degrees)
def test_steps_add_up(source: int, middle: int, target: int):
    first, second = summed("steps", source, middle), summed("steps", middle, target)
    assert [a + b for a, b in zip(first, second, strict=True)] == summed("steps", source, target)


@given(source=degrees, target=degrees)
def test_the_way_back(source: int, target: int):
    there, back = ({a: summed(a, *p) for a in ARITHMETICS}
                   for p in ((source, target), (target, source)))  # fmt: skip
    assert there["steps"] == [-sign for sign in back["steps"]]
    assert there["shared"] == back["shared"]
    up, down = there["no-inversion"], back["no-inversion"]
    assert not any(a and b for a, b in zip(up, down, strict=True))
    assert down == up[16:] + up[:16]


@pytest.mark.parametrize(
    ("source", "target", "shares"),
    [
        (0, 2.25, {0: 1, 1: 1, 2: 0.25}),
        (4, 2.25, {2: -0.75, 3: -1}),
        (2, 2.25, {2: 0.25}),
        (3, 2.25, {2: -0.75}),
        (16, 15.5, {15: -0.5}),
    ],
)
def test_between_whole_degrees_by_hand(source: int, target: float, shares: dict[int, float]):
    assert summed("steps", source, target) == [shares.get(group, 0) for group in range(16)]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@given(source=degrees, low=st.integers(0, 15), share=st.floats(0, 1))
def test_between_whole_degrees_it_is_interpolated(
    arithmetic: Arithmetic, source: int, low: int, share: float
):
    below, above = summed(arithmetic, source, low), summed(arithmetic, source, low + 1)
    expected = [(1 - share) * a + share * b for a, b in zip(below, above, strict=True)]
    assert summed(arithmetic, source, low + share) == pytest.approx(expected, abs=1e-9)


@given(source=degrees, middle=degrees, target=reals)
def test_steps_add_up_to_any_target(source: int, middle: int, target: float):
    first, second = summed("steps", source, middle), summed("steps", middle, target)
    expected = [a + b for a, b in zip(first, second, strict=True)]
    assert summed("steps", source, target) == pytest.approx(expected, abs=1e-9)


@given(target=reals)
def test_steps_are_as_many_as_degrees(target: float):
    assert sum(summed("steps", 0, target)) == pytest.approx(target)
    assert sum(summed("steps", 16, target)) == pytest.approx(target - 16)


def test_as_many_groups_as_a_bank_has():
    assert coefficients("steps", 2, 4, 5).tolist() == [0, 0, 1, 1, 0]
    assert coefficients("steps", 2, 4.5, 5).tolist() == [0, 0, 1, 1, 0.5]
