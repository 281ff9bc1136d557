"""Schedules that merge seldom: what a rule makes of a model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tocom_export.compression.rules import list_degrees
from tocom_export.compression.schedule import MAX_DEGREE, Schedule
from tocom_export.compression.seldom import Every
from tocom_export.errors import DegreeError
from tocom_export.model.spec import VitSpec

DEIT = VitSpec(
    model="deit", image_size=(224, 224), patch_size=(16, 16), width=384, depth=12, heads=6,
    mlp_width=1536, classes=1000,
)  # fmt: skip
SIX = VitSpec(
    model="six", image_size=(48, 48), patch_size=(6, 6), width=128, depth=6, heads=4,
    mlp_width=512, classes=200,
)  # fmt: skip
"""65 tokens: the architecture of the model inside the package."""
rules = st.builds(Every, st.integers(1, 30), st.integers(1, MAX_DEGREE))
specs = st.builds(
    lambda patches, depth, width, distilled, registers: VitSpec(
        model="any", image_size=(8, 8 * patches), patch_size=(8, 8), width=width, depth=depth,
        heads=1, mlp_width=3 * width, classes=7, distilled=distilled,
        registers=0 if distilled else registers,
    ),
    st.integers(1, 300), st.sampled_from([1, 2, 3, 6, 12, 24]), st.integers(8, 64),
    st.booleans(), st.integers(0, 4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("every:3", Every(3)),
        ("every:1:1", Every(1, 1)),
        ("every:2:12", Every(2, 12)),
        ("every:999999999:16", Every(999_999_999, 16)),
    ],
)
def test_a_rule(text: str, rule: Every):
    assert Every.parse(text) == rule
    assert Every.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "every", "every:", "every:0", "every:x", "every:-2", "every:2.5", "every:٣", "every:3:",
     "every:3:0", "every:3:17", "every:3:99", "every:3:8:1", " every:3", "every:3\n", "Every:3",
     "each:3", "3", f"every:{10**9}"],
)  # fmt: skip
def test_no_rule(text: str):
    with pytest.raises(DegreeError) as caught:
        Every.parse(text)
    assert str(caught.value) == (
        f"{text!r} is not every:K or every:K:R; K is 1 or more, and R the constant degree that "
        "costs as much, 1 to 16 (the default)."
    )


@pytest.mark.parametrize(
    ("spec", "text", "degrees"),
    [
        (SIX, "every:2:4", (0, 11, 0, 11, 0, 0)),
        (SIX, "every:2:8", (0, 21, 0, 21, 0, 0)),
        (SIX, "every:3:8", (0, 26, 0, 0, 19, 0)),  # ToMe's bound of half makes the last smaller
        (SIX, "every:2:12", (22, 0, 21, 0, 10, 0)),  # from layer 1 on it is out of reach
        (SIX, "every:2", (32, 0, 16, 0, 8, 0)),
        (SIX, "every:6:4", (0, 17, 0, 0, 0, 0)),
        (SIX, "every:100:4", (0, 17, 0, 0, 0, 0)),  # one step where K is beyond the depth
        (DEIT, "every:2", (0, 37, 0, 37, 0, 37, 0, 37, 0, 24, 0, 0)),
        (DEIT, "every:3", (0, 50, 0, 0, 50, 0, 0, 48, 0, 0, 24, 0)),
        (DEIT, "every:1:8", (0, *[10] * 10, 0)),
        (replace(DEIT, distilled=True), "every:4", (0, 63, 0, 0, 0, 63, 0, 0, 0, 35, 0, 0)),
        (replace(SIX, depth=1), "every:2:8", (8,)),
        (replace(SIX, depth=2), "every:2:8", (11, 0)),
    ],
)
def test_degrees_by_hand(spec: VitSpec, text: str, degrees: tuple[int, ...]):
    assert list_degrees(spec, text) == degrees


def test_a_list_is_what_it_was():
    assert list_degrees(SIX, [3, 2, 1]) == [3, 2, 1]


def degrees_or_none(spec: VitSpec, rule: Every) -> tuple[int, ...] | None:
    try:
        return rule.list_degrees(spec)
    except DegreeError:
        return None


def first_layer(degrees: tuple[int, ...]) -> int:
    return int(not degrees[0] and len(degrees) > 1)


@given(spec=specs, rule=rules)
def test_what_is_removed(spec: VitSpec, rule: Every):
    degrees = degrees_or_none(spec, rule)
    assume(degrees is not None and any(degrees))
    assert degrees is not None
    schedule = Schedule.of(spec, degrees)
    assert schedule.removed == degrees
    assert schedule.macs(spec) <= Schedule.of(spec, rule.degree).macs(spec)
    first = first_layer(degrees)
    layers = range(first, max(spec.depth - 1, 1), rule.step)
    assert all(not count for layer, count in enumerate(degrees) if layer not in layers)
    size = degrees[first]
    for layer in layers:
        bound = (schedule.tokens_in[layer] - spec.prefix) // 2
        assert degrees[layer] == min(size, bound)
    fewer = [(size - 1) * (layer in layers) for layer in range(spec.depth)]
    least = Schedule.of(spec, fewer).macs(spec)
    assert least > Schedule.of(spec, rule.degree).macs(spec)


@given(spec=specs, rule=rules)
def test_layer_0_removes_none_where_that_can_be(spec: VitSpec, rule: Every):
    limit = Schedule.of(spec, rule.degree).macs(spec)

    def reach(first: int) -> bool:
        layers = range(first, max(spec.depth - 1, 1), rule.step)
        most = [spec.tokens * (layer in layers) for layer in range(spec.depth)]
        return Schedule.of(spec, most).macs(spec) <= limit

    degrees = degrees_or_none(spec, rule)
    assert (degrees is None) == (not reach(0) and not reach(1))
    if degrees and reach(1):
        assert spec.depth == 1 or not degrees[0]


@given(spec=specs, rule=rules)
def test_what_is_advised_can_be_had(spec: VitSpec, rule: Every):
    try:
        rule.list_degrees(spec)
    except DegreeError as error:
        message = str(error)
        assert message.startswith(f"{rule}: ")
        advised = message[:-1].split("; choose ")[1].split(" or ")
        for text in advised:
            if text.startswith("every"):
                list_degrees(spec, text)
            else:
                assert text == f"degree {rule.degree} in `targets`"


@pytest.mark.parametrize("depth", [6, 12, 24])
@pytest.mark.parametrize("distilled", [False, True])
def test_models_of_other_depths(depth: int, distilled: bool):
    spec = replace(DEIT, depth=depth, distilled=distilled)
    for degree in (4, 8, 12, 16):
        limit = Schedule.of(spec, degree).macs(spec)
        for step in (2, 3, 4):
            schedule = Schedule.of(spec, list_degrees(spec, f"every:{step}:{degree}"))
            assert 0.95 * limit < schedule.macs(spec) <= limit
            assert sum(map(bool, schedule.removed)) <= -(-depth // step)
    assert list_degrees(spec, "every:2") == list_degrees(spec, "every:2:16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "every:3",
            "every:3:16: with tokens removed in 2 of its 6 layers six has 35.6 M MACs at the "
            "least, and 29.9 M at degree 16 in each; choose every:2:16 or every:3:12.",
        ),
        (
            "every:50:10",
            "every:50:10: with tokens removed in 1 of its 6 layers six has 44.4 M MACs at the "
            "least, and 43.5 M at degree 10 in each; choose every:4:10 or every:50:9.",
        ),
    ],
)
def test_a_cost_out_of_reach(text: str, message: str):
    with pytest.raises(DegreeError) as caught:
        list_degrees(SIX, text)
    assert str(caught.value) == message


def test_a_cost_that_no_rule_reaches(make_spec: Callable[..., VitSpec]):
    """Few tokens: the constant schedule halves them in its last layer, too."""
    spec = make_spec(image_size=[8, 24], depth=2)
    with pytest.raises(DegreeError, match="choose degree 1 in `targets`"):
        list_degrees(spec, "every:2:1")
