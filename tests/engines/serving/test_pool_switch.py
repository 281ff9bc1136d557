"""Switching, opening and closing variants while requests run."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.engine import OnnxEngine

NAMES = ("r00", "r08", "r16")
Revise = Callable[..., Blueprint]


def test_requests_end_on_the_weights_they_began_with(fresh: Bundle, blueprint: Blueprint, images):
    """One that is held up while the pool is refitted and switched."""
    with EnginePool(fresh.path, threads=1) as pool:
        wanted = pool.run(images)
        serving = pool.serving
        pool.refit(bank=blueprint.weights.bank, source=16)
        pool.switch(8)
        np.testing.assert_array_equal(serving.run(images), wanted)
        gone = weakref.ref(serving.engine)
        del serving
        gc.collect()
        assert gone() is None  # the old weights go with the last request


def test_a_switch_does_not_wait_for_a_refit(
    fresh: Bundle, blueprint: Blueprint, images, monkeypatch
):
    began, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any):
        began.set()
        assert go_on.wait(10)
        return OnnxEngine(*args, **options)

    with EnginePool(fresh.path, threads=1) as pool, ThreadPoolExecutor() as threads:
        monkeypatch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", slow)
        refit = threads.submit(pool.refit, bank=blueprint.weights.bank, source=8)
        assert began.wait(10)
        for name in ("r08", "r16"):
            pool.switch(name)
            assert pool.serving.variant.name == name
            assert pool.serving.variant.source == 0
            pool.run(images)
        go_on.set()
        refit.result(10)
        assert (pool.serving.variant.name, pool.serving.variant.source) == ("r16", 8)


def test_eight_threads_get_whole_answers(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, images, revise: Revise, answers
):
    """Each answer is that of one degree with one set of weights, whatever happens meanwhile."""
    scales = (0.1, 1.0)
    wanted = {
        (name, scale): logits
        for scale in scales
        for name, logits in answers(
            write_bundle(revise(blueprint, scale=scale), tmp_path / str(scale)), images
        ).items()
    }
    # As many refits as it takes, however busy the machine is; those who ask stop with the last.
    refits, done = 8, threading.Event()
    with EnginePool(fresh.path, threads=1) as pool, ThreadPoolExecutor(9) as threads:

        def ask() -> int:
            count = 0
            while not done.is_set() or count < 4:
                serving = pool.serving
                logits = serving.run(images)
                variant = serving.variant
                np.testing.assert_array_equal(logits, wanted[variant.name, variant.scale])
                count += 1
            return count

        asking = [threads.submit(ask) for _ in range(8)]
        rng = np.random.default_rng(0)
        try:
            for refit in range(refits):
                for name in rng.choice(NAMES, 5):
                    pool.switch(str(name))
                    time.sleep(0.002)
                pool.refit(bank=blueprint.weights.bank, scale=scales[refit % 2])
        finally:
            done.set()
        assert all(thread.result() > 3 for thread in asking)


def test_variants_are_opened_when_asked_for_and_closed_when_there_is_no_room(
    fresh: Bundle, blueprint: Blueprint, images, answers, of_pool, same
):
    wanted = answers(fresh, images)
    shared = fresh.files["weights.safetensors"].bytes
    own = fresh.files["r08.safetensors"].bytes

    def held(pool: EnginePool) -> set[int]:
        return set(pool._servings)

    with EnginePool(fresh.path, threads=1, memory=shared + 1.5 * own) as pool:
        assert held(pool) == {"r00"}
        pool.switch(8)
        assert held(pool) == {"r00", "r08"}
        pool.switch(16)
        assert held(pool) == {"r16"}  # the one that serves, and no room for another of its kind
        pool.switch(0)
        assert held(pool) == {"r00", "r16"}
        assert same(of_pool(pool, images), wanted)
        pool.refit(bank=blueprint.weights.bank, source=8)
        assert pool.switch(8).variant.source == 8
        assert pool.switch(0).variant.source == 8  # opened after the refit, with its weights
    with EnginePool(fresh.path, memory=0) as pool:
        pool.switch(8)
        assert held(pool) == {"r08"}


def test_a_pool_of_one_variant_that_is_opened_when_it_is_asked_for(
    mixed: Bundle, make_images, answers
):
    images = make_images(mixed.spec, 3)
    wanted = answers(mixed, images)
    with EnginePool(mixed.path, threads=1, memory=0) as pool:
        np.testing.assert_array_equal(pool.run(images, variant="fast"), wanted["fast"])
        assert pool.serving.variant.name == "r00"
        assert set(pool._servings) == {"r00", "fast"}
        np.testing.assert_array_equal(pool.run(images, variant="r16"), wanted["r16"])
        assert set(pool._servings) == {"r00", "r16"}
        pool.switch("fast")
        assert set(pool._servings) == {"fast"}
    with EnginePool(mixed.path, threads=1, variants=["fast"]) as pool:
        assert pool.variants == ("fast",)
        np.testing.assert_array_equal(pool.run(images), wanted["fast"])
