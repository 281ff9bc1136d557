from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.compression.schedule import MAX_DEGREE, TokenSchedule, parse_degrees
from tocom_export.errors import DegreeError
from tocom_export.model.spec import VitSpec

DEIT = VitSpec(
    model="deit", image_size=(224, 224), patch_size=(16, 16), width=768, depth=12, heads=12,
    mlp_width=3072, classes=1000,
)  # fmt: skip
COUNTS = (181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11)


def test_the_papers_counts():
    schedule = TokenSchedule.of(DEIT, 16)
    assert schedule.tokens_out == COUNTS
    assert schedule.tokens_in == (197, *COUNTS[:-1])
    assert schedule.removed == (*[16] * 11, 10)


def test_degree_zero_removes_nothing():
    assert TokenSchedule.of(DEIT, 0).tokens_out == (197,) * 12


def test_a_degree_per_layer():
    degrees = [0, 16, 3, 0, 0, 0, 0, 0, 0, 0, 0, 200]
    assert TokenSchedule.of(DEIT, degrees).tokens_out == (197, 181, *[178] * 9, 178 - 177 // 2)
    assert TokenSchedule.of(DEIT, [16] * 12) == TokenSchedule.of(DEIT, 16)


@pytest.mark.parametrize("length", [0, 11, 13])
def test_list_of_another_length(length: int):
    with pytest.raises(DegreeError, match=f"{length} degrees.*12 layers.*deit"):
        TokenSchedule.of(DEIT, [4] * length)


@pytest.mark.parametrize("degree", [-1, [4] * 11 + [-1]])
def test_negative_degree(degree: int | list[int]):
    with pytest.raises(DegreeError, match="-1"):
        TokenSchedule.of(DEIT, degree)


@given(
    tokens=st.integers(1, 600),
    prefix=st.integers(0, 6),
    degrees=st.lists(st.integers(0, 40), min_size=1, max_size=14),
)
def test_counts_hold_for_any_schedule(tokens: int, prefix: int, degrees: list[int]):
    schedule = TokenSchedule(tokens + prefix, prefix, tuple(degrees))
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
    first, second = TokenSchedule.of(DEIT, low), TokenSchedule.of(DEIT, high)
    assert all(a >= b for a, b in zip(first.tokens_out, second.tokens_out, strict=True))
    assert first.multiply_adds(DEIT) >= second.multiply_adds(DEIT)


def test_multiply_adds_of_deit_base():
    dense = TokenSchedule.of(DEIT, 0).multiply_adds(DEIT)
    assert dense == pytest.approx(17.6e9, rel=0.01)


@pytest.mark.parametrize(("degree", "ratio"), [(4, 1.15), (8, 1.34), (12, 1.61), (16, 2.00)])
def test_speed_up_by_multiply_adds_alone(degree: int, ratio: float):
    dense = TokenSchedule.of(DEIT, 0).multiply_adds(DEIT)
    assert dense / TokenSchedule.of(DEIT, degree).multiply_adds(DEIT) == pytest.approx(
        ratio, abs=0.01
    )


def test_multiply_adds_by_hand(make_spec: Callable[..., VitSpec]):
    spec = make_spec(width=8, heads=2, depth=1, mlp_width=12, classes=5, image_size=[16, 16])
    schedule = TokenSchedule.of(spec, 1)  # 5 tokens, then 4
    patches = 4 * 8 * 3 * 8 * 8
    attention = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8
    total = patches + attention + 4 * 2 * 8 * 12 + 8 * 5
    assert schedule.multiply_adds(spec) == total
    adapted = dataclasses.replace(spec, adapter_width=3)
    assert schedule.multiply_adds(adapted) == total + 4 * 2 * 8 * 3


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("4,8,12,16", [4, 8, 12, 16]),
        ("0-16", list(range(17))),
        ("0,4-16:4", [0, 4, 8, 12, 16]),
        ("0-16:5", [0, 5, 10, 15]),
        ("16, 0 ,8,8", [0, 8, 16]),
        ("3", [3]),
        ("5-5", [5]),
    ],
)
def test_parse_degrees(text: str, degrees: list[int]):
    assert parse_degrees(text) == degrees


@pytest.mark.parametrize("text", ["", "a", "4,", "1.5", "4-", "-4", "0-8-16", "4:x", "4;8"])
def test_no_list_of_degrees(text: str):
    with pytest.raises(DegreeError) as caught:
        parse_degrees(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["8-4", "0-16:0", "0-16:-1"])
def test_spans_that_do_not_rise(text: str):
    with pytest.raises(DegreeError, match="no rising span") as caught:
        parse_degrees(f"2,{text}")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["17", "0-17", "999999999999"])
def test_degrees_out_of_range(text: str):
    with pytest.raises(DegreeError) as caught:
        parse_degrees(f"2,{text}")
    assert repr(text) in str(caught.value)
    assert "0..16" in str(caught.value)


@given(st.sets(st.integers(0, MAX_DEGREE), min_size=1))
def test_a_written_list_is_read_back(degrees: set[int]):
    assert parse_degrees(",".join(map(str, degrees))) == sorted(degrees)


@given(st.text(alphabet="0123456789,-: x", max_size=12))
def test_any_text_gives_degrees_or_a_degree_error(text: str):
    try:
        degrees = parse_degrees(text)
    except DegreeError:
        return
    assert degrees == sorted(set(degrees))
    assert all(0 <= degree <= MAX_DEGREE for degree in degrees)
