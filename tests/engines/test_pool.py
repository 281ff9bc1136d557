"""Switching and refitting while requests run."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.refit import NewWeights, refit_graph
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import save_plan
from tocom_export.errors import (
    BankError,
    BundleError,
    CheckFailed,
    CheckpointError,
    DegreeError,
    ImageError,
    InputError,
    PlanError,
    PoolError,
)

TARGETS = (0, 8, 16)


def answers(bundle: Bundle, images: Any) -> dict[int, Any]:
    return {target: OnnxEngine(bundle, target, threads=1).run(images) for target in TARGETS}


def of_pool(pool: EnginePool, images: Any) -> dict[int, Any]:
    found = {}
    for target in TARGETS:
        pool.switch(target)
        found[target] = pool.run(images)
    return found


def same(found: dict[int, Any], wanted: dict[int, Any]) -> bool:
    return all(np.array_equal(found[target], wanted[target]) for target in wanted)


@pytest.fixture
def images(fresh: Bundle, make_images):
    return make_images(fresh.spec, 3)


def other_checkpoint(folder: Path, plan: BuildPlan, make_checkpoint, seed: int = 5) -> Path:
    (folder / "other").mkdir()
    return make_checkpoint(folder / "other", plan.spec, seed)


def test_it_says_what_each_engine_says(fresh: Bundle, images):
    with EnginePool(fresh.path, threads=1) as pool:
        assert pool.targets == TARGETS
        assert pool.serving.target == 0
        assert same(of_pool(pool, images), answers(fresh, images))
        assert pool.serving.target == 16
        assert (pool.serving.source, pool.serving.scale) == (0, 0.1)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_it_holds_weights_of_any_precision(plan: BuildPlan, tmp_path: Path, make_images, precision):
    from tocom_export.engines.onnx.calibration import input_scales

    images = make_images(plan.spec, 2)
    typed = dataclasses.replace(plan, precision=precision)
    bundle = write_bundle(
        typed, tmp_path / "typed", calibrate=lambda b, t: input_scales(b, t, images)
    )
    with EnginePool(bundle.path, threads=1) as pool:
        assert same(of_pool(pool, images), answers(bundle, images))


def test_some_of_the_degrees(fresh: Bundle, images):
    with EnginePool(str(fresh.path), targets=[16, 8]) as pool:
        assert pool.targets == (8, 16)
        assert pool.serving.target == 8
        with pytest.raises(DegreeError, match="no degree 0; it has 8, 16"):
            pool.switch(0)
        assert pool.serving.target == 8
    with pytest.raises(DegreeError, match="no target 5"):
        EnginePool(fresh.path, targets=[5])


def test_a_refit_is_a_new_bundle(fresh: Bundle, plan: BuildPlan, tmp_path: Path, images):
    other = dataclasses.replace(plan, source=8, scale=0.5)
    built = write_bundle(other, tmp_path / "other")
    with EnginePool(fresh.path, threads=1) as pool:
        first = of_pool(pool, images)
        pool.refit(bank=plan.bank, source=8, scale=0.5)
        assert pool.serving.target == 16
        assert (pool.serving.source, pool.serving.scale) == (8, 0.5)
        assert same(of_pool(pool, images), answers(built, images))
        pool.refit(bank=plan.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), first)
    assert same(answers(Bundle.open(fresh.path, hashes=True), images), first)  # no file was written


def test_another_models_weights(
    fresh: Bundle, plan: BuildPlan, tmp_path: Path, images, make_checkpoint
):
    file = other_checkpoint(tmp_path, plan, make_checkpoint)
    built = write_bundle(
        dataclasses.replace(plan, checkpoint=Checkpoint.open(file), source=4), tmp_path / "built"
    )
    wanted = answers(built, images)
    with EnginePool(fresh.path, threads=1) as pool:
        pool.refit(checkpoint=file, bank=plan.bank, source=4)
        file.write_bytes(bytes(file.stat().st_size))  # it is no longer needed
        assert same(of_pool(pool, images), wanted)
        pool.refit(bank=plan.bank, source=8)  # from the weights that it has now
        assert not same(of_pool(pool, images), wanted)
        pool.refit(bank=plan.bank, source=4)
        assert same(of_pool(pool, images), wanted)


def test_fp16_is_compensated_from_exact_weights(
    plan: BuildPlan, tmp_path: Path, make_images, make_checkpoint
):
    images = make_images(plan.spec, 2)
    file = other_checkpoint(tmp_path, plan, make_checkpoint, 0)
    half = dataclasses.replace(plan, precision="fp16", checkpoint=Checkpoint.open(file))
    first = write_bundle(half, tmp_path / "first")
    second = write_bundle(dataclasses.replace(half, source=8, scale=1.0), tmp_path / "second")
    with EnginePool(first.path, threads=1) as pool:
        pool.refit(checkpoint=file, bank=plan.bank, source=8, scale=1.0)
        assert same(of_pool(pool, images), answers(second, images))
        pool.refit(bank=plan.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), answers(first, images))


def test_a_checkpoint_says_its_source(
    fresh: Bundle, plan: BuildPlan, tmp_path: Path, make_checkpoint
):
    file = other_checkpoint(tmp_path, plan, make_checkpoint)
    save_file(load_file(file), file, ModelInfo(source=12).to_metadata())
    with EnginePool(fresh.path) as pool:
        pool.refit(checkpoint=file, bank=plan.bank)
        assert pool.serving.source == 12
        with pytest.raises(CheckpointError, match="trained at degree 12"):
            pool.refit(checkpoint=file, bank=plan.bank, source=4)


def test_a_failed_refit_changes_nothing(
    fresh: Bundle, plan: BuildPlan, tmp_path: Path, images, make_spec, make_checkpoint, make_bank,
    monkeypatch,
):  # fmt: skip
    def nothing(spec, count: int):
        return np.full((count, spec.channels, *spec.image_size), np.nan, np.float32)

    wide = make_spec(width=96)
    (tmp_path / "wide").mkdir()
    wrong = make_checkpoint(tmp_path / "wide", wide)
    with EnginePool(fresh.path, threads=1) as pool:
        before, wanted = pool.serving, answers(fresh, images)
        with pytest.raises(BankError, match=r"is compensated: name the bank .*ToComBank.load"):
            pool.refit(source=8)
        with pytest.raises(BankError, match=r"refit\(bank"):
            pool.refit(source=8, bank=make_bank(wide))
        with pytest.raises(CheckpointError, match="shape"):
            pool.refit(checkpoint=wrong, bank=plan.bank)
        with pytest.raises(CheckpointError, match="no such file"):
            pool.refit(checkpoint="nowhere.safetensors", bank=plan.bank)
        with pytest.raises(BankError, match=r"scale 1e\+39 takes blocks.0.attn.qkv.weight beyond"):
            pool.refit(bank=plan.bank, source=8, scale=1e39)
        with monkeypatch.context() as patch:
            patch.setattr("tocom_export.engines.serving.pool.sample_images", nothing)
            with pytest.raises(CheckFailed, match="degree 0 gives no numbers"):
                pool.refit(bank=plan.bank, source=8)
        assert pool.serving is before
        assert same(of_pool(pool, images), wanted)


def test_every_step_of_a_refit_may_fail(fresh: Bundle, plan: BuildPlan, images, monkeypatch):
    """The engine of each degree in turn can't be opened."""
    wanted = answers(fresh, images)
    with EnginePool(fresh.path, threads=1) as pool:
        for failing in TARGETS:

            def opened(bundle: Bundle, target: int, failing: int = failing, **options: Any):
                if target == failing:
                    raise BundleError("out of memory")
                return OnnxEngine(bundle, target, **options)

            with monkeypatch.context() as patch:
                patch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", opened)
                with pytest.raises(BundleError, match="out of memory"):
                    pool.refit(bank=plan.bank, source=8)
            assert same(of_pool(pool, images), wanted)


