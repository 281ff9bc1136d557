"""Plans for all variants of a bundle, by a library that stands in for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.engine import Images
from tocom_export.engines.tensorrt.add_plans import add_plans
from tocom_export.engines.tensorrt.building import PlanOptions
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.plan import open_plan
from tocom_export.engines.verify import sample_images
from tocom_export.errors import CheckFailed
from tocom_export.variant import Variant

NAMES = ("r00", "r08", "r16", "fast")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def builds(nvidia: Any) -> list[str]:
    return [rest[0]["graph"] for kind, *rest in nvidia.trt.asked if kind == "build"]


def what_the_plan_says(bundle: Bundle) -> Any:
    """An oracle that agrees with the pretended library, whatever its plans were built for."""

    def oracle(variant: Variant, images: Images) -> Any:
        return TensorRtEngine(bundle.path / f"{variant.name}.plan").run(images)

    return oracle


def test_each_variant_has_its_own(nvidia, mixed: Bundle):
    told: list[str] = []
    steps: list[Any] = []
    images = sample_images(mixed.spec, 3)
    having = add_plans(
        mixed, "tensorrt", PlanOptions(batch=(1, 2, 4)), images, what_the_plan_says(mixed),
        tell=told.append, progress=lambda name: lambda *step: steps.append((name, *step)),
    )  # fmt: skip
    assert having.plans == NAMES
    for name in NAMES:
        _, record = open_plan(having.plan(name))
        assert (record.variant, record.batch) == (mixed.variant(name), (1, 2, 4))
        assert (f"{name}.plan", "all", 4, 4) in steps
    assert builds(nvidia) == [f"{name}.onnx" for name in NAMES]
    assert [line.split(":")[0] for line in told if "built," in line] == [
        f"{name}.plan" for name in NAMES
    ]
    assert having.engine("fast", backend="tensorrt").run(images).shape == (3, 10)


def test_what_was_built_before_is_refitted(nvidia, mixed: Bundle, cache: Path):
    images = sample_images(mixed.spec, 3)
    add_plans(mixed, "tensorrt", PlanOptions(), images)
    assert len(list(cache.glob("*.plan"))) == len(NAMES)
    wanted = {name: (mixed.path / f"{name}.plan").read_bytes() for name in NAMES}
    told: list[str] = []
    nvidia.trt.asked.clear()
    add_plans(mixed, "tensorrt", PlanOptions(), images, tell=told.append)
    assert builds(nvidia) == []
    assert sum("refitted from an earlier build's" in line for line in told) == len(NAMES)
    assert {name: (mixed.path / f"{name}.plan").read_bytes() for name in NAMES} == wanted


def test_one_that_is_refitted_wrongly_is_built_afresh(nvidia, mixed: Bundle):
    images = sample_images(mixed.spec, 3)
    add_plans(mixed, "tensorrt", PlanOptions(), images)
    right = {name: TensorRtEngine(mixed.path / f"{name}.plan").run(images) for name in NAMES}
    nvidia.trt.asked.clear()

    def oracle(variant: Variant, images: Images) -> Any:
        if variant.name == "fast" and "fast.onnx" not in builds(nvidia):
            return right["fast"] + 1
        return right[variant.name]

    told: list[str] = []
    add_plans(mixed, "tensorrt", PlanOptions(), images, oracle, "the model", tell=told.append)
    assert builds(nvidia) == ["fast.onnx"]
    assert "fast.plan: refitted, it fails its check; it is built afresh" in told


def test_a_plan_that_says_something_else(nvidia, mixed: Bundle, cache: Path):
    images = sample_images(mixed.spec, 3)

    def oracle(variant: Variant, images: Images) -> Any:
        return np.ones((len(images), 10), np.float32)

    with pytest.raises(CheckFailed, match=r"r00\.plan differs from the model .* no bundle was"):
        add_plans(mixed, "tensorrt", PlanOptions(), images, oracle, "the model")
    assert not cache.exists()  # nothing wrong is kept for later


def test_without_images_nothing_is_run_or_kept(nvidia, mixed: Bundle, cache: Path):
    add_plans(mixed, "tensorrt", PlanOptions(), None)
    assert not [entry for entry in nvidia.trt.asked if entry[0] == "shape"]
    assert not cache.exists()


def test_rtx_builds_without_a_gpu(nvidia, mixed: Bundle):
    nvidia.cuda.gpus = 0
    images = sample_images(mixed.spec, 3)
    having = add_plans(mixed, "tensorrt-rtx", PlanOptions(refit="none"), images)
    assert having.plans == NAMES
    assert open_plan(having.plan("fast"))[1].gpu is None
