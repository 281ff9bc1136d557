"""Plans that are kept for later builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.machine import find_cache
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.cache import find_place, keep_plan, take_plan
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import save_plan

PLAIN = PlanOptions()
Revise = Callable[..., Blueprint]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def builds(nvidia: Any) -> int:
    return sum(entry[0] == "build" for entry in nvidia.trt.asked)


def get(bundle: Bundle, name: str = "r08", **options: Any) -> tuple[bytes, Any, bool]:
    """A plan as ``build`` gets it, and whether it was kept from before."""
    library, wanted, variant = (
        open_library("tensorrt"),
        PlanOptions(**options),
        bundle.variant(name),
    )
    file = find_place(library, bundle, variant, wanted)
    if file and (kept := take_plan(file, bundle, variant)):
        return *kept, True
    content, record = build_plan(library, bundle, variant, wanted)
    if file:
        keep_plan(file, content, record)
    return content, record, False


@pytest.mark.parametrize("name", ["r08", "fast"])
def test_another_source_is_refitted(
    nvidia, make_blueprint, tmp_path: Path, make_images, revise: Revise, name: str
):
    blueprint = make_blueprint(tmp_path, targets=(8,), schedules={"fast": (20, 3, 0, 7)})
    first = write_bundle(blueprint, tmp_path / "first")
    second = write_bundle(revise(blueprint, source=4, scale=0.05), tmp_path / "second")
    assert get(first, name)[2] is False
    content, record, cached = get(second, name)
    assert cached is True
    assert builds(nvidia) == 1
    assert record.variant == second.variant(name)
    assert (record.variant.source, record.variant.scale) == (4, 0.05)
    save_plan(tmp_path / "refitted.plan", content, record)
    afresh = build_plan(open_library("tensorrt"), second, second.variant(name), PLAIN)
    save_plan(tmp_path / "built.plan", *afresh)
    images = make_images(second.spec, 2)
    refitted, built = (
        TensorRtEngine(tmp_path / f"{kind}.plan").run(images) for kind in ("refitted", "built")
    )
    np.testing.assert_array_equal(refitted, built)


def test_the_name_of_a_variant_is_no_matter_but_its_degrees_are(nvidia, make_blueprint, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    schedules = [{"fast": (20, 3, 0, 7)}, {"quick": (20, 3, 0, 7)}, {"fast": (20, 3, 0, 8)}]
    bundles = []
    for folder, schedule in zip(folders, schedules, strict=True):
        folder.mkdir()
        blueprint = make_blueprint(folder, targets=(8,), schedules=schedule)
        bundles.append(write_bundle(blueprint, folder / "bundle"))
    one, two, three = bundles
    get(one, "fast")
    _, record, cached = get(two, "quick")
    assert cached is True
    assert record.variant == two.variant("quick")
    assert get(three, "fast")[2] is False
    assert get(one, "r08")[2] is False


@pytest.mark.parametrize(
    "options", [{"batch": (1, 2, 3)}, {"refit": "all"}, {"strip": True}], ids=str
)
def test_other_options_are_built(nvidia, bundle: Bundle, options: dict[str, Any]):
    get(bundle)
    assert get(bundle, **options)[2] is False
    assert get(bundle, **options)[2] is True
    assert get(bundle, "r16", **options)[2] is False
    assert builds(nvidia) == 3


def test_another_version_or_gpu_is_built(nvidia, bundle: Bundle):
    get(bundle)
    nvidia.trt.__version__ = "10.14.0"
    assert get(bundle)[2] is False
    nvidia.cuda.capability = (9, 0)
    assert get(bundle)[2] is False


def test_other_fixed_weights_are_built(
    nvidia, blueprint: Blueprint, tmp_path: Path, revise: Revise
):
    tensors = dict(blueprint.weights.checkpoint.tensors)
    tensors["head.bias"] = tensors["head.bias"] + np.float32(1)
    other = dataclasses.replace(blueprint.weights.checkpoint, tensors=tensors)
    first = write_bundle(blueprint, tmp_path / "first")
    second = write_bundle(revise(blueprint, checkpoint=other), tmp_path / "second")
    get(first)
    assert get(second)[2] is False
    get(first, refit="all")
    assert get(second, refit="all")[2] is True


@pytest.mark.parametrize("strip", [False, True])
def test_a_folded_weight_that_differs_is_built(
    nvidia, blueprint: Blueprint, tmp_path: Path, revise: Revise, strip: bool
):
    """``refit`` all marks every weight; those that the builder folds keep their values."""
    nvidia.trt.hides = {"cls_token"}
    tensors = dict(blueprint.weights.checkpoint.tensors)
    tensors["cls_token"] = tensors["cls_token"] + np.float32(1)
    other = dataclasses.replace(blueprint.weights.checkpoint, tensors=tensors)
    first = write_bundle(blueprint, tmp_path / "first")
    second = write_bundle(revise(blueprint, checkpoint=other), tmp_path / "second")
    get(first, refit="all", strip=strip)
    assert get(first, refit="all", strip=strip)[2] is True
    assert get(second, refit="all", strip=strip)[2] is False
    assert get(second, refit="all", strip=strip)[2] is True


def test_what_can_t_be_refitted_is_not_kept(nvidia, bundle: Bundle, folder: Path):
    get(bundle, refit="none")
    assert get(bundle, refit="none")[2] is False
    assert not folder.exists()


def test_a_damaged_plan_is_built_again(nvidia, bundle: Bundle, folder: Path):
    wanted = get(bundle)[0]
    (kept,) = folder.glob("*.plan")
    kept.write_bytes(b"damaged")
    assert get(bundle)[0] == wanted
    assert builds(nvidia) == 2
    assert get(bundle)[2] is True


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TOCOM_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_cache() == tmp_path / "tocom-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_cache() == tmp_path / ".cache" / "tocom-export"


def test_a_place_that_can_t_be_written(nvidia, bundle: Bundle, folder: Path):
    folder.write_text("a file")
    get(bundle)
    assert get(bundle)[2] is False


def test_a_gpu_without_memory_builds_again(nvidia, bundle: Bundle):
    get(bundle)
    nvidia.trt.refuses.add("context")
    assert get(bundle)[2] is False


def test_a_library_whose_plans_are_at_their_end(nvidia, bundle: Bundle, monkeypatch):
    get(bundle)
    monkeypatch.setattr(TensorRtEngine, "refittable", False)
    assert get(bundle)[2] is False