def test_requests_end_on_the_weights_they_began_with(fresh: Bundle, plan: BuildPlan, images):
    """One that is held up while the pool is refitted and switched."""
    with EnginePool(fresh.path, threads=1) as pool:
        wanted = pool.run(images)
        serving = pool.serving
        pool.refit(bank=plan.bank, source=16)
        pool.switch(8)
        np.testing.assert_array_equal(serving.run(images), wanted)
        gone = weakref.ref(serving.engine)
        del serving
        gc.collect()
        assert gone() is None  # the old weights go with the last request


def test_a_switch_does_not_wait_for_a_refit(fresh: Bundle, plan: BuildPlan, images, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any):
        began.set()
        assert go_on.wait(10)
        return OnnxEngine(*args, **options)

    with EnginePool(fresh.path, threads=1) as pool, ThreadPoolExecutor() as threads:
        monkeypatch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", slow)
        refit = threads.submit(pool.refit, bank=plan.bank, source=8)
        assert began.wait(10)
        for target in (8, 16):
            pool.switch(target)
            assert pool.serving.target == target
            assert pool.serving.source == 0
            pool.run(images)
        go_on.set()
        refit.result(10)
        assert (pool.serving.target, pool.serving.source) == (16, 8)


def test_degrees_are_opened_when_asked_for_and_closed_when_there_is_no_room(
    fresh: Bundle, plan: BuildPlan, images
):
    wanted = answers(fresh, images)
    shared = fresh.files["weights.safetensors"].bytes
    own = fresh.files["r08.safetensors"].bytes

    def held(pool: EnginePool) -> set[int]:
        return set(pool._servings)

    with EnginePool(fresh.path, threads=1, memory=shared + 1.5 * own) as pool:
        assert held(pool) == {0}
        pool.switch(8)
        assert held(pool) == {0, 8}
        pool.switch(16)
        assert held(pool) == {16}  # the one that serves, and no room for another of its kind
        pool.switch(0)
        assert held(pool) == {0, 16}
        assert same(of_pool(pool, images), wanted)
        pool.refit(bank=plan.bank, source=8)
        assert pool.switch(8).source == 8
        assert pool.switch(0).source == 8  # opened after the refit, with its weights
    with EnginePool(fresh.path, memory=0) as pool:
        pool.switch(8)
        assert held(pool) == {8}


