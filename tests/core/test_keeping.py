"""Schedules that leave a share of the patches: what the rule makes of a model, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.compression.keeping import Keep
from tocom_export.compression.rules import is_rule, list_degrees, parse_rule
from tocom_export.compression.schedule import Schedule
from tocom_export.compression.seldom import Every
from tocom_export.errors import DegreeError
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

DEIT = VitSpec(
    model="deit", image_size=(224, 224), patch_size=(16, 16), width=384, depth=12, heads=6,
    mlp_width=1536, classes=1000,
)  # fmt: skip
shares = st.integers(1, 999_999).map(lambda millionths: millionths / 1e6)
specs = st.builds(
    lambda patches, depth, registers: VitSpec(
        model="any", image_size=(8, 8 * patches), patch_size=(8, 8), width=16, depth=depth,
        heads=1, mlp_width=32, classes=7, registers=registers,
    ),
    st.integers(1, 1500), st.integers(1, 30), st.integers(0, 5),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "share", "name"),
    [
        ("keep:0.5", 0.5, "keep50"),
        ("keep:.5", 0.5, "keep50"),
        ("keep:0.50", 0.5, "keep50"),
        ("keep:0.07", 0.07, "keep7"),
        ("keep:0.55", 0.55, "keep55"),
        ("keep:0.125", 0.125, "keep12_5"),
        ("keep:0.1234567", 0.1234567, "keep12_34567"),
        ("keep:0.1234568", 0.1234568, "keep12_34568"),
        ("keep:0.000000001", 1e-9, "keep0_0000001"),
    ],
)
def test_a_rule(text: str, share: float, name: str):
    rule = parse_rule(text)
    assert rule == Keep(share)
    assert isinstance(rule, Keep)
    assert rule.name == name
    assert Keep.parse(str(rule)) == rule


@given(billionths=st.integers(1, 10**9 - 1))
def test_each_share_has_a_name_of_its_own(billionths: int):
    name = Keep.parse(f"keep:0.{billionths:09d}").name
    assert round(float(name[4:].replace("_", ".")) * 1e7) == billionths


@pytest.mark.parametrize(
    "text",
    ["keep", "keep:", "keep:0", "keep:0.0", "keep:.0", "keep:1", "keep:1.0", "keep:1.5", "keep:50",
     "keep:-0.5", "keep:0.5:2", "keep: 0.5", "keep:0,5", "keep:nan", "keep:5e-1", "keep:0.٣",
     "keep:0.5\n", f"keep:0.{'1' * 10}"],
)  # fmt: skip
def test_no_rule(text: str):
    with pytest.raises(DegreeError) as caught:
        list_degrees(DEIT, text)
    assert str(caught.value) == (
        f"{text!r} is not keep:SHARE; the share of the patches that is left after the last layer "
        "is more than 0 and less than 1, such as 0.5."
    )


@pytest.mark.parametrize("text", ["", "half", "Keep:0.5", " keep:0.5", "0.5"])
def test_a_text_of_no_rule(text: str):
    assert not is_rule(text)
    with pytest.raises(DegreeError, match="write every:K, every:K:R or keep:SHARE"):
        list_degrees(DEIT, text)


def test_the_other_rule():
    assert is_rule("every:3")
    assert parse_rule("every:3") == Every(3)


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("keep:0.5", (11, 10, 10, 9, 9, 8, 8, 8, 6, 7, 6, 6)),
        ("keep:0.01", (62, 43, 29, 20, 13, 9, 7, 4, 3, 2, 1, 1)),
        ("keep:0.99", (0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0)),
    ],
)
def test_degrees_by_hand(text: str, degrees: tuple[int, ...]):
    """196 patches, of each of which a layer keeps the twelfth root of the share."""
    assert list_degrees(DEIT, text) == degrees


@given(spec=specs, share=shares)
def test_the_share_is_left(spec: VitSpec, share: float):
    rule = Keep(share)
    try:
        degrees = rule.list_degrees(spec)
    except DegreeError as error:
        advised = str(error)[:-1].split("; choose ")[1]
        assert parse_rule(advised).list_degrees(spec)
        assert Keep.parse(advised).share > share
        # Not even half in each layer does it.
        least = Schedule.of(spec, spec.tokens).tokens_out[-1] - spec.prefix
        assert least > share * spec.patches
        return
    schedule = Schedule.of(spec, degrees)
    assert schedule.removed == degrees  # within ToMe's bound
    left = schedule.tokens_out[-1] - spec.prefix
    assert abs(left - share * spec.patches) <= 1
    assert left >= 1


@given(spec=specs, share=st.floats(0.6, 0.999))
def test_each_layer_keeps_the_same_share(spec: VitSpec, share: float):
    """To within the patch that is rounded, where half in a layer is more than enough."""
    schedule = Schedule.of(spec, Keep(share).list_degrees(spec))
    rate = share ** (1 / spec.depth)
    for before, after in zip(schedule.tokens_in, schedule.tokens_out, strict=True):
        assert abs(after - spec.prefix - rate * (before - spec.prefix)) <= 1 + 1e-9


def test_a_share_out_of_reach():
    with pytest.raises(DegreeError) as caught:
        list_degrees(replace(DEIT, depth=2), "keep:0.1")
    assert str(caught.value) == (
        "keep:0.1: at most half of the patches go in a layer, so that the 2 of deit leave 49 of "
        "196 at the least; choose keep:0.25."
    )


def test_a_variant_of_it(make_spec: Callable[..., VitSpec]):
    spec = make_spec()
    variant = Variant.of(spec, list_degrees(spec, "keep:0.5"), Keep(0.5).name)
    assert variant.name == "keep50"
    assert variant.schedule(spec).tokens_out[-1] == 1 + 24  # of 49
    assert variant.baked
