"""A pool of plans, by a library that stands in for TensorRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.errors import (
    BundleError,
    PlanError,
)

NAMES = ("r00", "r08", "r16")
WritePlan = Callable[..., Path]


def test_plans(
    nvidia,
    fresh: Bundle,
    blueprint: Blueprint,
    images,
    tmp_path: Path,
    write_plan: WritePlan,
    of_pool,
    origin,
    same,
    other_checkpoint,
):
    for name in NAMES:
        write_plan(fresh, name)
    dataclasses.replace(fresh, plans=NAMES).save_manifest()
    file = other_checkpoint(tmp_path, blueprint)
    with EnginePool(fresh.path, backend="tensorrt") as pool:
        first = of_pool(pool, images)
        assert origin(pool.serving) == (0, 0.1)
        old = pool.serving
        pool.refit(bank=blueprint.weights.bank, source=8, scale=1.0)
        assert origin(pool.serving) == (8, 1.0)
        second = of_pool(pool, images)
        assert not same(second, first)
        np.testing.assert_array_equal(old.run(images), first["r16"])
        with pytest.raises(PlanError, match="--refit all"):
            pool.refit(checkpoint=file, bank=blueprint.weights.bank)
        assert same(of_pool(pool, images), second)
        pool.refit(bank=blueprint.weights.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), first)


def test_plans_of_a_degree_for_each_layer(
    nvidia, mixed: Bundle, mixed_blueprint: Blueprint, make_images, write_plan: WritePlan
):
    images, bank = make_images(mixed.spec, 3), mixed_blueprint.weights.bank
    for name in mixed.variants:
        write_plan(mixed, name, strip=name == "fast")
    dataclasses.replace(mixed, plans=tuple(mixed.variants)).save_manifest()
    with EnginePool(mixed.path, backend="tensorrt") as pool:
        first = pool.run(images, variant="fast")
        assert pool.serving.variant.name == "r00"
        assert pool.switch("fast").variant == mixed.variant("fast")
        pool.refit(bank=bank, source=9)
        assert pool.serving.variant == dataclasses.replace(mixed.variant("fast"), source=9)
        assert not np.array_equal(pool.run(images), first)
        pool.refit(bank=bank, source=mixed.variant("fast").source)
        np.testing.assert_array_equal(pool.run(images), first)


def test_a_stripped_plan_takes_the_bundles_weights(
    nvidia, fresh: Bundle, images, write_plan: WritePlan
):
    write_plan(fresh, strip=True)
    dataclasses.replace(fresh, plans=("r08",)).save_manifest()
    with EnginePool(fresh.path, backend="tensorrt", variants=[8]) as pool:
        assert np.isfinite(pool.run(images)).all()


def test_a_plan_that_takes_no_other_weights(
    nvidia, fresh: Bundle, blueprint: Blueprint, images, write_plan: WritePlan
):
    write_plan(fresh, refit="identical")
    dataclasses.replace(fresh, plans=("r08",)).save_manifest()
    with EnginePool(fresh.path, backend="tensorrt", variants=[8]) as pool:
        first = pool.run(images)
        weights = sum(file.stat().st_size for file in fresh.weight_files("r08"))
        assert pool.serving.bytes == weights + (fresh.path / "r08.plan").stat().st_size
        with pytest.raises(PlanError, match=r"built with alone .*--refit qkv or all"):
            pool.refit(bank=blueprint.weights.bank, source=8)
        np.testing.assert_array_equal(pool.run(images), first)


def test_a_plan_that_was_replaced_is_not_opened(
    nvidia, fresh: Bundle, blueprint: Blueprint, write_plan: WritePlan
):
    for name in NAMES:
        write_plan(fresh, name)
    dataclasses.replace(fresh, plans=NAMES).save_manifest()
    with EnginePool(fresh.path, backend="tensorrt", memory=float("inf")) as pool:
        save_plan(fresh.path / "r08.plan", *open_plan(fresh.path / "r16.plan"))
        with pytest.raises(BundleError, match=r"r08.plan was changed .*reload"):
            pool.switch(8)
        assert pool.serving.variant.name == "r00"
        pool.switch(16)
