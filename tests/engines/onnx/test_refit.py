"""Other weights in the files of a bundle's ONNX engines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights, check_same_model
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images, verify
from tocom_export.errors import BundleError, CheckFailed, CheckpointError
from tocom_export.training.torch_engine import BankOracle, load_model
from tocom_export.variant import Variant

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]
Revise = Callable[..., Blueprint]


def changed(bundle: Bundle, name: str = "r08", **changes: Any) -> Variant:
    return dataclasses.replace(bundle.variant(name), **changes)


@pytest.fixture
def other(blueprint: Blueprint, tmp_path: Path) -> Callable[..., ModelWeights]:
    """Weights of a checkpoint in which some tensors are others."""

    def make(*names: str) -> ModelWeights:
        weights = blueprint.weights
        tensors = {name: np.array(tensor) for name, tensor in weights.checkpoint.tensors.items()}
        for name in names:
            tensors[name] *= np.float32(1.5)
        save_file(tensors, tmp_path / "other.safetensors")
        opened = Checkpoint.open(tmp_path / "other.safetensors")
        return dataclasses.replace(weights, checkpoint=opened)

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["r08", "fast"])
def test_it_is_what_a_new_build_would_be(
    refit_graph: Callable[..., Bundle], make_blueprint: Callable[..., Blueprint], tmp_path: Path,
    make_images: Any, revise: Revise, precision: Any, name: str,
):  # fmt: skip
    schedules = {"fast": (20, 3, 0, 7)}
    blueprint = make_blueprint(tmp_path, targets=(8, 16), schedules=schedules, precision=precision)
    bundle = write_bundle(blueprint, tmp_path / "bundle")
    images = make_images(bundle.spec, 3)
    engine, beside = OnnxEngine(bundle, name), OnnxEngine(bundle, "r16")
    before, others = engine.run(images), beside.run(images)
    graph = bundle.graph(name).read_bytes()

    variant = changed(bundle, name, source=4, scale=0.05)
    after = refit_graph(bundle, variant, blueprint.weights)

    built = write_bundle(revise(blueprint, source=4, scale=0.05), tmp_path / "built")
    fresh, wanted = (load_file(b.path / f"{name}.safetensors") for b in (bundle, built))
    assert fresh.keys() == wanted.keys()
    assert all(np.array_equal(fresh[key], wanted[key]) for key in wanted)
    assert bundle.graph(name).read_bytes() == graph
    np.testing.assert_array_equal(engine.run(images), before)  # open engines go on as they were
    engine.refit(None)
    np.testing.assert_array_equal(engine.run(images), OnnxEngine(built, name).run(images))
    assert not np.array_equal(engine.run(images), before)
    beside.refit(None)
    np.testing.assert_array_equal(beside.run(images), others)

    opened = Bundle.open(bundle.path, hashes=True)
    assert opened == after
    assert opened.refitted == (name,)
    assert opened.variants == {**bundle.variants, name: variant}
    assert opened.variants[name] == built.variants[name]

    refit_graph(opened, bundle.variants[name], blueprint.weights)
    engine.refit(None)
    np.testing.assert_array_equal(engine.run(images), before)


def test_what_is_checked_is_what_the_bundle_will_be(
    refit_graph: Callable[..., Bundle], mixed: Bundle, mixed_blueprint: Blueprint, make_images: Any
):
    """A degree in each layer, from another source, against the bank beside the weights."""
    weights = mixed_blueprint.weights
    variant = changed(mixed, "fast", source=9, scale=0.3)
    model = load_model(mixed.spec, weights.checkpoint.tensors, mixed.method)
    oracle = BankOracle(model, weights.bank)
    images, seen = make_images(mixed.spec, 3), []

    def check(bundle: Bundle) -> None:
        assert bundle.path != mixed.path
        assert Bundle.open(mixed.path, hashes=True) == mixed  # nothing has happened yet
        (found,) = verify(bundle, sample_images(mixed.spec), oracle, variants=["fast"], atol=1e-3)
        assert found.passed
        seen.append(bundle.engine("fast").run(images))

    after = refit_graph(mixed, variant, weights, check)
    assert after.variant("fast") == variant
    np.testing.assert_array_equal(after.engine("fast").run(images), seen[0])
    assert (after.path, Bundle.open(mixed.path, hashes=True)) == (mixed.path, after)


def test_a_failed_check_leaves_the_files_as_they_were(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint
):
    def fails(*_: Any) -> None:
        raise CheckFailed("no")

    before = {file.name: file.read_bytes() for file in fresh.path.iterdir()}
    with pytest.raises(CheckFailed):
        refit_graph(fresh, changed(fresh, source=4), blueprint.weights, fails)
    assert {file.name: file.read_bytes() for file in fresh.path.iterdir()} == before


def test_what_was_measured_was_other_weights(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint
):
    measured = dataclasses.replace(fresh, accuracy={"r00": 71.0, "r08": 70.0})
    measured.save_manifest()
    refit_graph(measured, changed(fresh, source=4), blueprint.weights)
    assert Bundle.open(fresh.path).accuracy == {"r00": 71.0}


def test_at_its_own_source(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint, make_images: Any
):
    refit_graph(fresh, changed(fresh, source=8), blueprint.weights)
    opened = Bundle.open(fresh.path)
    variant = opened.variant("r08")
    assert (variant.source, variant.scale, variant.baked) == (8, 0.1, False)
    images = make_images(fresh.spec)
    plain = OnnxEngine(fresh, "r08", compensated=False).run(images)
    np.testing.assert_array_equal(OnnxEngine(opened, "r08").run(images), plain)


def test_without_a_bank(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint, make_images: Any
):
    plain = dataclasses.replace(blueprint.weights, bank=None)
    refit_graph(fresh, changed(fresh, source=4, scale=0.05, compensated=False), plain)
    variant = Bundle.open(fresh.path).variant("r08")
    assert (variant.source, variant.scale, variant.compensated) == (4, 0.05, False)
    images = make_images(fresh.spec)
    wanted = OnnxEngine(fresh, "r08", compensated=False).run(images)
    np.testing.assert_array_equal(OnnxEngine(fresh, "r08").run(images), wanted)


def test_a_variant_without_weights_of_its_own(
    refit_graph: Callable[..., Bundle], fresh: Bundle, blueprint: Blueprint
):
    """And that needs none."""
    with pytest.raises(BundleError, match=r"r00\.onnx has no weights of its own"):
        refit_graph(fresh, changed(fresh, "r00", scale=0.5), blueprint.weights)


def test_another_model(
    refit_graph: Callable[..., Bundle],
    fresh: Bundle,
    other: Callable[..., ModelWeights],
    make_images: Any,
):
    images = make_images(fresh.spec)
    before = OnnxEngine(fresh, "r08").run(images)
    refit_graph(fresh, fresh.variant("r08"), other(*QKV))
    assert not np.array_equal(OnnxEngine(fresh, "r08").run(images), before)
    with pytest.raises(BundleError, match=r"has another head\.bias than the bundle"):
        refit_graph(fresh, fresh.variant("r08"), other("head.bias"))


def test_a_model_with_other_classes(blueprint: Blueprint, tmp_path: Path):
    weights = blueprint.weights
    check_same_model(weights.checkpoint, weights.spec)
    tensors = dict(weights.checkpoint.tensors)
    tensors["head.weight"] = np.ones((4, 64), np.float32)
    tensors["head.bias"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "four.safetensors")
    with pytest.raises(CheckpointError, match="has 4 classes, the bundle 10; build a bundle of it"):
        check_same_model(Checkpoint.open(tmp_path / "four.safetensors"), weights.spec)


def test_a_manifest_that_tells_of_variants_it_doesn_t_have(fresh: Bundle):
    file = fresh.path / "manifest.json"
    data = json.loads(file.read_text())
    for extra in ({"plans": ["r04"]}, {"refitted": ["r04"]}, {"accuracy": {"r04": 70.0}}):
        file.write_text(json.dumps({**data, **extra}))
        with pytest.raises(BundleError, match="r04 is no variant"):
            Bundle.open(fresh.path)
