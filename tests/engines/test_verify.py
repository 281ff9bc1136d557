"""Engines held against the PyTorch model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.manifest import weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.verify import Comparison, compare, sample_images, verify
from tocom_export.errors import CheckFailed, DegreeError
from tocom_export.io.tensors import read_header
from tocom_export.training.torch_engine import make_oracle
from tocom_export.variant import Variant

QKV = "blocks.1.attn.qkv.weight"
NAMES = ["r00", "r08", "r16"]


def verdicts(bundle: Bundle, oracle: Callable | None, **options: Any) -> dict[str, Comparison]:
    images = sample_images(bundle.spec, 20)
    return {c.variant: c for c in verify(bundle, images, oracle, **options)}


def failed(comparisons: dict[str, Comparison]) -> list[str]:
    return [name for name, c in comparisons.items() if not c.passed]


def overwrite(file: Path, name: str, value: float) -> None:
    """The first element of a tensor in a safetensors file."""
    offset = read_header(file)[0][name].offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = np.float32(value).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize("with_bank", [True, False])
def test_a_good_bundle_passes(bundle: Bundle, blueprint: Blueprint, with_bank: bool):
    found = verdicts(bundle, make_oracle(bundle, blueprint.weights.bank if with_bank else None))
    assert list(found) == NAMES
    for comparison in found.values():
        assert comparison.engine == f"{comparison.variant}.onnx"
        assert comparison.passed
        assert comparison.finite
        assert comparison.agreement == 100
        assert comparison.beyond == 0
        assert comparison.images == 20
        assert comparison.max_difference < comparison.tolerance < 1e-2


def test_weights_baked_with_another_scale(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, revise: Callable
):
    other = write_bundle(revise(blueprint, scale=0.15), tmp_path / "other")
    shutil.copy(other.path / weights_name("r08"), fresh.path / weights_name("r08"))
    found = verdicts(fresh, make_oracle(fresh, blueprint.weights.bank))
    assert failed(found) == ["r08"]
    assert found["r08"].finite
    assert found["r08"].max_difference > found["r08"].tolerance
    assert found["r08"].beyond > 1


def test_shared_weights_that_changed(fresh: Bundle, blueprint: Blueprint, tmp_path: Path):
    good = Bundle.open(Path(shutil.copytree(fresh.path, tmp_path / "good")))
    overwrite(fresh.path / "weights.safetensors", "pos_embed", 1e3)
    assert failed(verdicts(fresh, make_oracle(good, blueprint.weights.bank))) == NAMES


def test_a_graph_of_another_degree(fresh: Bundle, blueprint: Blueprint):
    shutil.copy(fresh.graph(16), fresh.graph(8))
    assert failed(verdicts(fresh, make_oracle(fresh, blueprint.weights.bank))) == ["r08"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("judged", [True, False])
def test_logits_that_are_no_numbers(
    fresh: Bundle, blueprint: Blueprint, value: float, judged: bool
):
    overwrite(fresh.path / weights_name("r08"), QKV, value)
    found = verdicts(fresh, make_oracle(fresh, blueprint.weights.bank) if judged else None)
    assert failed(found) == ["r08"]
    assert not found["r08"].finite


def test_without_a_model_only_numbers_are_checked(bundle: Bundle):
    for comparison in verdicts(bundle, None).values():
        assert comparison.passed
        assert comparison.max_difference is comparison.tolerance is comparison.agreement is None


@pytest.mark.parametrize("atol, expected", [(0.0, NAMES), (1e-2, [])])
def test_the_tolerance_can_be_given(
    bundle: Bundle, blueprint: Blueprint, atol: float, expected: list[str]
):
    found = verdicts(bundle, make_oracle(bundle, blueprint.weights.bank), atol=atol)
    assert failed(found) == expected
    assert {c.tolerance for c in found.values()} == {atol}


def test_every_image_counts(bundle: Bundle):
    """Also those of the last, smaller batch."""
    images = sample_images(bundle.spec, 19)
    seen = []

    def oracle(variant: Variant, batch: np.ndarray) -> np.ndarray:
        seen.append(len(batch))
        return np.full((len(batch), bundle.spec.classes), 1e6, np.float32)

    found = list(verify(bundle, images, oracle, atol=1.0))
    assert [(c.images, c.beyond) for c in found] == [(19, 19)] * 3
    assert sum(seen) == 3 * 19


@pytest.mark.parametrize(
    "images, beyond, finite, passed",
    [(20, 0, True, True), (20, 1, True, True), (20, 2, True, False), (19, 1, True, False),
     (100, 5, True, True), (100, 6, True, False), (20, 0, False, False)],
)  # fmt: skip
def test_one_image_in_twenty_may_differ(images: int, beyond: int, finite: bool, passed: bool):
    values = ("r08.onnx", "r08", images, 1.0, 0.1, beyond, 100.0, finite)
    comparison = Comparison(*values, strict=False)
    assert comparison.passed is passed
    strict = Comparison(*values, strict=True)
    assert strict.passed is (finite and beyond == 0)
    assert json.loads(json.dumps(comparison.to_json()))["passed"] is passed


@pytest.mark.parametrize("beyond, passed", [(10, True), (11, False)])
def test_rounding_to_half_the_digits_may_change_every_other_image(beyond: int, passed: bool):
    values = ("r08.onnx", "r08", 20, 1.0, 0.1, beyond, 100.0, True)
    assert Comparison(*values, strict=False, precision="bf16").passed is passed
    assert not Comparison(*values, strict=True, precision="bf16").passed


def test_what_failed_says_how_far(bundle: Bundle):
    values = ("r08.plan", "r08", 20)
    Comparison(*values, 0.01, 0.1, 0, 100.0, True, False).require("the model", "so what")
    with pytest.raises(CheckFailed) as caught:
        Comparison(*values, 0.25, 0.1, 3, 90.0, True, False).require("the model", "build it again.")
    assert str(caught.value) == (
        "r08.plan differs from the model on 3 of 20 images (max |Δ| 2.5e-01, 1.0e-01 allowed); "
        "build it again."
    )
    with pytest.raises(CheckFailed, match=r"r08\.plan gives logits that are NaN or Inf; again\."):
        Comparison(*values, None, None, 0, None, False, False).require("the model", "again.")


def test_numbers_that_json_has_none_for():
    data = Comparison("r08.onnx", "r08", 1, np.nan, np.inf, 1, 0.0, False, strict=False).to_json()
    assert data["max_difference"] is data["tolerance"] is None
    json.dumps(data, allow_nan=False)


def test_some_of_the_variants(bundle: Bundle):
    assert list(verdicts(bundle, None, variants=["r16", "8"])) == ["r16", "r08"]
    with pytest.raises(DegreeError, match="no variant fast"):
        verdicts(bundle, None, variants=["fast"])


def test_a_variant_of_another_degree_in_each_layer(
    mixed: Bundle, mixed_blueprint: Blueprint, tmp_path: Path, revise: Callable
):
    """Baked as the bank's side paths say, each layer for the tokens that reach it."""
    bank = mixed_blueprint.weights.bank
    for oracle in (make_oracle(mixed, bank), make_oracle(mixed)):
        found = verdicts(mixed, oracle)
        assert list(found) == [*NAMES, "fast"]
        assert failed(found) == []
        assert found["fast"].beyond == 0
    # The check would see weights that are baked for one degree, or for none.
    for other in ("r00", "r08", "r16"):
        donor = weights_name(other)
        if donor in mixed.files:
            shutil.copy(mixed.path / donor, mixed.path / weights_name("fast"))
            assert failed(verdicts(mixed, make_oracle(mixed, bank))) == ["fast"]
    plain = write_bundle(revise(mixed_blueprint, bank=None), tmp_path / "plain")
    oracle = make_oracle(plain, bank)
    assert failed(verdicts(plain, lambda v, x: oracle(mixed.variant(v.name), x))) == [
        name for name, variant in mixed.variants.items() if variant.baked
    ]


