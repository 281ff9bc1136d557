from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.compression.schedule import MAX_DEGREE, Schedule
from tocom_export.errors import DegreeError, InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.spec import VitSpec
from tocom_export.variant import MAX_SCALE, Variant, constant_name, find_variant

degrees = st.integers(0, MAX_DEGREE)


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec()


@given(degree=degrees, source=degrees, scale=st.floats(0, MAX_SCALE), compensated=st.booleans())
def test_one_degree_for_all_layers(
    spec: VitSpec, degree: int, source: int, scale: float, compensated: bool
):
    variant = Variant.of(spec, degree, source=source, scale=scale, compensated=compensated)
    assert variant.name == f"r{degree:02d}"
    assert variant.degrees == variant.targets == (degree,) * 4
    assert (variant.source, variant.scale, variant.compensated) == (source, scale, compensated)
    assert (variant.degree, variant.label) == (degree, str(degree))
    assert variant.baked == (compensated and degree != source)
    assert variant.schedule(spec) == Schedule.of(spec, degree)
    assert decode(Variant, json.loads(json.dumps(encode(variant)))) == variant


@given(
    listed=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,63}", fullmatch=True),
    source=degrees,
)
def test_a_degree_per_layer(spec: VitSpec, listed: list[int], name: str, source: int):
    if name.lower() in ("weights", "manifest") or name[1:].isdecimal():
        name = "some"
    variant = Variant.of(spec, listed, name, source=source)
    assert (variant.name, variant.degrees) == (name, tuple(listed))
    assert variant.targets == Schedule.of(spec, listed).targets
    assert variant.degree == (listed[0] if len(set(listed)) == 1 else None)
    assert variant.label == (
        str(listed[0]) if len(set(listed)) == 1 else ",".join(map(str, listed))
    )
    assert variant.schedule(spec) == Schedule.of(spec, listed)
    assert variant.baked == any(target != source for target in variant.targets)
    assert decode(Variant, json.loads(json.dumps(encode(variant)))) == variant


def test_defaults(spec: VitSpec):
    assert Variant.of(spec, 8) == Variant("r08", (8,) * 4, (8,) * 4, 0, 0.1, True)


@pytest.mark.parametrize(
    ("degree", "name"),
    [([8] * 4, "r08"), ([20] * 4, "r20"), ((99,) * 4, "r99"), ([100] * 4, "r100")],
)
def test_a_list_of_one_degree_needs_no_name(spec: VitSpec, degree: Any, name: str):
    variant = Variant.of(spec, degree)
    assert variant.name == name
    assert variant.targets == (min(degree[0], 16),) * 4


@pytest.mark.parametrize("degree", [[8, 8, 8, 7], [100, 100, 100, 99]])
def test_other_lists_need_one(spec: VitSpec, degree: list[int]):
    with pytest.raises(InputError, match="needs a name"):
        Variant.of(spec, degree)
    assert Variant.of(spec, degree, "fast").name == "fast"


def test_a_degree_may_have_a_name_of_its_own(spec: VitSpec):
    assert Variant.of(spec, 8, "fast") == replace(Variant.of(spec, 8), name="fast")


@pytest.mark.parametrize(
    ("degree", "compensated", "baked"),
    [
        (0, True, False),
        (8, True, True),
        (8, False, False),
        ([0, 0, 0, 16], True, False),  # all tokens reach all layers
        ([0, 0, 16, 0], True, True),
        ([0, 0, 16, 0], False, False),
    ],
)
def test_baked_where_there_is_a_gap_to_add(
    spec: VitSpec, degree: Any, compensated: bool, baked: bool
):
    assert Variant.of(spec, degree, "some", compensated=compensated).baked == baked


@pytest.mark.parametrize(
    "name",
    ["a", "A", "fast", "r8", "r008", "r0100", "r08-a", "R08", "x_1", "a" * 64, "weightsy", "none"],
)
def test_names(spec: VitSpec, name: str):
    assert Variant.of(spec, [20, 17, 11, 6], name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "8",
            "08",
            "_a",
            "-a",
            ".a",
            "a.b",
            "a/b",
            "../a",
            "a b",
            "a\n",
            "a\0",
            "ä",
            "a" * 65,
        ),
        *("weights", "manifest", "Weights", "MANIFEST", "a,b", "a=b"),
    ],
)
def test_names_that_no_file_can_have(spec: VitSpec, name: str):
    with pytest.raises(InputError) as caught:
        Variant.of(spec, 8, name)
    assert str(caught.value).startswith(f"{name!r} can't name a variant: a letter first")


@pytest.mark.parametrize("name", ["r08", "r00", "r16", "r99", "r100", "r1000000"])
def test_a_name_that_says_another_degree(spec: VitSpec, name: str):
    for degree in (7, [8, 8, 8, 7], [20, 17, 11, 6]):
        with pytest.raises(InputError) as caught:
            Variant.of(spec, degree, name)
        assert f"{name} is the name of degree {int(name[1:])} in each layer" in str(caught.value)


