from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tocom_export.cli.options import BATCHES, DEGREES, FiniteFloat, NamedSchedule, Names
from tocom_export.compression.schedule import MAX_DEGREE, MOST


def parse(kind: click.ParamType[Any], text: str) -> Any:
    """What an option of that type makes of a text."""
    return kind.convert(text, None, None)


def refused(kind: click.ParamType[Any], text: str) -> str:
    with pytest.raises(click.BadParameter) as caught:
        parse(kind, text)
    return str(caught.value.message)


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("4,8,12,16", (4, 8, 12, 16)),
        ("0-16", tuple(range(17))),
        ("0,4-16:4", (0, 4, 8, 12, 16)),
        ("0-16:5", (0, 5, 10, 15)),
        ("16, 0 ,8,8", (0, 8, 16)),
        ("3", (3,)),
        ("5-5", (5,)),
    ],
)
def test_degrees(text: str, degrees: tuple[int, ...]):
    assert parse(DEGREES, text) == degrees


@pytest.mark.parametrize(
    "text", ["", "a", "4,", "1.5", "4-", "-4", "0-8-16", "4:x", "4;8", "0-16:-1", "4:2", "٨"]
)
def test_no_list_of_degrees(text: str):
    message = refused(DEGREES, text)
    assert message == (f"{text!r} is no list of degrees; write 4,8,12,16 or 0-16 or 0,4-16:4.")


@pytest.mark.parametrize("text", ["8-4", "0-16:0"])
def test_spans_that_do_not_rise(text: str):
    message = refused(DEGREES, f"2,{text}")
    assert message == f"{text!r} is no rising span; write first-last or first-last:step."


@pytest.mark.parametrize("text", ["1000001", "0-1000001", "1000001-4", "999999999999"])
def test_degrees_out_of_range(text: str):
    assert refused(DEGREES, f"2,{text}") == f"{text!r} is outside the degrees 0..1000000."


@given(st.sets(st.integers(0, MAX_DEGREE), min_size=1))
def test_a_written_list_is_read_back(degrees: set[int]):
    assert parse(DEGREES, ",".join(map(str, degrees))) == tuple(sorted(degrees))


@given(st.text(alphabet="0123456789,-: x", max_size=12))
def test_any_text_gives_degrees_or_a_bad_parameter(text: str):
    try:
        degrees = parse(DEGREES, text)
    except click.BadParameter:
        return
    assert degrees == tuple(sorted(set(degrees)))
    assert all(0 <= degree <= MOST for degree in degrees)


def test_batches_keep_their_order():
    assert parse(BATCHES, "32,1, 8,1") == (32, 1, 8)
    assert refused(BATCHES, "0") == f"'0' is outside the batches 1..{2**31 - 1}."
    assert "is no list of batches" in refused(BATCHES, "many")


def test_a_default_goes_through():
    """click converts what a decorator gives as the default, too."""
    for kind in (DEGREES, BATCHES, Names()):
        assert kind.convert((4, 8), None, None) == (4, 8)
    assert NamedSchedule().convert(("fast", (1, 2)), None, None) == ("fast", (1, 2))


@click.command()
@click.option("--targets", type=DEGREES, default=(0, 4, 8, 12, 16), show_default=True)
@click.option("--schedule", "schedules", type=NamedSchedule(), multiple=True)
@click.option("--variants", type=Names(), default=())
@click.option("--scale", type=FiniteFloat(0), default=0.1)
def command(**options: Any) -> None:
    click.echo(json.dumps(options))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_in_a_command():
    assert json.loads(call().stdout) == {
        "targets": [0, 4, 8, 12, 16],
        "schedules": [],
        "variants": [],
        "scale": 0.1,
    }
    options = {"--targets": "0-8:4", "--variants": "8,a", "--scale": "1", "--schedule": "a=1,2"}
    line = [text for option in options.items() for text in option]
    assert json.loads(call(*line, "--schedule", "b=3,4").stdout) == {
        "targets": [0, 4, 8],
        "schedules": [["a", [1, 2]], ["b", [3, 4]]],
        "variants": ["r08", "a"],
        "scale": 1.0,
    }


