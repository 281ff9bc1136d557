"""Plans that take back the weights they were built with: built, opened, refused other ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.tensorrt.add_plans import add_plans
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.cache import find_place
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.identical import add_constants
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import open_plan, record_path, save_plan
from tocom_export.engines.tensorrt.refit import refit_plan
from tocom_export.engines.tensorrt.verify_plans import verify_plans
from tocom_export.engines.verify import sample_images
from tocom_export.errors import BundleError, PlanError

WritePlan = Callable[..., Path]
OTHERS = r"takes back the weights that it was built with alone \(refit: identical\)"
IDENTICAL = PlanOptions(refit="identical")


@pytest.fixture
def planned(nvidia: Any, mixed: Bundle) -> Bundle:
    """The bundle with a plan of each variant, run as it was built."""
    return add_plans(mixed, "tensorrt", IDENTICAL, sample_images(mixed.spec, 3))


def asked(nvidia: Any, kind: str) -> list[Any]:
    return [rest for found, *rest in nvidia.trt.asked if found == kind]


def test_what_is_asked_of_the_builder(nvidia, planned: Bundle):
    for build in asked(nvidia, "build"):
        assert build[0]["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
        assert build[0]["marked"] == []
    for name, variant in planned.variants.items():
        _, record = open_plan(planned.plan(name))
        assert (record.refit, record.stripped, record.variant) == ("identical", True, variant)
        assert record.flags == ("REFIT_IDENTICAL", "STRIP_PLAN")


def test_a_plan_takes_constants_of_its_graph_back_too(nvidia, planned: Bundle):
    graph = onnx.load(planned.graph("fast"), load_external_data=False).graph
    inline = {t.name for t in graph.initializer if not t.external_data}
    record = open_plan(planned.plan("fast"))[1]
    assert set(record.refittable) == set(planned.spec.weights()) | inline
    assert {record.refittable[name].dtype for name in inline} == {"int64", "float32"}
    nvidia.trt.asked.clear()
    planned.engine("fast", backend="tensorrt")
    assert {name for name, _ in asked(nvidia, "set")} == set(record.refittable)


def test_the_strip_option_says_nothing_new(nvidia, mixed: Bundle, write_plan: WritePlan):
    plain = open_plan(write_plan(mixed, refit="identical"))
    assert open_plan(write_plan(mixed, refit="identical", strip=True)) == plain


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_any_precision(nvidia, blueprint: Blueprint, revise: Any, tmp_path: Path, precision: str):
    scales = {f"blocks.{i}.{part}": 0.05 for i in range(4) for part in
              ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    calibrate = (lambda *_: scales) if precision == "int8" else None
    changed = revise(blueprint, precision=precision)
    bundle = write_bundle(changed, tmp_path / precision, calibrate=calibrate)
    images = sample_images(bundle.spec, 2)
    having = add_plans(bundle, "tensorrt", IDENTICAL, images)
    assert np.isfinite(having.engine(8, backend="tensorrt").run(images)).all()


def test_it_runs_with_its_bundle_alone(nvidia, planned: Bundle):
    images = sample_images(planned.spec, 2)
    first, again = (planned.engine("fast", backend="tensorrt").run(images) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    alone = TensorRtEngine(planned.plan("fast"))
    with pytest.raises(PlanError, match="has no weights; open it with its bundle"):
        alone.run(images)
    alone.refit(add_constants(planned, "fast", planned.tensors("fast")))
    np.testing.assert_array_equal(alone.run(images), first)


def test_other_weights_are_refused(
    nvidia, planned: Bundle, mixed_blueprint: Blueprint, tmp_path: Path
):
    plan, weights = planned.plan("fast"), mixed_blueprint.weights
    before = plan.read_bytes(), record_path(plan).read_bytes()
    other = dataclasses.replace(planned.variant("fast"), source=9)
    with pytest.raises(PlanError, match=OTHERS + r"; build it again .* --refit qkv or all"):
        refit_plan(plan, other, weights, tmp_path / "out.plan")
    assert (plan.read_bytes(), record_path(plan).read_bytes()) == before
    assert not (tmp_path / "out.plan").exists()
    new = {**weights.shared(), **weights.own(other)}
    with pytest.raises(PlanError, match=OTHERS):
        planned.engine("fast", backend="tensorrt", weights=new)
    engine, images = planned.engine("fast", backend="tensorrt"), sample_images(planned.spec, 2)
    first = engine.run(images)
    with pytest.raises(PlanError, match=OTHERS):
        engine.refit(add_constants(planned, "fast", new))
    np.testing.assert_array_equal(engine.run(images), first)  # nothing was touched


def replace_weights(bundle: Bundle, name: str) -> Bundle:
    """A bundle in which a weights file holds other values, and the manifest knows that."""
    tensors = load_file(bundle.path / name)
    tensors["head.bias" if "head.bias" in tensors else min(tensors)][...] += 1
    save_file(tensors, bundle.path / name)
    return dataclasses.replace(bundle, files={**bundle.files, **record_files(bundle.path, [name])})


@pytest.mark.parametrize("name", ["weights.safetensors", "fast.safetensors"])
def test_a_bundle_whose_weights_were_exchanged(nvidia, planned: Bundle, name: str):
    """A refit of the bundle's own files leaves its plans as they were."""
    changed = replace_weights(planned, name)
    with pytest.raises(PlanError, match=OTHERS):
        changed.engine("fast", backend="tensorrt")
    images = sample_images(planned.spec, 2)
    _, skipped = verify_plans(changed, images, lambda variant, _: np.zeros((2, 10), np.float32))
    assert "built with alone" in skipped["fast.plan"]


