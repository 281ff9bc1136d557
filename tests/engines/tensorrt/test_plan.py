"""What is written beside a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tensorrt import plan as module
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import (
    check_batches,
    check_host_code,
    open_plan,
    record_path,
    save_plan,
)
from tocom_export.errors import InputError, PlanError
from tocom_export.io.atomic import replace_file
from tocom_export.io.json_codec import encode


@pytest.fixture
def plan(nvidia: Any, fresh: Bundle, write_plan: Callable[..., Path]) -> Path:
    return write_plan(fresh)


def read(plan: Path) -> Any:
    return json.loads(record_path(plan).read_text("utf-8"))


def test_the_record(nvidia, bundle: Bundle, tmp_path: Path):
    variant = bundle.variant("r08")
    content, record = build_plan(
        open_library("tensorrt"), bundle, variant, PlanOptions(batch=(2, 4, 6))
    )
    save_plan(tmp_path / "r08.plan", content, record)
    assert open_plan(tmp_path / "r08.plan") == (content, record)
    data = read(tmp_path / "r08.plan")
    assert data["format"] == 2
    assert data["sha256"] == hashlib.sha256(content).hexdigest()
    assert data["variant"] == {
        "name": "r08", "degrees": [8] * 4, "targets": [8] * 4,
        "source": 0, "scale": 0.1, "compensated": True,
    }  # fmt: skip
    assert (data["backend"], data["version"]) == ("tensorrt", "10.13.3")
    assert (data["gpu"], data["compute_capability"]) == ("Pretended GPU", [8, 9])
    assert (data["precision"], data["batch"], data["refit"]) == ("fp32", [2, 4, 6], "qkv")


def test_the_record_of_a_degree_in_each_layer(nvidia, mixed: Bundle, write_plan):
    plan = write_plan(mixed, "fast")
    assert (plan.name, record_path(plan).name) == ("fast.plan", "fast.plan.json")
    content, record = open_plan(plan)
    assert record.variant == mixed.variant("fast")
    assert read(plan)["variant"] == encode(mixed.variant("fast"))
    assert read(plan)["variant"]["targets"] == [16, 16, 11.5, pytest.approx(7 + 2 / 3)]
    save_plan(plan, content, record)
    assert open_plan(plan) == (content, record)


def test_a_plan_without_its_record(plan: Path):
    record_path(plan).unlink()
    with pytest.raises(PlanError, match=r"has no r08\.plan\.json beside it"):
        open_plan(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9}, {"spec": {}}, {"backend": "other"}, {"precision": "fp8"}, {"batch": [1]},
        {"refittable": 3}, {"compute_capability": "8.9"}, {"stripped": "yes"}, {"refit": "some"},
        {"refit": []}, {"batch": [1, 8, 4]}, {"batch": ["1", "8", "32"]}, {"gpu": 4},
        {"compute_capability": [8, "9"]}, {"flags": "STRIP_PLAN"}, {"flags": [1]}, {"version": 10},
        {"refittable": {"a": ["x", "float32"]}}, {"refittable": {"a": [[3], "float8"]}},
        {"refittable": {"a": {"shape": ["x"], "dtype": "float32"}}},
        {"refittable": {"a": {"shape": [3], "dtype": "float8"}}},
        {"method": {"name": "tome", "proportional": None}}, {"method": {"name": "other"}},
        {"fixed": 0}, {"sha256": None}, {"unknown": 1}, {"variant": "r08"}, {"variant": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record(plan: Path, change: dict[str, Any]):
    record_path(plan).write_text(json.dumps({**read(plan), **change}))
    with pytest.raises(PlanError, match=r"r08\.plan\.json can't be understood"):
        open_plan(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "r16"}, {"name": "../x"}, {"name": 8}, {"degrees": "8"}, {"degrees": 8},
        {"degrees": [8, 8, 8, -1]}, {"degrees": [True] * 4}, {"degrees": [999] * 4},
        {"degrees": [8] * 3}, {"targets": [17] * 4}, {"targets": [8] * 3}, {"targets": ["8"] * 4},
        {"source": None}, {"source": 8.0}, {"source": "8"}, {"source": True}, {"source": 17},
        {"scale": "x"}, {"scale": -1}, {"scale": float("nan")}, {"compensated": 1}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_a_damaged_variant(plan: Path, change: dict[str, Any]):
    data = read(plan)
    record_path(plan).write_text(json.dumps({**data, "variant": {**data["variant"], **change}}))
    with pytest.raises(PlanError, match=r"r08\.plan\.json can't be understood"):
        open_plan(plan)


def test_a_record_that_is_no_json(plan: Path):
    for text in ("", "{", "[]", "null", "[" * 100_000):
        record_path(plan).write_text(text)
        with pytest.raises(PlanError, match="can't be understood"):
            open_plan(plan)


def test_a_damaged_plan(plan: Path):
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(PlanError, match=r"is damaged, or r08\.plan\.json is another plan's"):
        open_plan(plan)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_broken_off_write_leaves_a_plan_and_what_describes_it(
    plan: Path, monkeypatch, stop_after: int
):
    content, old = open_plan(plan)
    other = content + b"other"
    variant = dataclasses.replace(old.variant, source=4)
    new = dataclasses.replace(old, variant=variant, sha256=hashlib.sha256(other).hexdigest())

    write, count = replace_file, iter(range(9))

    def breaking(path: Path) -> Any:
        if next(count) == stop_after:
            raise OSError("killed")
        return write(path)

    monkeypatch.setattr(module, "replace_file", breaking)
    with pytest.raises(OSError, match="killed"):
        save_plan(plan, other, new)
    assert open_plan(plan) == ((content, old) if stop_after < 2 else (other, new))
    monkeypatch.setattr(module, "replace_file", write)
    save_plan(plan, content, old)
    assert open_plan(plan) == (content, old)


def test_a_damaged_record_is_written_over(plan: Path):
    content, record = open_plan(plan)
    for text in ("{", "[]", "{}"):
        record_path(plan).write_text(text)
        save_plan(plan, content, record)
        assert open_plan(plan) == (content, record)


def test_batches_that_a_plan_takes(plan: Path):
    _, record = open_plan(plan)
    check_batches(plan, record, (1, 32))
    for batch, least in ((33, 1), (0, 1), (1, 2)):
        with pytest.raises(InputError, match=rf"`batch` {batch}: .*takes {least} to 32 images"):
            check_batches(plan, record, (4, batch), least=least)


def test_code_that_a_plan_brings_along(plan: Path):
    _, record = open_plan(plan)
    check_host_code(plan, record, False)
    carrying = dataclasses.replace(record, flags=("VERSION_COMPATIBLE",))
    check_host_code(plan, carrying, True)
    with pytest.raises(PlanError, match="allow that with `host_code`"):
        check_host_code(plan, carrying, False)
