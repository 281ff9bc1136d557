"""Other weights in all engines of a pool."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tocom_export import EnginePool, refit
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.errors import (
    BankError,
    BundleError,
    CheckFailed,
    CheckpointError,
    InputError,
    PoolError,
)
from tocom_export.preparing import prepare
from tocom_export.training.torch_engine import make_oracle
from tocom_export.variant import Variant

NAMES = ("r00", "r08", "r16")
Revise = Callable[..., Blueprint]


def test_a_refit_is_a_new_bundle(
    fresh: Bundle,
    blueprint: Blueprint,
    tmp_path: Path,
    images,
    revise: Revise,
    answers,
    of_pool,
    origin,
    same,
):
    other = revise(blueprint, source=8, scale=0.5)
    built = write_bundle(other, tmp_path / "other")
    with EnginePool(fresh.path, threads=1) as pool:
        first = of_pool(pool, images)
        pool.refit(bank=blueprint.weights.bank, source=8, scale=0.5)
        assert pool.serving.variant.name == "r16"
        assert origin(pool.serving) == (8, 0.5)
        assert same(of_pool(pool, images), answers(built, images))
        pool.refit(bank=blueprint.weights.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), first)
    assert same(answers(Bundle.open(fresh.path, hashes=True), images), first)  # no file was written


def test_another_models_weights(
    fresh: Bundle,
    blueprint: Blueprint,
    tmp_path: Path,
    images,
    revise: Revise,
    answers,
    of_pool,
    same,
    other_checkpoint,
):
    file = other_checkpoint(tmp_path, blueprint)
    built = write_bundle(
        revise(blueprint, checkpoint=Checkpoint.open(file), source=4), tmp_path / "built"
    )
    wanted = answers(built, images)
    with EnginePool(fresh.path, threads=1) as pool:
        pool.refit(checkpoint=file, bank=blueprint.weights.bank, source=4)
        file.write_bytes(bytes(file.stat().st_size))  # it is no longer needed
        assert same(of_pool(pool, images), wanted)
        pool.refit(bank=blueprint.weights.bank, source=8)  # from the weights that it has now
        assert not same(of_pool(pool, images), wanted)
        pool.refit(bank=blueprint.weights.bank, source=4)
        assert same(of_pool(pool, images), wanted)


def test_weights_for_another_image_size(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, images, answers, of_pool, same,
    make_checkpoint: Callable[..., Path],
):  # fmt: skip
    """They are resampled, as a refit of the bundle's files does."""
    spec = dataclasses.replace(fresh.spec, image_size=(64, 40))
    (tmp_path / "wide").mkdir()
    file = make_checkpoint(tmp_path / "wide", spec, 5, metadata=to_metadata(ModelInfo(spec)))
    bank = blueprint.weights.bank
    with EnginePool(fresh.path, threads=1) as pool:
        pool.refit(checkpoint=file, bank=bank)
        found = of_pool(pool, images)
    done = refit(fresh.path, checkpoint=file, bank=bank)
    assert same(found, answers(done.bundle, images))


def test_an_entry_of_a_pickle(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, images, of_pool, same
):
    """Averaged weights, as everywhere, unless another entry is named."""
    state = {n: torch.tensor(t) for n, t in blueprint.weights.checkpoint.tensors.items()}
    other = {n: t * 1.1 for n, t in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "model_best.pth.tar")
    told: dict[str, Any] = {"checkpoint": tmp_path / "model_best.pth.tar", "bank": "none"}
    with EnginePool(fresh.path, threads=1) as pool:
        pool.refit(bank="none")
        before = of_pool(pool, images)
        pool.refit(**told)
        assert same(of_pool(pool, images), before)
        pool.refit(**told, weights_key="state_dict")
        assert not same(of_pool(pool, images), before)


def test_fp16_is_compensated_from_exact_weights(
    blueprint: Blueprint,
    tmp_path: Path,
    make_images,
    revise: Revise,
    answers,
    of_pool,
    same,
    other_checkpoint,
):
    images = make_images(blueprint.weights.spec, 2)
    file = other_checkpoint(tmp_path, blueprint, 0)
    half = revise(blueprint, precision="fp16", checkpoint=Checkpoint.open(file))
    first = write_bundle(half, tmp_path / "first")
    second = write_bundle(revise(half, source=8, scale=1.0), tmp_path / "second")
    with EnginePool(first.path, threads=1) as pool:
        pool.refit(checkpoint=file, bank=blueprint.weights.bank, source=8, scale=1.0)
        assert same(of_pool(pool, images), answers(second, images))
        pool.refit(bank=blueprint.weights.bank, source=0, scale=0.1)
        assert same(of_pool(pool, images), answers(first, images))