def test_the_bundle_may_go_away_or_change(fresh: Bundle, plan: BuildPlan, tmp_path: Path, images):
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
        assert lazy.serving.target == 0
        np.testing.assert_array_equal(lazy.run(images), wanted[0])
        with pytest.raises(BundleError):
            pool.reload()
        shutil.rmtree(fresh.path)
        assert same(of_pool(pool, images), wanted)
        pool.switch(16)
        with pytest.raises(BundleError, match="not a bundle"):
            pool.reload()
        np.testing.assert_array_equal(pool.run(images), wanted[16])
        new = write_bundle(dataclasses.replace(plan, source=8, scale=1.0), fresh.path)
        pool.reload()
        assert pool.serving.target == 16
        assert same(of_pool(pool, images), answers(new, images))


def test_changed_weights_are_not_opened(fresh: Bundle):
    file = fresh.path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        EnginePool(fresh.path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_hold_no_numbers(fresh: Bundle, images, value: float):
    broken = images.copy()
    broken[1, 0, 3, 4] = value
    with EnginePool(fresh.path) as pool:
        for target in TARGETS:
            pool.switch(target)
            with pytest.raises(ImageError, match="image 1 of the batch has pixels"):
                pool.run(broken)


def test_images_of_another_form(fresh: Bundle, images):
    with EnginePool(fresh.path) as pool:
        for wrong in (images[:0], images[:, :2], images[0], images.astype(np.float64)):
            with pytest.raises(ImageError):
                pool.run(wrong)


def test_closed(fresh: Bundle, plan: BuildPlan, images):
    pool = EnginePool(fresh.path)
    serving = pool.serving
    with pool:
        pass
    for call in (lambda: pool.run(images), lambda: pool.switch(8), pool.reload, pool.refit):
        with pytest.raises(PoolError, match="closed"):
            call()
    serving.run(images)  # one that was under way
    pool.close()


def test_plans(nvidia, fresh: Bundle, plan: BuildPlan, images, make_checkpoint, tmp_path: Path):
    for target in TARGETS:
        content, record = build_plan(open_library("tensorrt"), fresh, target, PlanOptions())
        save_plan(fresh.path / f"r{target:02d}.plan", content, record)
    dataclasses.replace(fresh, plans=TARGETS).save_manifest()
    file = other_checkpoint(tmp_path, plan, make_checkpoint)
    with EnginePool(fresh.path, runner="plan") as pool:
        first = of_pool(pool, images)
        assert (pool.serving.source, pool.serving.scale) == (0, 0.1)
        old = pool.serving
        pool.refit(bank=plan.bank, source=8, scale=1.0)
        assert (pool.serving.source, pool.serving.scale) == (8, 1.0)
        second = of_pool(pool, images)
        assert not same(second, first)
        np.testing.assert_array_equal(old.run(images), first[16])
        with pytest.raises(PlanError, match="--refit all"):
            pool.refit(checkpoint=file, bank=plan.bank)
        assert same(of_pool(pool, images), second)
        pool.refit(bank=plan.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), first)


