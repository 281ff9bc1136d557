from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle, weights_name
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.engines.verify import Comparison, compare, sample_images
from tocom_export.io.tensors import read_header
from tocom_export.training.torch_engine import Reference

QKV = "blocks.1.attn.qkv.weight"


def verdicts(bundle: Bundle, reference: Callable | None, **options: float) -> dict[int, Comparison]:
    images = sample_images(bundle.spec, 20)
    return {c.target: c for c in compare(bundle, images, reference, **options)}


def failed(comparisons: dict[int, Comparison]) -> list[int]:
    return [target for target, c in comparisons.items() if not c.passed]


def overwrite(file: Path, name: str, value: float) -> None:
    """The first element of a tensor in a safetensors file."""
    offset = read_header(file)[0][name].offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = np.float32(value).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize("with_bank", [True, False])
def test_a_good_bundle_passes(bundle: Bundle, plan: BuildPlan, with_bank: bool):
    found = verdicts(bundle, Reference(bundle, plan.bank if with_bank else None))
    assert list(found) == [0, 8, 16]
    for comparison in found.values():
        assert comparison.passed
        assert comparison.finite
        assert comparison.agreement == 100
        assert comparison.beyond == 0
        assert comparison.images == 20
        assert comparison.max_difference < comparison.tolerance < 1e-2


def test_weights_baked_with_another_scale(fresh: Bundle, plan: BuildPlan, tmp_path: Path):
    other = write_bundle(dataclasses.replace(plan, scale=0.15), tmp_path / "other")
    shutil.copy(other.path / weights_name(8), fresh.path / weights_name(8))
    found = verdicts(fresh, Reference(fresh, plan.bank))
    assert failed(found) == [8]
    assert found[8].finite
    assert found[8].max_difference > found[8].tolerance
    assert found[8].beyond > 1


def test_shared_weights_that_changed(fresh: Bundle, plan: BuildPlan, tmp_path: Path):
    good = Bundle.open(Path(shutil.copytree(fresh.path, tmp_path / "good")))
    overwrite(fresh.path / "weights.safetensors", "pos_embed", 1e3)
    assert failed(verdicts(fresh, Reference(good, plan.bank))) == [0, 8, 16]


def test_a_graph_of_another_degree(fresh: Bundle, plan: BuildPlan):
    shutil.copy(fresh.graph(16), fresh.graph(8))
    assert failed(verdicts(fresh, Reference(fresh, plan.bank))) == [8]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("judged", [True, False])
def test_logits_that_are_no_numbers(fresh: Bundle, plan: BuildPlan, value: float, judged: bool):
    overwrite(fresh.path / weights_name(8), QKV, value)
    found = verdicts(fresh, Reference(fresh, plan.bank) if judged else None)
    assert failed(found) == [8]
    assert not found[8].finite


def test_without_a_model_only_numbers_are_checked(bundle: Bundle):
    for comparison in verdicts(bundle, None).values():
        assert comparison.passed
        assert comparison.max_difference is comparison.tolerance is comparison.agreement is None


@pytest.mark.parametrize("atol, expected", [(0.0, [0, 8, 16]), (1e-2, [])])
def test_the_tolerance_can_be_given(
    bundle: Bundle, plan: BuildPlan, atol: float, expected: list[int]
):
    found = verdicts(bundle, Reference(bundle, plan.bank), atol=atol)
    assert failed(found) == expected
    assert {c.tolerance for c in found.values()} == {atol}


def test_every_image_counts(bundle: Bundle):
    """Also those of the last, smaller batch."""
    images = sample_images(bundle.spec, 19)
    seen = []

    def reference(target: int, batch: np.ndarray) -> np.ndarray:
        seen.append(len(batch))
        return np.full((len(batch), bundle.spec.classes), 1e6, np.float32)

    found = list(compare(bundle, images, reference, atol=1.0))
    assert [(c.images, c.beyond) for c in found] == [(19, 19)] * 3
    assert sum(seen) == 3 * 19


@pytest.mark.parametrize(
    "images, beyond, finite, passed",
    [(20, 0, True, True), (20, 1, True, True), (20, 2, True, False), (19, 1, True, False),
     (100, 5, True, True), (100, 6, True, False), (20, 0, False, False)],
)  # fmt: skip
def test_one_image_in_twenty_may_differ(images: int, beyond: int, finite: bool, passed: bool):
    comparison = Comparison(8, images, 1.0, 0.1, beyond, 100.0, finite, strict=False)
    assert comparison.passed is passed
    strict = Comparison(8, images, 1.0, 0.1, beyond, 100.0, finite, strict=True)
    assert strict.passed is (finite and beyond == 0)
    assert json.loads(json.dumps(comparison.to_json()))["passed"] is passed


@pytest.mark.parametrize("changes", [{}, {"image_size": [24, 40], "channels": 1}], ids=str)
def test_sample_images(make_spec: Callable, changes: dict):
    spec = make_spec(**changes)
    images = sample_images(spec, 4)
    assert images.shape == (4, spec.channels, *spec.image_size)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, sample_images(spec, 4))
    assert (images != sample_images(spec, 4, seed=1)).any()
    assert np.abs(np.diff(images)).mean() < 0.5 * images.std()  # smooth, unlike noise
