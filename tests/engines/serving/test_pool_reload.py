"""A bundle whose files change while a pool serves it."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.errors import (
    BundleError,
    DegreeError,
)

NAMES = ("r00", "r08", "r16")
Revise = Callable[..., Blueprint]


def test_the_bundle_may_go_away_or_change(
    fresh: Bundle,
    blueprint: Blueprint,
    tmp_path: Path,
    images,
    revise: Revise,
    answers,
    of_pool,
    same,
):
    wanted = answers(fresh, images)
    with (
        EnginePool(fresh.path, threads=1) as pool,
        EnginePool(fresh.path, threads=1, memory=float("inf")) as lazy,
    ):
        for file in fresh.path.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
        assert same(of_pool(pool, images), wanted)
        with pytest.raises(BundleError, match=r"r08.safetensors is not what .*manifest"):
            lazy.switch(8)
        assert lazy.serving.variant.name == "r00"
        np.testing.assert_array_equal(lazy.run(images), wanted["r00"])
        with pytest.raises(BundleError):
            pool.reload()
        shutil.rmtree(fresh.path)
        assert same(of_pool(pool, images), wanted)
        pool.switch(16)
        with pytest.raises(BundleError, match="not a bundle"):
            pool.reload()
        np.testing.assert_array_equal(pool.run(images), wanted["r16"])
        new = write_bundle(revise(blueprint, source=8, scale=1.0), fresh.path)
        pool.reload()
        assert pool.serving.variant.name == "r16"
        assert same(of_pool(pool, images), answers(new, images))


def test_changed_weights_are_not_opened(fresh: Bundle):
    file = fresh.path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        EnginePool(fresh.path)


def test_a_bundle_built_anew_in_its_place_is_not_mixed_in(
    blueprint: Blueprint,
    tmp_path: Path,
    make_images,
    make_checkpoint,
    revise: Revise,
    answers,
    of_pool,
):
    """Neither its weights, for a precision that starts from the file's, nor its graphs."""
    images = make_images(blueprint.weights.spec, 2)
    half = revise(blueprint, precision="fp16")
    bundle = write_bundle(half, tmp_path / "bundle")
    wanted = answers(write_bundle(half, tmp_path / "same"), images)
    (tmp_path / "evit").mkdir()
    other = Checkpoint.open(make_checkpoint(tmp_path / "evit", blueprint.weights.spec, 7))
    pruned = revise(half, checkpoint=other, method=Method("evit"), bank=None, precision="fp32")
    with (
        EnginePool(bundle.path, threads=1) as pool,
        EnginePool(bundle.path, threads=1, memory=float("inf")) as lazy,
    ):
        write_bundle(pruned, bundle.path, force=True)
        with pytest.raises(BundleError, match=r"r08.safetensors"):
            lazy.switch(8)
        pool.refit(bank=blueprint.weights.bank, source=16)
        pool.refit(bank=blueprint.weights.bank, source=0)
        found = of_pool(pool, images)
        np.testing.assert_array_equal(found["r00"], wanted["r00"])
        for name in ("r08", "r16"):  # from weights that were rounded once already
            np.testing.assert_allclose(found[name], wanted[name], atol=0.1)


def test_a_bundle_of_other_degrees(fresh: Bundle, make_blueprint, tmp_path: Path):
    def rebuild(name: str, *changes: Any, **options: Any) -> None:
        (tmp_path / name).mkdir()
        blueprint = make_blueprint(tmp_path / name, *changes, **options)
        write_bundle(blueprint, fresh.path, force=True)

    with EnginePool(fresh.path, threads=1) as pool:
        pool.switch(8)
        rebuild("other", targets=(12, 0))
        with pytest.raises(
            BundleError, match=r"no variant r08 now, which serves; .* \(r00, r12\) first"
        ):
            pool.reload()
        assert pool.variants == NAMES
        pool.switch(0)
        pool.reload()
        assert pool.variants == ("r00", "r12")
        assert pool.switch(12).variant.name == "r12"
        with pytest.raises(DegreeError):
            pool.switch(8)
        rebuild("shallow", dataclasses.replace(fresh.spec, depth=3), bank=None)
        with pytest.raises(BundleError, match="another model now"):
            pool.reload()


def test_a_variant_that_goes_while_it_is_waited_for(
    fresh: Bundle, make_blueprint, tmp_path: Path, monkeypatch
):
    """What is asked for during a reload is opened from what the reload brings."""
    began, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any):
        began.set()
        assert go_on.wait(10)
        return OnnxEngine(*args, **options)

    pool = EnginePool(fresh.path, threads=1, memory=float("inf"))
    with pool, ThreadPoolExecutor() as threads:
        write_bundle(make_blueprint(tmp_path, targets=(0, 12)), fresh.path, force=True)
        monkeypatch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", slow)
        reload = threads.submit(pool.reload)
        assert began.wait(10)
        switch = threads.submit(pool.switch, 8)
        time.sleep(0.2)
        go_on.set()
        reload.result(10)
        with pytest.raises(DegreeError, match="no variant 8; it has r00, r12"):
            switch.result(10)