def test_a_stripped_plan_takes_the_bundles_weights(nvidia, fresh: Bundle, images):
    content, record = build_plan(open_library("tensorrt"), fresh, 8, PlanOptions(strip=True))
    save_plan(fresh.path / "r08.plan", content, record)
    dataclasses.replace(fresh, plans=(8,)).save_manifest()
    with EnginePool(fresh.path, runner="plan", targets=[8]) as pool:
        assert np.isfinite(pool.run(images)).all()


def test_eight_threads_get_whole_answers(fresh: Bundle, plan: BuildPlan, tmp_path: Path, images):
    """Each answer is that of one degree with one set of weights, whatever happens meanwhile."""
    scales = (0.1, 1.0)
    wanted = {
        (target, scale): logits
        for scale in scales
        for target, logits in answers(
            write_bundle(dataclasses.replace(plan, scale=scale), tmp_path / str(scale)), images
        ).items()
    }
    stop = time.monotonic() + 3
    with EnginePool(fresh.path, threads=1) as pool, ThreadPoolExecutor(9) as threads:

        def ask() -> int:
            count = 0
            while time.monotonic() < stop:
                serving = pool.serving
                logits = serving.run(images)
                np.testing.assert_array_equal(logits, wanted[serving.target, serving.scale])
                count += 1
            return count

        asking = [threads.submit(ask) for _ in range(8)]
        rng = np.random.default_rng(0)
        refits = 0
        while time.monotonic() < stop:
            for target in rng.choice(TARGETS, 5):
                pool.switch(int(target))
                time.sleep(0.002)
            refits += 1
            pool.refit(bank=plan.bank, scale=scales[refits % 2])
        assert all(thread.result() > 3 for thread in asking)
        assert refits > 3


def test_a_bundle_built_anew_in_its_place_is_not_mixed_in(
    plan: BuildPlan, tmp_path: Path, make_images, make_checkpoint
):
    """Neither its weights, for a precision that starts from the file's, nor its graphs."""
    images = make_images(plan.spec, 2)
    half = dataclasses.replace(plan, precision="fp16")
    bundle = write_bundle(half, tmp_path / "bundle")
    wanted = answers(write_bundle(half, tmp_path / "same"), images)
    (tmp_path / "evit").mkdir()
    other = Checkpoint.open(make_checkpoint(tmp_path / "evit", plan.spec, 7))
    pruned = dataclasses.replace(
        half, checkpoint=other, method=Method("evit"), bank=None, precision="fp32"
    )
    with (
        EnginePool(bundle.path, threads=1) as pool,
        EnginePool(bundle.path, threads=1, memory=float("inf")) as lazy,
    ):
        write_bundle(pruned, bundle.path, force=True)
        with pytest.raises(BundleError, match=r"r08.safetensors"):
            lazy.switch(8)
        pool.refit(bank=plan.bank, source=16)
        pool.refit(bank=plan.bank, source=0)
        found = of_pool(pool, images)
        np.testing.assert_array_equal(found[0], wanted[0])
        for target in (8, 16):  # from weights that were rounded once already
            np.testing.assert_allclose(found[target], wanted[target], atol=0.1)


