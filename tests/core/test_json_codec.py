from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from tocom_export.errors import InputError
from tocom_export.io.json_codec import (
    LATER,
    decode,
    encode,
    format_json,
    parse_json,
    read_json,
)


@dataclass(frozen=True)
class Point:
    x: int
    y: Annotated[float, Meta(ge=0, le=100)] = 0.0

    def __post_init__(self) -> None:
        if self.x == 13:
            raise InputError("13 is out of the question.")


@dataclass(frozen=True)
class Shape:
    name: str
    kind: Literal["line", "area"] = "line"
    corners: tuple[Point, ...] = ()
    centre: Point | None = None
    marks: Mapping[str, Point] = field(default_factory=dict)
    groups: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    closed: bool = False


points = st.builds(Point, st.integers(-(2**40), 12), st.floats(0, 100))
shapes = st.builds(
    Shape,
    st.text(),
    st.sampled_from(["line", "area"]),
    st.lists(points).map(tuple),
    st.none() | points,
    st.dictionaries(st.text(), points, max_size=3),
    st.dictionaries(st.text(), st.lists(points, max_size=3).map(tuple), max_size=3),
    st.booleans(),
)


@given(shapes)
def test_comes_back(shape: Shape):
    assert decode(Shape, encode(shape)) == shape
    assert decode(Shape, parse_json(format_json(encode(shape)))) == shape
    assert decode(Shape, json.loads(json.dumps(encode(shape)))) == shape


def test_defaults_can_be_left_out():
    short = partial(encode, defaults=False)
    assert short(Shape("s")) == {"name": "s"}
    assert short(Shape("s", corners=(Point(1), Point(2, 3.5)), centre=Point(0))) == {
        "name": "s",
        "corners": [{"x": 1}, {"x": 2, "y": 3.5}],
        "centre": {"x": 0},
    }
    assert short(Shape("s", marks={"a": Point(1)})) == {"name": "s", "marks": {"a": {"x": 1}}}


def test_a_later_field_is_left_out_at_its_default():
    @dataclass(frozen=True)
    class Grown:
        x: int = 0
        colour: str = field(default="red", metadata=LATER)

    assert encode(Grown()) == {"x": 0}
    assert encode(Grown(colour="blue")) == {"x": 0, "colour": "blue"}
    assert decode(Grown, {"x": 0}) == decode(Grown, {"x": 0, "colour": "red"}) == Grown()


def test_what_is_written_does_not_hang_on_later_defaults():
    """All but what is None by default."""
    found = encode(Shape("s"))
    kept = {f.name for f in fields(Shape) if f.default is not None}
    assert found.keys() == kept
    assert decode(Shape, found) == Shape("s")


def test_plain_values():
    assert encode({1: (2, [3]), "a": None}) == {"1": [2, [3]], "a": None}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"name": "s", "nome": "t"}, "nome"),
        ({"name": "s", "corners": [{"x": 1}, {"x": 1, "z": 2}]}, "corners[1].z"),
        ({"name": "s", "centre": {"x": 1, "z": 2}}, "centre.z"),
        ({"name": "s", "marks": {"a": {"x": 1}, "b": {"x": 1, "z": 2}}}, "marks[b].z"),
        ({"name": "s", "groups": {"a": [{"x": 1}, {"x": 1, "z": 2}]}}, "groups[a][1].z"),
    ],
)
def test_unknown_fields(data: dict[str, Any], field: str):
    """Or a misspelt option would be read as its default."""
    with pytest.raises(InputError) as caught:
        decode(Shape, data)
    assert str(caught.value) == f"{field}: no such field."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "object missing required field name."),
        ({"name": 3}, "name: expected str, got int."),
        ({"name": None}, "name: expected str, got null."),
        ({"name": ["s"]}, "name: expected str, got array."),
        ({"name": "s", "kind": "dot"}, "kind: invalid enum value 'dot'."),
        ({"name": "s", "closed": 1}, "closed: expected bool, got int."),
        ({"name": "s", "closed": "true"}, "closed: expected bool, got str."),
        ({"name": "s", "corners": {"x": 1}}, "corners: expected array, got object."),
        ({"name": "s", "corners": [{"x": 1}, 3]}, "corners[1]: expected object, got int."),
        (
            {"name": "s", "corners": [{}]},
            "corners[0]: object missing required field x.",
        ),
        ({"name": "s", "corners": [{"x": "1"}]}, "corners[0].x: expected int, got str."),
        ({"name": "s", "corners": [{"x": 1.0}]}, "corners[0].x: expected int, got float."),
        ({"name": "s", "corners": [{"x": True}]}, "corners[0].x: expected int, got bool."),
        ({"name": "s", "centre": {"x": 1, "y": -1}}, "centre.y: expected float >= 0.0."),
        ({"name": "s", "centre": {"x": 1, "y": 101}}, "centre.y: expected float <= 100.0."),
        ({"name": "s", "centre": {"x": 1, "y": math.nan}}, "centre.y: expected float >= 0.0."),
        ({"name": "s", "centre": {"x": 1, "y": math.inf}}, "centre.y: expected float <= 100.0."),
        ({"name": "s", "centre": {"x": 13}}, "13 is out of the question."),
        ([], "expected object, got array."),
        (3, "expected object, got int."),
        ("s", "expected object, got str."),
        (None, "expected object, got null."),
    ],
)
def test_wrong_data(data: Any, message: str):
    with pytest.raises(InputError) as caught:
        decode(Shape, data)
    assert str(caught.value) == message


