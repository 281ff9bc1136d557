"""What the variants of a pool answer, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.errors import (
    DegreeError,
    ImageError,
    InputError,
    PoolError,
)

NAMES = ("r00", "r08", "r16")
Revise = Callable[..., Blueprint]


def test_it_says_what_each_engine_says(fresh: Bundle, images, answers, of_pool, origin, same):
    with EnginePool(fresh.path, threads=1) as pool:
        assert pool.variants == NAMES
        assert pool.serving.variant.name == "r00"
        assert same(of_pool(pool, images), answers(fresh, images))
        assert pool.serving.variant.name == "r16"
        assert origin(pool.serving) == (0, 0.1)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_it_holds_weights_of_any_precision(
    blueprint: Blueprint,
    tmp_path: Path,
    make_images,
    precision,
    revise: Revise,
    answers,
    of_pool,
    same,
):
    images = make_images(blueprint.weights.spec, 2)
    typed = revise(blueprint, precision=precision)
    bundle = write_bundle(
        typed, tmp_path / "typed", calibrate=lambda b, v: measure_input_scales(b, v.name, images)
    )
    with EnginePool(bundle.path, threads=1) as pool:
        assert same(of_pool(pool, images), answers(bundle, images))


def test_some_of_the_variants(fresh: Bundle, images):
    with EnginePool(str(fresh.path), variants=[16, "8"]) as pool:
        assert pool.variants == ("r08", "r16")
        assert pool.serving.variant.name == "r08"
        with pytest.raises(DegreeError, match="the pool has no variant 0; it has r08, r16"):
            pool.switch(0)
        assert pool.serving.variant.name == "r08"
    with pytest.raises(DegreeError, match="no variant 5"):
        EnginePool(fresh.path, variants=[5])


def test_a_variant_of_its_own_name(mixed: Bundle, make_images, answers):
    """A degree for each layer; asked for by name, run without a switch, then served."""
    images = make_images(mixed.spec, 3)
    wanted = answers(mixed, images)
    with EnginePool(mixed.path, threads=1) as pool:
        assert pool.variants == ("r00", "r08", "fast", "r16")  # by falling cost
        np.testing.assert_array_equal(pool.run(images, variant="fast"), wanted["fast"])
        np.testing.assert_array_equal(pool.run(images, variant=16), wanted["r16"])
        assert pool.serving.variant.name == "r00"
        np.testing.assert_array_equal(pool.run(images), wanted["r00"])
        assert pool.switch("fast") is pool.serving
        assert pool.serving.variant == pool.serving.engine.variant == mixed.variant("fast")
        np.testing.assert_array_equal(pool.run(images), wanted["fast"])
        for call in (lambda: pool.switch("quick"), lambda: pool.run(images, "quick")):
            with pytest.raises(
                DegreeError, match="the pool has no variant quick; it has r00, r08, fast, r16"
            ):
                call()
        assert pool.serving.variant.name == "fast"
    with pytest.raises(PoolError, match="closed"):
        pool.run(images, variant="fast")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_hold_no_numbers(fresh: Bundle, images, value: float):
    broken = images.copy()
    broken[1, 0, 3, 4] = value
    with EnginePool(fresh.path) as pool:
        for name in NAMES:
            pool.switch(name)
            with pytest.raises(ImageError, match="image 1 of the batch has pixels"):
                pool.run(broken)


def test_images_of_another_form(fresh: Bundle, images):
    with EnginePool(fresh.path) as pool:
        for wrong in (images[:0], images[:, :2], images[0], images.astype(np.float64)):
            with pytest.raises(ImageError):
                pool.run(wrong)


def test_images_beyond_all_measure(fresh: Bundle, images):
    with EnginePool(fresh.path) as pool, pytest.raises(ImageError, match="normalised"):
        pool.run(np.full_like(images, 3e38))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"memory": -1}, "`memory` -1"),
        ({"memory": float("nan")}, "`memory` nan"),
        ({"threads": 0}, "`threads` 0"),
        ({"backend": "x"}, "`backend` 'x'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(fresh: Bundle, options: Any, says: str):
    with pytest.raises(InputError, match=says):
        EnginePool(fresh.path, **options)


def test_closed(fresh: Bundle, blueprint: Blueprint, images):
    pool = EnginePool(fresh.path)
    serving = pool.serving
    with pool:
        pass
    for call in (lambda: pool.run(images), lambda: pool.switch(8), pool.reload, pool.refit):
        with pytest.raises(PoolError, match="closed"):
            call()
    serving.run(images)  # one that was under way
    pool.close()