def test_a_schedule_of_an_earlier_bundle(spec: VitSpec):
    """Longer names of a degree are reserved where a variant is made, and not where it is read."""
    old = replace(Variant.of(spec, [20, 17, 11, 6], "old"), name="r384")
    assert decode(Variant, json.loads(json.dumps(encode(old)))) == old
    with pytest.raises(InputError, match="r84 is the name of degree 84"):
        replace(old, name="r84")


@pytest.mark.parametrize("degree", [-1, 1_000_001])
@pytest.mark.parametrize("compensated", [True, False])
def test_degrees_out_of_range(spec: VitSpec, degree: int, compensated: bool):
    with pytest.raises(DegreeError, match=f"degree {degree}: 0 to 1000000 is expected"):
        Variant.of(spec, degree, compensated=compensated)


@pytest.mark.parametrize("degree", [17, 23, 1000])
def test_degrees_that_no_bank_spans(spec: VitSpec, degree: int):
    with pytest.raises(DegreeError) as caught:
        Variant.of(spec, degree)
    assert str(caught.value) == (
        f"degree {degree}: a bank compensates degrees 0..16; go without one (`bank` none), or list "
        f"it for each layer (`schedules` NAME={degree},{degree},…), which is compensated as for 16."
    )
    plain = Variant.of(spec, degree, compensated=False)
    assert (plain.name, plain.degrees) == (f"r{degree}", (degree,) * 4)
    assert plain.targets == (16,) * 4
    assert not plain.baked
    assert Variant.of(spec, [degree] * 4).name == plain.name
    assert decode(Variant, json.loads(json.dumps(encode(plain)))) == plain
    plain.check(spec)
    assert find_variant({plain.name: plain}, str(degree), "it") is plain


@pytest.mark.parametrize("degree", [[8] * 3, [8] * 5, []])
def test_lists_of_another_length(spec: VitSpec, degree: list[int]):
    with pytest.raises(DegreeError, match="4 layers"):
        Variant.of(spec, degree, "fast")


@pytest.mark.parametrize("degree", ["8", 8.0, None, [8.0] * 4])
def test_what_is_no_degree(spec: VitSpec, degree: Any):
    with pytest.raises(DegreeError):
        Variant.of(spec, degree, "fast")


@pytest.mark.parametrize("source", [-1, 17])
def test_sources_out_of_range(spec: VitSpec, source: int):
    with pytest.raises(DegreeError, match=f"`source` {source}"):
        Variant.of(spec, 8, source=source)


@pytest.mark.parametrize("scale", [-0.1, 1000.1, float("nan"), float("inf"), -float("inf"), 1e300])
def test_scales_out_of_range(spec: VitSpec, scale: float):
    with pytest.raises(InputError, match=r"`scale` .*: 0 to 1000 is expected"):
        Variant.of(spec, 8, scale=scale)


@pytest.mark.parametrize("targets", [(), (8,) * 3, (8,) * 5])
def test_a_target_for_each_layer(targets: tuple[int, ...]):
    with pytest.raises(InputError, match="a degree and a target are needed for each layer"):
        Variant("some", (8,) * 4, targets, 0, 0.1, True)


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ((8, 8), "r08"),
        ((16,), "r16"),
        ((99,), "r99"),
        ((100,), "r100"),
        ((1_000_000,), "r1000000"),
        ((8, 7), None),
    ],
)
def test_constant_name(listed: tuple[int, ...], name: str | None):
    assert constant_name(listed) == name


@pytest.fixture(scope="module")
def variants(spec: VitSpec) -> dict[str, Variant]:
    made = (Variant.of(spec, 0), Variant.of(spec, 8), Variant.of(spec, [9, 8, 7, 6], "fast"))
    return {variant.name: variant for variant in made}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((0, "r00"), (8, "r08"), ("0", "r00"), ("8", "r08"), ("08", "r08"), ("r08", "r08")),
        ("fast", "fast"),
    ],
)
def test_a_variant_is_found(variants: dict[str, Variant], name: str | int, found: str):
    assert find_variant(variants, name, "the bundle") is variants[found]


@pytest.mark.parametrize("name", [4, "4", "r04", "r8", "Fast", "", "-8", -8, 8000, "x", "9" * 5000])
def test_a_variant_that_there_is_not(variants: dict[str, Variant], name: str | int):
    with pytest.raises(DegreeError) as caught:
        find_variant(variants, name, "the bundle")
    assert str(caught.value) == f"the bundle has no variant {name}; it has r00, r08, fast."


@given(st.integers() | st.text())
def test_any_name_finds_a_variant_or_says_so(variants: dict[str, Variant], name: str | int):
    with suppress(DegreeError):
        assert find_variant(variants, name, "it") in variants.values()