@pytest.mark.parametrize("name", ["weights.safetensors", "fast.safetensors", "fast.onnx"])
def test_files_that_are_not_what_the_manifest_says(nvidia, planned: Bundle, name: str):
    file = planned.path / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not what its bundle's manifest said"):
        planned.engine("fast", backend="tensorrt")


def test_a_plan_that_wants_what_nobody_has(nvidia, mixed: Bundle, write_plan: WritePlan):
    nvidia.trt.adds = {"(Unnamed Layer* 5) [Constant]"}
    with pytest.raises(PlanError, match=r"asks for \(Unnamed Layer\* 5\) .*`refit` none"):
        write_plan(mixed, refit="identical")


def test_what_the_library_folded_is_not_asked_for(nvidia, mixed: Bundle, write_plan: WritePlan):
    nvidia.trt.hides = {"cls_token", "pos_embed"}
    record = open_plan(write_plan(mixed, refit="identical"))[1]
    assert not nvidia.trt.hides & set(record.refittable)
    having = dataclasses.replace(mixed, plans=("r08",))
    having.engine(8, backend="tensorrt")
    with pytest.raises(PlanError, match=OTHERS):  # it lies in the plan, as it was
        replace_weights(having, "weights.safetensors").engine(8, backend="tensorrt")


def test_nothing_is_kept_for_later_builds(nvidia, mixed: Bundle, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    assert find_place(open_library("tensorrt"), mixed, mixed.variant(8), IDENTICAL) is None


def test_without_a_gpu(nvidia, bundle: Bundle):
    nvidia.cuda.gpus = 0
    for library in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(PlanError, match="no GPU that CUDA can use"):
            build_plan(open_library(library), bundle, bundle.variant(8), IDENTICAL)


def test_a_record_that_contradicts_itself(nvidia, fresh: Bundle, write_plan: WritePlan):
    plan = write_plan(fresh, refit="identical")
    data = json.loads(record_path(plan).read_text("utf-8"))
    record_path(plan).write_text(json.dumps({**data, "stripped": False}))
    with pytest.raises(PlanError, match=r"can't be understood \(stripped: a plan of refit ident"):
        open_plan(plan)


def test_a_library_that_refuses_its_own_weights(nvidia, planned: Bundle):
    nvidia.trt.refuses.add("refit")
    with pytest.raises(PlanError, match="tensorrt can't refit it"):
        planned.engine("fast", backend="tensorrt")


def test_saved_and_opened(nvidia, planned: Bundle, tmp_path: Path):
    content, record = open_plan(planned.plan("fast"))
    save_plan(tmp_path / "fast.plan", content, record)
    assert open_plan(tmp_path / "fast.plan") == (content, record)
