"""More variants for a bundle that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.extending import add_variants
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import write_bundle
from tocom_export.errors import BundleError
from tocom_export.variant import Variant

Make = Callable[..., Any]
FAST = (20, 0, 7, 3)


def make_variant(weights: ModelWeights, degrees: Any = FAST, **more: Any) -> Variant:
    return Variant.of(weights.spec, degrees, "fast", **more)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_is_as_if_built_with_it(
    precision: Any, tmp_path: Path, make_blueprint: Make, make_images: Make
):
    blueprint = make_blueprint(tmp_path, precision=precision, targets=(0, 8))
    before = write_bundle(blueprint, tmp_path / "bundle")
    fast = make_variant(blueprint.weights)
    found = add_variants(before.path, blueprint.weights, [fast])
    whole = {**blueprint.variants, "fast": fast}
    wanted = write_bundle(dataclasses.replace(blueprint, variants=whole), tmp_path / "wanted")
    opened = Bundle.open(before.path, hashes=True)
    assert found == opened
    assert {n: r.sha256 for n, r in opened.files.items()} == {
        n: r.sha256 for n, r in wanted.files.items()
    }
    images = make_images(blueprint.weights.spec)
    np.testing.assert_array_equal(
        opened.engine("fast").run(images), wanted.engine("fast").run(images)
    )


def test_int8_takes_the_ranges_of_the_nearest(
    tmp_path: Path, make_blueprint: Make, make_images: Make
):
    from tocom_export.engines.onnx.calibration import measure_input_scales

    blueprint = make_blueprint(tmp_path, precision="int8", targets=(0, 8))
    images = make_images(blueprint.weights.spec, 4)
    before = write_bundle(
        blueprint, tmp_path / "bundle",
        calibrate=lambda wide, v: measure_input_scales(wide, v.name, images),
    )  # fmt: skip
    found = add_variants(before.path, blueprint.weights, [make_variant(blueprint.weights)])
    logits = found.engine("fast").run(images)
    assert np.isfinite(logits).all()
    near = found.engine("r08").run(images)
    assert np.corrcoef(logits.ravel(), near.ravel())[0, 1] > 0.5


def test_one_of_its_name_is_replaced(tmp_path: Path, make_blueprint: Make):
    blueprint = make_blueprint(tmp_path, targets=(0, 8), schedules={"fast": FAST})
    before = write_bundle(blueprint, tmp_path / "bundle")
    dataclasses.replace(before, accuracy={"fast": 1.0, "r08": 2.0}).save_manifest()
    found = add_variants(
        before.path, blueprint.weights, [make_variant(blueprint.weights, (9, 9, 1, 0))]
    )
    assert found.variant("fast").degrees == (9, 9, 1, 0)
    assert found.accuracy == {"r08": 2.0}
    for name in ("r00.onnx", "weights.safetensors", "r08.safetensors"):
        assert found.files[name] == before.files[name]
    Bundle.open(found.path, hashes=True)


def test_other_weights_are_refused(tmp_path: Path, make_blueprint: Make, make_checkpoint: Make):
    blueprint = make_blueprint(tmp_path)
    before = write_bundle(blueprint, tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    from tocom_export.compression.checkpoint import Checkpoint

    other = Checkpoint.open(make_checkpoint(tmp_path / "other", blueprint.weights.spec, seed=5))
    weights = dataclasses.replace(blueprint.weights, checkpoint=other)
    with pytest.raises(BundleError, match="made of other weights"):
        add_variants(before.path, weights, [make_variant(weights)])
    assert Bundle.open(before.path, hashes=True) == before