@pytest.mark.parametrize("option", ["--targets", "--schedule", "--variants", "--scale"])
def test_an_error_names_its_option(option: str):
    result = call(option, ",")
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': " in result.stderr


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8", ("r08",)),
        ("r08", ("r08",)),
        ("0,r08,fast", ("r00", "r08", "fast")),
        (" fast , 16 ", ("fast", "r16")),
        ("0-16:8,fast", ("r00", "r08", "r16", "fast")),
        ("23,100", ("r23", "r100")),
        ("8,r08,8,fast,fast", ("r08", "fast")),
        ("16,0", ("r16", "r00")),
    ],
)
def test_names_of_variants(text: str, names: tuple[str, ...]):
    assert parse(Names(), text) == names


@pytest.mark.parametrize("text", ["", ",", "8,", ",fast", "8,,fast"])
def test_no_names_of_variants(text: str):
    assert refused(Names(), text) == f"{text!r} is no list of variants, such as 0,8,fast."


@pytest.mark.parametrize("text", ["1000001", "fast,8-4", "8x"])
def test_no_degrees_among_names(text: str):
    assert repr(text.split(",")[-1]) in refused(Names(), text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("fast=20,17,11,6,1,3", ("fast", (20, 17, 11, 6, 1, 3))),
        ("fast=20", ("fast", (20,))),
        ("fast= 20, 3", ("fast", (20, 3))),
        ("fast=-1,3", ("fast", (-1, 3))),  # refused with the model, which says more
        ("fast=every:3", ("fast", "every:3")),  # so is what a model can't be brought down to
        ("every=every:2:12", ("every", "every:2:12")),
        ("half=keep:0.5", ("half", "keep:0.5")),
    ],
)
def test_a_named_schedule(text: str, named: tuple[str, tuple[int, ...] | str]):
    assert parse(NamedSchedule(), text) == named


@pytest.mark.parametrize("text", ["fast", "fast=", "=20,3", "", "="])
def test_a_schedule_without_name_or_list(text: str):
    assert refused(NamedSchedule(), text) == (
        f"{text!r} is not NAME=20,17,11,6,1,3, nor NAME=every:3, nor NAME=keep:0.5, nor "
        "NAME=FILE.json."
    )


@pytest.mark.parametrize("text", ["every", "every:", "every:0", "every:x", "every:3:99", "every3"])
def test_a_rule_that_is_none(text: str):
    message = refused(NamedSchedule(), f"fast={text}")
    assert message.startswith(f"{text!r} is not every:K or every:K:R; K is 1 or more")
    assert "\n" not in message


def test_a_file_may_be_called_like_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("every:3.json").write_text("[20, 17, 11]")
    assert parse(NamedSchedule(), "fast=every:3.json") == ("fast", (20, 17, 11))


@pytest.mark.parametrize("text", ["a", "20;3", "20,", "1.5,3", "20-3", "file.txt"])
def test_a_schedule_that_is_no_list(text: str):
    message = refused(NamedSchedule(), f"fast={text}")
    assert message.startswith(repr(text))
    assert "list of degrees, one per layer" in message


def test_a_schedule_in_a_file(tmp_path: Path):
    file = tmp_path / "fast.json"
    file.write_text("[20, 17, 11]")
    assert parse(NamedSchedule(), f"fast={file}") == ("fast", (20, 17, 11))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("{}", "expected array, got object"),
        ("[20, 1.5]", "[1]: expected int, got float"),
        ('["20"]', "[0]: expected int, got str"),
        ("[true]", "[0]: expected int, got bool"),
        (" " * 1_000_001, "more than 1000000 bytes"),
    ],
)
def test_a_file_that_is_no_schedule(tmp_path: Path, content: str, message: str):
    file = tmp_path / "fast.json"
    file.write_text(content)
    found = refused(NamedSchedule(), f"fast={file}")
    assert found.startswith(f"{file} is no list of degrees: ")
    assert message in found


def test_no_such_file(tmp_path: Path):
    file = tmp_path / "fast.json"
    found = refused(NamedSchedule(), f"fast={file}")
    assert found == f"{file}: can't be read: No such file or directory."


@pytest.mark.parametrize(("text", "number"), [("0.1", 0.1), ("-3", -3.0), ("1e-3", 0.001)])
def test_a_number(text: str, number: float):
    assert parse(FiniteFloat(), text) == number


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_are_not_finite(text: str):
    assert refused(FiniteFloat(), text) == f"{text} is not a finite number."
    assert refused(FiniteFloat(0), text) == f"{text} is not a finite number of at least 0."


def test_a_number_that_is_too_small():
    assert refused(FiniteFloat(0), "-0.1") == "-0.1 is not a finite number of at least 0."
    assert math.isclose(parse(FiniteFloat(0), "0"), 0)
    assert "is not a valid float" in refused(FiniteFloat(), "much")