def test_degrees_of_several_sources(fresh: Bundle, plan: BuildPlan):
    refit_graph(fresh, 8, NewWeights(plan.checkpoint, plan.bank, 4, 0.2))
    with EnginePool(fresh.path) as pool:
        assert pool.switch(8).source == 4
        assert pool.switch(16).source == 0
        with pytest.raises(PoolError, match=r"differ in scale \(0.1, 0.2\): refit\(scale=...\)"):
            pool.refit(bank=plan.bank, source=4)
        with pytest.raises(PoolError, match=r"differ in source \(0, 4\): refit\(source=...\)"):
            pool.refit(bank=plan.bank, scale=0.1)
        pool.refit(bank=plan.bank, source=4, scale=0.1)
        assert (pool.serving.target, pool.serving.source) == (16, 4)


def test_accuracy_was_that_of_the_old_weights(fresh: Bundle, plan: BuildPlan):
    dataclasses.replace(fresh, accuracy={8: 70.0}).save_manifest()
    with EnginePool(fresh.path) as pool:
        assert pool.bundle.accuracy == {8: 70.0}
        pool.refit(bank=plan.bank, source=4)
        assert pool.bundle.accuracy == {}


def test_a_plan_that_was_replaced_is_not_opened(nvidia, fresh: Bundle, plan: BuildPlan):
    for target in TARGETS:
        content, record = build_plan(open_library("tensorrt"), fresh, target, PlanOptions())
        save_plan(fresh.path / f"r{target:02d}.plan", content, record)
    dataclasses.replace(fresh, plans=TARGETS).save_manifest()
    with EnginePool(fresh.path, runner="plan", memory=float("inf")) as pool:
        save_plan(fresh.path / "r08.plan", content, record)
        with pytest.raises(BundleError, match=r"r08.plan was changed .*reload"):
            pool.switch(8)
        assert pool.serving.target == 0
        pool.switch(16)


def test_a_bundle_of_other_degrees(fresh: Bundle, plan: BuildPlan, images, make_checkpoint):
    with EnginePool(fresh.path, threads=1) as pool:
        pool.switch(8)
        write_bundle(dataclasses.replace(plan, targets=(0, 12)), fresh.path, force=True)
        with pytest.raises(BundleError, match=r"no degree 8 now, which serves; .* \(0, 12\) first"):
            pool.reload()
        assert pool.targets == TARGETS
        pool.switch(0)
        pool.reload()
        assert pool.targets == (0, 12)
        assert pool.switch(12).target == 12
        with pytest.raises(DegreeError):
            pool.switch(8)
        other = dataclasses.replace(plan.spec, depth=3)
        changed = Checkpoint.open(make_checkpoint(fresh.path.parent, other))
        write_bundle(
            dataclasses.replace(plan, spec=other, checkpoint=changed, bank=None),
            fresh.path,
            force=True,
        )
        with pytest.raises(BundleError, match="another model now"):
            pool.reload()


def test_a_bank_by_its_file(fresh: Bundle, plan: BuildPlan, tmp_path: Path, images):
    assert plan.bank is not None
    plan.bank.save(tmp_path / "bank.safetensors")
    with EnginePool(fresh.path, threads=1) as pool, EnginePool(fresh.path, threads=1) as other:
        pool.refit(bank=str(tmp_path / "bank.safetensors"), source=8)
        other.refit(bank=plan.bank, source=8)
        assert same(of_pool(pool, images), of_pool(other, images))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"memory": -1}, "memory -1"),
        ({"memory": float("nan")}, "memory nan"),
        ({"threads": 0}, "threads 0"),
        ({"runner": "x"}, "runner 'x'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(fresh: Bundle, options: Any, says: str):
    with pytest.raises(InputError, match=says):
        EnginePool(fresh.path, **options)


def test_refits_that_make_no_sense(fresh: Bundle, plan: BuildPlan):
    with EnginePool(fresh.path) as pool:
        for wrong in ({"scale": -1.0}, {"scale": float("nan")}, {"source": 17}, {"source": "8"}):
            with pytest.raises(InputError, match=next(iter(wrong))):
                pool.refit(bank=plan.bank, **wrong)


def test_images_beyond_all_measure(fresh: Bundle, images):
    with EnginePool(fresh.path) as pool, pytest.raises(ImageError, match="normalised"):
        pool.run(np.full_like(images, 3e38))