@pytest.mark.parametrize("data", [{"x": 1, "y": 10**400}, {"x": 1, "y": -(10**400)}])
def test_numbers_beyond_a_float(data: dict[str, Any]):
    with pytest.raises(InputError):
        decode(Point, data)


def test_a_list_of_numbers():
    assert decode(list[int], [1, 2]) == [1, 2]
    with pytest.raises(InputError, match=r"^\[1\]: expected int, got str\.$"):
        decode(list[int], [1, "2"])


def test_data_that_hold_themselves():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError):
        decode(Shape, {"name": "s", "corners": loop})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "x", "y", "corners", "centre", "marks", "groups", "zz"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_data_are_a_record_or_an_input_error(data: Any):
    try:
        found = decode(Shape, data)
    except InputError as error:
        assert str(error).endswith(".")
        return
    assert decode(Shape, encode(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1,]", "{'a': 1}", "NaN", "Infinity", "-Infinity", "[NaN]", "1e999", "-1e999"),
        *('{"a": 1} x', "nul", "\ufeff{}", '"\ud800"'),
    ],
)
def test_no_json(text: str):
    with pytest.raises(InputError, match=r"^no JSON: .*\.$"):
        parse_json(text)


@pytest.mark.parametrize("raw", [b"", b"\xff", b'"\xff"', b"{\x00}", bytes(8), b"\x80\x04."])
def test_no_json_in_bytes(raw: bytes):
    with pytest.raises(InputError, match=r"^no JSON: "):
        parse_json(raw)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(opening: str):
    with pytest.raises(InputError, match="no JSON"):
        parse_json(opening * 100_000)
    depth = sys.getrecursionlimit() * 20
    with pytest.raises(InputError, match="no JSON"):
        parse_json("[" * depth + "]" * depth)


def test_huge_integers():
    assert decode(dict[str, float], parse_json('{"a": 1}')) == {"a": 1.0}
    number = 10**400
    for text in (str(number), f"-{number}", "9" * 10_000):
        try:
            found = parse_json(text)
        except InputError:
            continue
        with pytest.raises(InputError):
            decode(Point, {"x": 1, "y": found})


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_an_input_error(raw: bytes):
    try:
        found = parse_json(raw)
    except InputError:
        return
    assert parse_json(format_json(found)) == found


def test_json_for_people():
    text = format_json({"a": [1, 2.5], "b": {"c": "ä"}, "d": []})
    assert text == (
        '{\n  "a": [\n    1,\n    2.5\n  ],\n  "b": {\n    "c": "ä"\n  },\n  "d": []\n}\n'
    )
    assert json.loads(text) == {"a": [1, 2.5], "b": {"c": "ä"}, "d": []}


def test_a_file(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file, 8) == {"a": 1}
    with pytest.raises(InputError, match=r"^more than 7 bytes\.$"):
        read_json(file, 7)
    file.write_text("{")
    with pytest.raises(InputError, match=r"^no JSON"):
        read_json(file, 8)


def test_a_large_file_is_refused_unread(tmp_path: Path):
    file = tmp_path / "a.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(InputError, match="more than 1000 bytes"):
        read_json(file, 1000)


def test_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", 8)
    with pytest.raises(OSError, match="directory"):
        read_json(tmp_path, 1 << 20)
