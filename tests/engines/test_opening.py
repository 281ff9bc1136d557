"""From a bundle to an engine of any backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.opening import open_engine
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.errors import BundleError, DegreeError, InputError, PlanError


@pytest.fixture
def planned(nvidia: Any, mixed: Bundle, write_plan: Callable[..., Path]) -> Callable[..., Bundle]:
    """A bundle with a plan of ``fast``."""

    def call(**options: Any) -> Bundle:
        write_plan(mixed, "fast", **options)
        return dataclasses.replace(mixed, plans=("fast",))

    return call


@pytest.mark.parametrize("name", ["fast", "r08", "8", 8])
def test_a_variant_by_its_name_or_degree(mixed: Bundle, make_images, name: Any):
    engine = mixed.engine(name, threads=1)
    assert isinstance(engine, OnnxEngine)
    assert engine.variant == mixed.variant(name)
    images = make_images(mixed.spec)
    np.testing.assert_array_equal(
        engine.run(images), OnnxEngine(mixed, engine.variant, threads=1).run(images)
    )


def test_a_variant_that_the_bundle_lacks(bundle: Bundle):
    with pytest.raises(DegreeError, match="has no variant fast; it has r00, r08, r16"):
        bundle.engine("fast")


def test_a_plan(planned: Callable[..., Bundle], make_images):
    bundle = planned(batch=(1, 2, 4))
    engine = bundle.engine("fast", backend="tensorrt")
    assert isinstance(engine, TensorRtEngine)
    assert (engine.variant, engine.largest) == (bundle.variant("fast"), 4)
    images = make_images(bundle.spec, 2)
    before = engine.run(images)
    weights = dict(bundle.tensors("fast"))
    again = open_engine(bundle, engine.variant, backend="tensorrt", weights=weights)
    np.testing.assert_array_equal(again.run(images), before)
    weights |= {name: bundle.tensors(8)[name] for name in engine.record.refittable}
    other = open_engine(bundle, engine.variant, backend="tensorrt", weights=weights)
    assert not np.array_equal(other.run(images), before)
    weights["head.bias"] = weights["head.bias"] + np.float32(1)
    with pytest.raises(PlanError, match="in more than it lets go of"):
        open_engine(bundle, engine.variant, backend="tensorrt", weights=weights)


def test_a_variant_without_a_plan(planned: Callable[..., Bundle]):
    with pytest.raises(DegreeError, match=r"has no plan for r08 \(plans: fast\)"):
        planned().engine("r08", backend="tensorrt")


def test_a_stripped_plan_takes_the_bundles_weights(planned: Callable[..., Bundle], make_images):
    bundle = planned()
    images = make_images(bundle.spec, 2)
    wanted = bundle.engine("fast", backend="tensorrt").run(images)
    bundle = planned(strip=True)
    np.testing.assert_array_equal(bundle.engine("fast", backend="tensorrt").run(images), wanted)
    file = bundle.path / "fast.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"fast\.safetensors is not what .* manifest said"):
        bundle.engine("fast", backend="tensorrt")


def test_code_that_a_plan_brings_along_must_be_allowed(planned: Callable[..., Bundle]):
    bundle = planned(version_compatible=True)
    with pytest.raises(PlanError, match="brings code along"):
        bundle.engine("fast", backend="tensorrt")
    bundle.engine("fast", backend="tensorrt", host_code=True)


def test_a_plan_of_the_other_library(planned: Callable[..., Bundle]):
    with pytest.raises(InputError, match=r"`backend` tensorrt-rtx: .*fast\.plan is of tensorrt\."):
        planned().engine("fast", backend="tensorrt-rtx")


def test_a_plan_of_another_variant(planned: Callable[..., Bundle], write_plan):
    """As by a copy of files: it would answer, at another cost than it is taken for."""
    bundle = planned()
    save_plan(bundle.plan("fast"), *open_plan(write_plan(bundle, "r08")))
    says = r"fast\.plan is of another variant than the bundle's fast: it is r08 of degree 8, small"
    with pytest.raises(PlanError, match=says):
        bundle.engine("fast", backend="tensorrt")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"backend": "plan"}, "`backend` 'plan': it is onnx, openvino, tensorrt, tensorrt-rtx"),
        ({"threads": 0}, "`threads` 0: there is one at least"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(bundle: Bundle, options: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        bundle.engine("r08", **options)
