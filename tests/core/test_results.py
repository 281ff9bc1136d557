from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tocom_export.errors import InputError, OutputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.study.accuracy import find_interval
from tocom_export.study.results import Results, Row, parse_row
from tocom_export.study.summary import (
    average,
    average_pairs,
    compare_banks,
    measure_gains,
    measure_gap_share,
)

ROW = Row("cifar", "tome", 0, 16, 70.0, 73.0, 74.0, 0)


def row(dataset: str, target: int, baseline: float, *more: float | None, **fields: Any) -> Row:
    tocom, reference = more or (None, None)
    fields = {"method": "tome", "source": 0, "seed": 0, **fields}
    return Row(
        dataset, target=target, baseline=baseline, tocom=tocom, reference=reference, **fields
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", ""),
        ("dataset", 3),
        ("method", "topk"),
        ("method", []),
        ("source", -1),
        ("source", True),
        ("target", 17),
        ("target", 4.0),
        ("baseline", None),
        ("baseline", "70"),
        ("baseline", float("nan")),
        ("baseline", 10**400),
        ("tocom", 100.1),
        ("reference", -0.1),
        ("seed", -1),
        ("seed", None),
        ("scale", float("inf")),
        ("scale", -0.1),
        ("variant", " "),
        ("images", 0),
        ("images", 2.5),
        ("throughput", 0),
        ("throughput", "fast"),
        ("model", None),
        ("model", 3),
    ],
)
def test_a_row_says_which_field_is_wrong(field: str, value: Any):
    with pytest.raises(InputError, match=f"^{field}: "):
        decode(Row, {**encode(ROW), field: value})


def test_a_document_comes_back(tmp_path: Path):
    ablation = replace(
        ROW, variant="rank 1", scale=0.1, images=10_000, throughput=1234.5, model="ä.pth"
    )
    results = Results((ROW, ablation), {"model": "DeiT-T → x"}, ("One.\n\nTwo |.",))
    results.save(tmp_path / "new" / "r.json")
    assert Results.load(tmp_path / "new" / "r.json") == results


def test_a_schedule_comes_back(tmp_path: Path):
    fast = replace(ROW, target=None, schedule="fast")
    Results((ROW, fast)).save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json").rows == (ROW, fast)
    assert (ROW.name, fast.name) == ("r16", "fast")


def test_a_row_for_machines():
    row = replace(ROW, variant="rank 1", images=10, throughput=9.5)
    found = row.describe("fp16", "onnx")
    assert found == {
        **encode(row, defaults=False), "variant": "r16", "bank": "rank 1", "precision": "fp16",
        "backend": "onnx", "accuracy": 73.0, "images": 10,
        "accuracy_low": row.interval[0], "accuracy_high": row.interval[1],
    }  # fmt: skip
    assert row.interval == find_interval(73.0, 10)
    assert replace(ROW, tocom=None).describe()["accuracy"] == ROW.baseline
    for each in (ROW, row, replace(ROW, target=None, schedule="fast")):
        assert parse_row(json.loads(json.dumps(each.describe("fp32", "torch")))) == each
    with pytest.raises(InputError, match=r"^acc: no such field"):
        parse_row({**ROW.describe(), "acc": 1})


def test_an_interval_is_not_stored(tmp_path: Path):
    """It follows from what is, and earlier results have none."""
    row = replace(ROW, images=10)
    Results((row,)).save(tmp_path / "r.json")
    assert "accuracy" not in (tmp_path / "r.json").read_text("utf-8")
    assert Results.load(tmp_path / "r.json").rows[0].interval == row.interval
    assert ROW.interval is None  # nobody knows of how many images
    assert ROW.describe()["accuracy_low"] is ROW.describe()["accuracy_high"] is None


def test_an_empty_document_comes_back(tmp_path: Path):
    Results().save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == Results()


def test_one_row_a_line(tmp_path: Path):
    file = tmp_path / "r.json"
    Results((ROW, replace(ROW, seed=1)), {"model": "m"}).save(file)
    before = file.read_text("utf-8").splitlines()
    Results((ROW, replace(ROW, seed=1, tocom=None)), {"model": "m"}).save(file)
    after = file.read_text("utf-8").splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert json.loads(file.read_text("utf-8"))["format"] == 1