def test_plans_are_run_in_the_batches_that_they_take(nvidia, fresh: Bundle, write_plan: Callable):
    """The pretended library's logits are none of the model's."""
    images = sample_images(fresh.spec, 7)
    plans = [write_plan(fresh, name, batch=(1, 2, 3)) for name in ("r08", "r16")]
    assert all(plan.exists() for plan in plans)
    having = dataclasses.replace(fresh, plans=("r08", "r16"))
    nvidia.trt.asked.clear()
    found = list(verify(having, images, None, backend="tensorrt", variants=["r08", "r16"]))
    assert [(c.engine, c.images, c.passed) for c in found] == [
        ("r08.plan", 7, True), ("r16.plan", 7, True),
    ]  # fmt: skip
    shapes = [shape[0] for kind, shape, *_ in nvidia.trt.asked if kind == "shape"]
    assert shapes == [3, 1, 3, 1]
    oracle = make_oracle(fresh)
    found = list(verify(having, images, oracle, backend="tensorrt", variants=["r08", "r16"]))
    assert [c.passed for c in found] == [False, False]


def test_one_engine(bundle: Bundle):
    images = sample_images(bundle.spec, 5)
    run = bundle.engine("r08").run
    found = compare(run, images, run, "mine", "r08", "fp32", batch=2)
    assert (found.engine, found.variant, found.images) == ("mine", "r08", 5)
    assert (found.max_difference, found.passed) == (0, True)


@pytest.mark.parametrize("changes", [{}, {"image_size": [24, 40], "channels": 1}], ids=str)
def test_sample_images(make_spec: Callable, changes: dict):
    spec = make_spec(**changes)
    images = sample_images(spec, 4)
    assert images.shape == (4, spec.channels, *spec.image_size)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, sample_images(spec, 4))
    assert (images != sample_images(spec, 4, seed=1)).any()
    assert np.abs(np.diff(images)).mean() < 0.5 * images.std()  # smooth, unlike noise
