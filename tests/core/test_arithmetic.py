from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.compression.bank_groups import ARITHMETICS, groups_of, terms

degrees = st.integers(0, 16)


def summed(arithmetic, source: int, target: int) -> list[int]:
    """How often each group is added, as a vector."""
    groups, sign = terms(arithmetic, source, target)
    vector = [0] * groups_of(arithmetic)
    for group in range(*groups.indices(len(vector))):
        vector[group] = sign
    return vector


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
    found, signed = terms(arithmetic, source, target)
    assert list(range(*found.indices(groups_of(arithmetic)))) == groups
    assert signed == sign


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