def test_a_model_that_is_not_known_is_left_out():
    assert "model" not in ROW.describe()
    assert decode(Row, encode(ROW)).model == ""
    assert encode(replace(ROW, model="r00.safetensors"))["model"] == "r00.safetensors"


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"r\.json"):
        Results().save(tmp_path / "file" / "r.json")


def test_merging_replaces_the_same_measurement_in_its_place():
    results = Results((ROW, replace(ROW, dataset="cars")), {"model": "m"}, ("note",))
    better = replace(ROW, tocom=73.5, scale=0.1, model="r00.safetensors")
    merged = results.merge([better])
    assert merged == Results((better, results.rows[1]), results.about, results.notes)
    assert results.rows[0] == ROW


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cars"},
        {"method": "evit"},
        {"variant": "shared"},
        {"source": 4},
        {"target": 12},
        {"target": None, "schedule": "fast"},
        {"seed": 1},
    ],
)
def test_merging_keeps_another_measurement(change: dict[str, Any]):
    assert Results((ROW,)).merge([replace(ROW, **change)]).rows == (ROW, replace(ROW, **change))


GOOD = {"format": 1, "about": {}, "rows": [encode(ROW)], "notes": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "'format' must be 1"),
        ({"about": {"epochs": 3}}, "about.*: expected str, got int"),
        ({"about": []}, "about: expected object"),
        ({"notes": "text"}, "notes: expected array"),
        ({"notes": [3]}, r"notes\[0\]: expected str"),
        ({"rows": None}, "rows: expected array"),
        ({"rows": [3]}, r"rows\[0\]: expected object, got int"),
        ({"rows": [{}]}, r"rows\[0\]: object missing required field dataset"),
        ({"rows": [{**encode(ROW), "acc": 1}]}, r"rows\[0\]\.acc: no such field"),
        ({"rows": [{**encode(ROW), "target": 99}]}, r"rows\[0\]\.target: expected int <= 16"),
        ({"rows": [encode(ROW)] * 2}, r"rows\[1\] measures the same as an earlier row"),
        ({"rows": [{**encode(ROW), "target": None}]}, r"rows\[0\] needs either"),
        ({"rows": [{**encode(ROW), "schedule": "fast"}]}, r"rows\[0\] needs either"),
    ],
)
def test_a_document_says_which_field_is_wrong(tmp_path: Path, change: Any, message: str):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(GOOD))
    assert Results.load(file).rows == (ROW,)
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError, match=rf"r\.json: .*{message}"):
        Results.load(file)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": 1, "rows": [NaN', "\x00"])