def test_a_refit_compensates_each_layer_anew(
    mixed: Bundle, mixed_blueprint: Blueprint, tmp_path: Path, make_images, revise: Revise,
    answers, of_pool, same, other_checkpoint,
):  # fmt: skip
    images, bank = make_images(mixed.spec, 3), mixed_blueprint.weights.bank
    file = other_checkpoint(tmp_path, mixed_blueprint)
    moved = revise(mixed_blueprint, source=9, scale=0.5)
    exchanged = revise(moved, checkpoint=Checkpoint.open(file), source=4)
    built = [write_bundle(b, tmp_path / str(i)) for i, b in enumerate((moved, exchanged))]
    first = answers(mixed, images)
    with EnginePool(mixed.path, threads=1) as pool:
        pool.switch("fast")
        pool.refit(bank=bank, source=9, scale=0.5)
        assert pool.serving.variant == built[0].variant("fast")
        assert pool.bundle.variants == built[0].variants
        assert same(of_pool(pool, images), answers(built[0], images))
        oracle = make_oracle(mixed, bank)
        wanted = oracle(pool.bundle.variant("fast"), images)
        np.testing.assert_allclose(pool.run(images, "fast"), wanted, atol=1e-3)
        pool.refit(checkpoint=file, bank=bank, source=4)
        assert same(of_pool(pool, images), answers(built[1], images))
        pool.reload()
        assert same(of_pool(pool, images), first)


def test_a_checkpoint_says_its_source(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, other_checkpoint
):
    file = other_checkpoint(tmp_path, blueprint)
    save_file(load_file(file), file, to_metadata(ModelInfo(source=12)))
    with EnginePool(fresh.path) as pool:
        pool.refit(checkpoint=file, bank=blueprint.weights.bank)
        assert pool.serving.variant.source == 12
        with pytest.raises(CheckpointError, match="trained at degree 12"):
            pool.refit(checkpoint=file, bank=blueprint.weights.bank, source=4)


def test_a_bank_by_its_file(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, images, of_pool, same
):
    assert blueprint.weights.bank is not None
    blueprint.weights.bank.save(tmp_path / "bank.safetensors")
    with EnginePool(fresh.path, threads=1) as pool, EnginePool(fresh.path, threads=1) as other:
        pool.refit(bank=str(tmp_path / "bank.safetensors"), source=8)
        other.refit(bank=blueprint.weights.bank, source=8)
        assert same(of_pool(pool, images), of_pool(other, images))


def test_variants_of_several_sources(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint
):
    other = dataclasses.replace(fresh.variant("r08"), source=4, scale=0.2)
    refit_graph(fresh, other, blueprint.weights)
    with EnginePool(fresh.path) as pool:
        assert pool.switch(8).variant.source == 4
        assert pool.switch(16).variant.source == 0
        with pytest.raises(PoolError, match=r"differ in scale \(0\.1, 0\.2\): `scale` must say"):
            pool.refit(bank=blueprint.weights.bank, source=4)
        with pytest.raises(PoolError, match=r"differ in source \(0, 4\): `source` must say"):
            pool.refit(bank=blueprint.weights.bank, scale=0.1)
        pool.refit(bank=blueprint.weights.bank, source=4, scale=0.1)
        assert (pool.serving.variant.name, pool.serving.variant.source) == ("r16", 4)


def test_compensation_comes_and_goes(
    fresh: Bundle, blueprint: Blueprint, images, answers, of_pool, same
):
    plain = {n: OnnxEngine(fresh, n, threads=1, compensated=False).run(images) for n in NAMES}
    first = answers(fresh, images)
    with EnginePool(fresh.path, threads=1) as pool:
        pool.refit(bank="none")
        assert not any(variant.baked for variant in pool.bundle.variants.values())
        assert same(of_pool(pool, images), plain)
        pool.refit()  # nothing is compensated now, so no bank is needed
        assert same(of_pool(pool, images), plain)
        pool.refit(bank=blueprint.weights.bank)
        assert same(of_pool(pool, images), first)


def test_without_a_bank_what_is_not_compensated_stays_so(
    tmp_path: Path, make_images, of_pool, same
):
    """Beside a compensated variant of the model inside the package, which has a bank."""
    blueprint = prepare("reference", targets=(4, 8))
    plain = dataclasses.replace(blueprint.variants["r04"], compensated=False)
    variants = {**blueprint.variants, "r04": plain}
    bundle = write_bundle(dataclasses.replace(blueprint, variants=variants), tmp_path / "bundle")
    images = make_images(bundle.spec, 2)

    def compensated(pool: EnginePool) -> dict[str, bool]:
        return {name: pool.bundle.variant(name).compensated for name in variants}

    with EnginePool(bundle.path, threads=1) as pool:
        first = of_pool(pool, images)
        pool.refit(scale=0.2)
        assert compensated(pool) == {"r04": False, "r08": True}
        second = of_pool(pool, images)
        assert [np.array_equal(first[n], second[n]) for n in variants] == [True, False]
        pool.refit(bank="none")
        assert compensated(pool) == {"r04": False, "r08": False}
        pool.refit(scale=0.1)
        assert compensated(pool) == {"r04": False, "r08": False}
        assert not same(of_pool(pool, images), first)


