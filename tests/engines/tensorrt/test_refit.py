"""Other weights in a plan's files, by a library that stands in for TensorRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import Blueprint
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.plan import open_plan
from tocom_export.engines.tensorrt.refit import refit_plan
from tocom_export.errors import CheckFailed, PlanError
from tocom_export.variant import Variant

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]
WritePlan = Callable[..., Path]


def changed(bundle: Bundle, name: str = "r08", **changes: Any) -> Variant:
    return dataclasses.replace(bundle.variant(name), **changes)


@pytest.fixture
def other(blueprint: Blueprint, tmp_path: Path) -> Callable[..., ModelWeights]:
    """Weights of a checkpoint in which some tensors are others."""

    def make(*names: str) -> ModelWeights:
        weights = blueprint.weights
        tensors = {name: np.array(tensor) for name, tensor in weights.checkpoint.tensors.items()}
        for name in names:
            tensors[name] *= np.float32(1.5)
        save_file(tensors, tmp_path / "other.safetensors")
        opened = Checkpoint.open(tmp_path / "other.safetensors")
        return dataclasses.replace(weights, checkpoint=opened)

    return make


@pytest.mark.parametrize("name", ["r08", "fast"])
def test_a_stripped_plan_runs_once_it_is_refitted(
    nvidia, mixed: Bundle, mixed_blueprint: Blueprint, write_plan: WritePlan, make_images, name: str
):
    images = make_images(mixed.spec, 2)
    wanted = TensorRtEngine(write_plan(mixed, name)).run(images)
    stripped = write_plan(mixed, name, strip=True)
    size = stripped.stat().st_size
    with pytest.raises(PlanError, match="stripped of its weights; tocom-export refit"):
        TensorRtEngine(stripped).run(images)
    refit_plan(stripped, mixed.variant(name), mixed_blueprint.weights, stripped)
    assert stripped.stat().st_size > size
    engine = TensorRtEngine(stripped)
    assert not engine.record.stripped
    np.testing.assert_array_equal(engine.run(images), wanted)


@pytest.mark.parametrize("name", ["r08", "fast"])
def test_a_refitted_plan_can_be_refitted_again(
    nvidia, mixed: Bundle, mixed_blueprint: Blueprint, write_plan: WritePlan, make_images, name: str
):
    weights, images = mixed_blueprint.weights, make_images(mixed.spec, 2)
    file = write_plan(mixed, name)
    before = TensorRtEngine(file).run(images)
    out = mixed.path / "other.plan"
    variant = changed(mixed, name, source=4, scale=0.05)
    record = refit_plan(file, variant, weights, out)
    assert record.variant == variant
    assert open_plan(out)[1] == record
    assert TensorRtEngine(out).variant == variant
    np.testing.assert_array_equal(TensorRtEngine(file).run(images), before)
    assert not np.array_equal(TensorRtEngine(out).run(images), before)
    refit_plan(out, mixed.variant(name), weights, out)
    np.testing.assert_array_equal(TensorRtEngine(out).run(images), before)
    assert ("serialize", ["INCLUDE_REFIT"]) in nvidia.trt.asked  # with weights, and refittable


def test_before_10_14_a_saved_refit_may_be_the_last(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan, monkeypatch
):
    monkeypatch.delattr(nvidia.trt.SerializationFlag, "INCLUDE_REFIT")
    file = write_plan(fresh)
    refit_plan(file, changed(fresh, source=4), blueprint.weights, file)
    assert ("serialize", "plainly") in nvidia.trt.asked
    assert open_plan(file)[1].refit == "qkv"  # this one came out refittable
    stripped = write_plan(fresh, "r16", strip=True)
    engine = TensorRtEngine(stripped)
    engine.refit({name: fresh.tensors(16)[name] for name in QKV})
    engine.serialize()
    assert nvidia.trt.asked[-1] == ("serialize", [])

    monkeypatch.setattr(TensorRtEngine, "refittable", False)
    record = refit_plan(file, fresh.variant("r08"), blueprint.weights, file)
    assert (record.refit, record.refittable) == ("none", {})
    with pytest.raises(PlanError, match="--refit none"):
        refit_plan(file, fresh.variant("r08"), blueprint.weights, file)


def test_a_plan_that_lets_nothing_go(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan
):
    plan = write_plan(fresh, refit="none")
    with pytest.raises(PlanError, match="--refit none; build it with --refit qkv"):
        refit_plan(plan, fresh.variant("r08"), blueprint.weights, fresh.path / "out.plan")
    assert not (fresh.path / "out.plan").exists()


def test_another_model(nvidia, fresh: Bundle, other, write_plan: WritePlan, make_images):
    variant, images = fresh.variant("r08"), make_images(fresh.spec)
    plan = write_plan(fresh)
    before = TensorRtEngine(plan).run(images)
    refit_plan(plan, variant, other(*QKV), plan)
    assert not np.array_equal(TensorRtEngine(plan).run(images), before)
    content = plan.read_bytes()
    with pytest.raises(PlanError, match=r"differ from those of .*r08\.plan .* --refit all"):
        refit_plan(plan, variant, other(*QKV, "head.weight"), plan)
    assert plan.read_bytes() == content
    refit_plan(write_plan(fresh, refit="all"), variant, other(*QKV, "head.weight"), plan)


def test_a_model_with_other_classes(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan, tmp_path: Path
):
    weights = blueprint.weights
    tensors = dict(weights.checkpoint.tensors)
    tensors["head.weight"] = np.ones((4, 64), np.float32)
    tensors["head.bias"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "four.safetensors")
    four = dataclasses.replace(weights, checkpoint=Checkpoint.open(tmp_path / "four.safetensors"))
    for refit in ("qkv", "all"):
        plan = write_plan(fresh, refit=refit)
        content = plan.read_bytes()
        with pytest.raises(PlanError, match=r"more than it lets go of|head\.bias is float32 of"):
            refit_plan(plan, fresh.variant("r08"), four, plan)
        assert plan.read_bytes() == content


def test_what_is_checked_is_what_is_written(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan, make_images, monkeypatch
):
    """A library may run what it refitted, and save something else."""
    images = make_images(fresh.spec, 2)
    file = write_plan(fresh)
    content, before = file.read_bytes(), TensorRtEngine(file).run(images)
    seen: list[Any] = []
    variant = changed(fresh, source=4)

    def check(engine: TensorRtEngine) -> None:
        assert engine.variant == variant
        seen.append(engine.run(images))

    refit_plan(file, variant, blueprint.weights, file, check)
    np.testing.assert_array_equal(TensorRtEngine(file).run(images), seen[0])
    monkeypatch.setattr(TensorRtEngine, "serialize", lambda _: content)
    refit_plan(file, variant, blueprint.weights, fresh.path / "r16.plan", check)
    np.testing.assert_array_equal(seen[1], before)


def test_a_failed_check_leaves_the_files_as_they_were(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan
):
    def fails(*_: Any) -> None:
        raise CheckFailed("no")

    file = write_plan(fresh)
    before = {file.name: file.read_bytes() for file in fresh.path.iterdir()}
    with pytest.raises(CheckFailed):
        refit_plan(file, changed(fresh, source=4), blueprint.weights, file, fails)
    assert {file.name: file.read_bytes() for file in fresh.path.iterdir()} == before