def test_a_file_that_is_not_json(tmp_path: Path, text: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json: no JSON"):
        Results.load(tmp_path / "r.json")


def test_a_file_that_is_not_there_or_is_too_large(tmp_path: Path):
    with pytest.raises(InputError, match=r"r\.json: can't be read"):
        Results.load(tmp_path / "r.json")
    with (tmp_path / "r.json").open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(InputError, match="more than 10000000 bytes"):
        Results.load(tmp_path / "r.json")


def test_mean_and_spread():
    rows = [row("a", 8, number, seed=seed) for seed, number in enumerate((69.0, 70.0, 74.0))]
    assert average([rows[1:2]], "baseline") == (70.0, None)
    assert average([rows], "baseline") == (71.0, pytest.approx(7**0.5))


def test_the_share_is_a_ratio_of_sums():
    rows = [
        row("a", 0, 80.0), row("a", 16, 70.0, 76.0, 78.0),  # 6 of 8
        row("b", 0, 60.0), row("b", 16, 58.0, 57.0, 60.0),  # -1 of 2
    ]  # fmt: skip
    share = measure_gap_share(rows)
    assert share.share == pytest.approx(5 / 10)
    assert share.gains == {"a": 6.0, "b": -1.0}
    assert share.left_out == {}
    assert not share.each_gains
    assert measure_gap_share(rows[:2]).each_gains


def test_data_sets_without_a_gap_are_left_out():
    rows = [
        row("exactly", 0, 80.3), row("exactly", 16, 79.3, 79.8, 80.3),
        row("small", 0, 80.0), row("small", 16, 79.5, 70.0, 81.0),
        row("no plain", 16, 79.5, 79.0, 81.0),
        row("no reference", 0, 80.0), row("no reference", 16, 70.0, 79.0, None),
        row("no pair", 0, 80.0), row("no pair", 12, 70.0, 79.0, 80.0),
        row("pruned", 16, 70.0, 79.0, 80.0, method="evit"),
    ]  # fmt: skip
    share = measure_gap_share(rows)
    assert share.share == pytest.approx(0.5)
    assert list(share.gains) == ["exactly"]
    assert share.left_out == {
        "small": "compression alone costs it 0.50 points",
        "no plain": "0 → 0 is not measured",
        "no reference": "ToCom or the reference is not measured",
        "no pair": "0 → 16 is not measured",
    }


def test_the_share_averages_seeds_first():
    rows = [
        row("a", 0, 80.0), row("a", 16, 78.0, 79.0, 79.5),
        row("a", 0, 80.0, seed=1), row("a", 16, 79.8, 79.9, 80.3, seed=1),
        row("a", 16, 10.0, 90.0, 91.0, seed=2),  # without 0 → 0 of its seed
    ]  # fmt: skip
    share = measure_gap_share(rows)
    assert share.gains == {"a": pytest.approx(0.55)}
    assert share.share == pytest.approx((1.0 + 0.1) / (1.5 + 0.5))


def test_no_share_without_a_gap_or_without_rows():
    rows = [row("a", 0, 80.0), row("a", 16, 70.0, 75.0, 69.0)]
    assert measure_gap_share(rows).share is None
    assert measure_gap_share(rows).each_gains
    assert measure_gap_share([]).share is None
    assert not measure_gap_share([]).each_gains


def test_the_share_is_of_merging_with_the_bank():
    rows = [
        row("a", 0, 80.0, method="evit"),  # at 0 they are the same
        row("a", 16, 70.0, 75.0, 80.0),
        row("a", 16, 70.0, 72.0, 80.0, variant="shared"),
        row("a", 16, 60.0, 68.0, 80.0, method="evit"),
    ]
    assert measure_gap_share(rows).share == pytest.approx(0.5)


def test_gains():
    rows = [
        row("a", 12, 70.0, 71.0, None),
        row("a", 12, 70.0, 72.0, None, seed=1),
        row("b", 12, 70.0, 69.0, None),
        row("c", 12, 70.0),
        row("a", 12, 70.0, 90.0, None, variant="shared"),
        row("a", 12, 70.0, 90.0, None, method="evit"),
        row("a", 16, 70.0, 90.0, None),
    ]
    assert measure_gains(rows, 0, 12) == {"a": 1.5, "b": -1.0}
    assert measure_gains(rows, 16, 0) == {}


def test_pairs_average_over_data_sets_before_the_spread_over_seeds():
    rows = [
        row("a", 12, 70.0, 71.0, 80.0), row("a", 12, 72.0, 75.0, 80.0, seed=1),
        row("b", 12, 50.0, 51.0, None), row("b", 12, 52.0, 53.0, None, seed=1),
        row("a", 4, 60.0),
    ]  # fmt: skip
    four, twelve = average_pairs(rows)
    assert (four.target, four.datasets, four.baseline) == (4, ("a",), (60.0, None))
    assert twelve.datasets == ("a", "b")
    assert twelve.baseline == (61.0, pytest.approx(2**0.5))
    assert twelve.gain == (1.5, pytest.approx(0.5**0.5))  # 1 and 2
    assert twelve.reference is None
    assert twelve.throughput is None


def test_other_seeds_for_other_data_sets_have_no_common_spread():
    rows = [row("a", 12, 70.0), row("a", 12, 72.0, seed=1), row("b", 12, 50.0)]
    assert average_pairs(rows)[0].baseline == (60.5, None)


def test_banks_are_compared_on_the_runs_they_share():
    rows = [
        row("a", 12, 70.0, 72.0, None),
        row("a", 12, 80.0, 89.0, None, seed=1),
        row("b", 12, 50.0, 59.0, None),
        row("a", 12, 70.0, 71.0, None, variant="shared"),
        row("a", 16, 70.0, 71.0, None, variant="rank 1"),
    ]
    found = compare_banks(rows, 0, 12)
    assert {variant: pair.tocom for variant, pair in found.items()} == {
        "tocom": (72.0, None),
        "shared": (71.0, None),
    }
    assert compare_banks(rows, 16, 0) == {}
    assert compare_banks([rows[2], rows[3]], 0, 12) == {}