def test_accuracy_was_that_of_the_old_weights(fresh: Bundle, blueprint: Blueprint):
    dataclasses.replace(fresh, accuracy={"r08": 70.0}).save_manifest()
    with EnginePool(fresh.path) as pool:
        assert pool.bundle.accuracy == {"r08": 70.0}
        pool.refit(bank=blueprint.weights.bank, source=4)
        assert pool.bundle.accuracy == {}


def test_refits_that_make_no_sense(fresh: Bundle, blueprint: Blueprint):
    with EnginePool(fresh.path) as pool:
        before = pool.serving
        for wrong in (
            {"scale": -1.0}, {"scale": float("nan")}, {"scale": 1e39},
            {"source": 17}, {"source": -1}, {"source": "8"},
        ):  # fmt: skip
            for bank in (blueprint.weights.bank, "none"):
                with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
                    pool.refit(bank=bank, **wrong)
        assert pool.serving is before


def test_a_failed_refit_changes_nothing(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, images, make_spec, make_checkpoint,
    make_bank, monkeypatch, answers, of_pool, same,
):  # fmt: skip
    def nothing(spec, count: int):
        """Images whose squares are beyond float32, so that no logit is a number."""
        return np.full((count, spec.channels, *spec.image_size), 3e38, np.float32)

    wide = make_spec(width=96)
    (tmp_path / "wide").mkdir()
    wrong = make_checkpoint(tmp_path / "wide", wide)
    bank = blueprint.weights.bank
    huge = dataclasses.replace(bank, q_up=bank.q_up * np.float32(1e36))
    with EnginePool(fresh.path, threads=1) as pool:
        before, wanted = pool.serving, answers(fresh, images)
        with pytest.raises(BankError, match=r"is compensated: name the `bank`"):
            pool.refit(source=8)
        with pytest.raises(BankError, match="`bank`: the bank has width 96"):
            pool.refit(source=8, bank=make_bank(wide))
        with pytest.raises(CheckpointError, match="shape"):
            pool.refit(checkpoint=wrong, bank=blueprint.weights.bank)
        with pytest.raises(CheckpointError, match="no such file"):
            pool.refit(checkpoint="nowhere.safetensors", bank=blueprint.weights.bank)
        with pytest.raises(BankError, match=r"`scale` 1000 takes blocks\.0\.attn\.qkv\.weight bey"):
            pool.refit(bank=huge, source=8, scale=1000)
        with monkeypatch.context() as patch:
            patch.setattr("tocom_export.engines.serving.pool.sample_images", nothing)
            with pytest.raises(CheckFailed, match="logits of r00 are NaN or Inf"):
                pool.refit(bank=blueprint.weights.bank, source=8)
        assert pool.serving is before
        assert same(of_pool(pool, images), wanted)


def test_every_step_of_a_refit_may_fail(
    fresh: Bundle, blueprint: Blueprint, images, monkeypatch, answers, of_pool, same
):
    """The engine of each degree in turn can't be opened."""
    wanted = answers(fresh, images)
    with EnginePool(fresh.path, threads=1) as pool:
        for failing in NAMES:

            def opened(bundle: Bundle, variant: Variant, failing: str = failing, **options: Any):
                if variant.name == failing:
                    raise BundleError("out of memory")
                return OnnxEngine(bundle, variant, **options)

            with monkeypatch.context() as patch:
                patch.setattr("tocom_export.engines.onnx.engine.OnnxEngine", opened)
                with pytest.raises(BundleError, match="out of memory"):
                    pool.refit(bank=blueprint.weights.bank, source=8)
            assert same(of_pool(pool, images), wanted)


def test_a_trace_beside_a_refit_leaves_nothing_of_the_old_weights(
    bundle: Bundle, images, tmp_path: Path, make_checkpoint, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = make_checkpoint(tmp_path, bundle.spec, seed=7)
    with EnginePool(bundle.path, threads=1) as pool:
        refit_it = threading.Thread(
            target=lambda: pool.refit(checkpoint=checkpoint, bank="none", scale=0.1)
        )
        find = EnginePool._find

        def find_slowly(self: EnginePool, variant: Any) -> str:
            if threading.current_thread() is threading.main_thread():
                refit_it.start()
                refit_it.join(3)
            return find(self, variant)

        with monkeypatch.context() as patched:
            patched.setattr(EnginePool, "_find", find_slowly)
            pool.trace(images, "r16")
        refit_it.join()
        logits = pool.trace(images, "r16").outputs["logits"]
        np.testing.assert_allclose(logits, pool.run(images, "r16"), rtol=1e-3, atol=1e-4)
