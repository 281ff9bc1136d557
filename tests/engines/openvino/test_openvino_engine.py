"""Variants in OpenVINO, against the PyTorch model and against ONNX Runtime."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.openvino.engine import OpenVinoEngine
from tocom_export.engines.openvino.library import Settings
from tocom_export.engines.verify import sample_images, verify
from tocom_export.errors import BundleError, ImageError, InputError
from tocom_export.graph.precision import Precision
from tocom_export.graph.quantising import quantized_layers
from tocom_export.training.torch_engine import make_oracle

F32 = Settings(precision="f32", threads=1)
NAMES = ("r00", "r08", "r16")


def build(blueprint: Blueprint, precision: Precision, out: Path) -> Bundle:
    weights = dataclasses.replace(blueprint.weights, precision=precision)
    images = sample_images(weights.spec, 32)
    return write_bundle(
        dataclasses.replace(blueprint, weights=weights),
        out,
        calibrate=lambda bundle, variant: measure_input_scales(bundle, variant.name, images),
    )


def test_engines_say_what_the_model_says(mixed: Bundle):
    images = sample_images(mixed.spec, 20)
    oracle = make_oracle(mixed)
    options = {"inference_precision": "f32", "threads": 1}
    found = list(verify(mixed, images, oracle, backend="openvino", **options))
    assert [c.variant for c in found] == [*NAMES, "fast"]
    assert all(c.passed and c.beyond == 0 for c in found)
    other = verify(mixed, images, lambda v, x: oracle(mixed.variant(8), x), backend="openvino")
    assert not all(c.passed for c in other)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_bundles_of_other_precisions(blueprint: Blueprint, tmp_path: Path, precision: Precision):
    bundle = build(blueprint, precision, tmp_path / "bundle")
    images = sample_images(bundle.spec, 40)
    for name in NAMES:
        engine = OpenVinoEngine(bundle, name, settings=F32)
        assert engine.precision == precision
        wanted = OnnxEngine(bundle, name, threads=1).run(images)
        differs = np.abs(engine.run(images) - wanted).max(axis=1) / np.abs(wanted).max()
        assert np.median(differs) < 0.02  # rounding may decide some merges


def test_int8_multiplies_integers(blueprint: Blueprint, tmp_path: Path):
    bundle = build(blueprint, "int8", tmp_path / "bundle")
    engine = OpenVinoEngine(bundle, "r08", settings=F32)
    (compiled,) = engine._opened.values()
    facts = [op.get_rt_info() for op in compiled.model.get_runtime_model().get_ops()]
    products = [
        fact["runtimePrecision"].astype(str)
        for fact in facts
        if fact["layerType"].astype(str) == "FullyConnected"
    ]
    assert products.count("i8") == len(quantized_layers(bundle.spec))


def test_batches_of_one_size_and_of_any(bundle: Bundle, cache: Path):
    fixed = OpenVinoEngine(bundle, "r16", settings=F32, batch=(1, 3))
    free = OpenVinoEngine(bundle, "r16", settings=F32)
    assert list(fixed._opened) == [1, 3]
    for size in (1, 3, 5):
        images = sample_images(bundle.spec, size, seed=size)
        np.testing.assert_allclose(fixed.run(images), free.run(images), atol=1e-5)
    assert list(fixed._opened) == [1, 3, None]  # 5 came, and a model for any size
    assert len(list(cache.glob("*.blob"))) == 3
    for wrong in ((0,), (1.5,), ("8",)):
        with pytest.raises(InputError, match=r"`batch` .*: whole numbers of images are expected"):
            OpenVinoEngine(bundle, "r16", settings=F32, batch=wrong)
    with pytest.raises(ImageError, match="images have shape"):
        free.run(images[:, :1])


def test_all_of_set_a_may_go(
    make_spec: Callable[..., Any], tmp_path: Path, make_blueprint: Callable[..., Blueprint]
):
    spec = make_spec(class_token=False, pool="avg")
    schedules = {"most": [25] * spec.depth}
    blueprint = make_blueprint(tmp_path, spec, bank=None, targets=(), schedules=schedules)
    bundle = write_bundle(blueprint, tmp_path / "bundle")
    images = sample_images(spec, 4)
    wanted = OnnxEngine(bundle, "most", threads=1).run(images)
    found = OpenVinoEngine(bundle, "most", settings=F32, batch=(4,)).run(images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_uncompensated(bundle: Bundle):
    images = sample_images(bundle.spec, 3)
    plain = bundle.engine("r16", backend="openvino", inference_precision="f32", compensated=False)
    wanted = OnnxEngine(bundle, "r16", compensated=False).run(images)
    np.testing.assert_allclose(plain.run(images), wanted, atol=1e-4)
    assert not np.allclose(wanted, OnnxEngine(bundle, "r16").run(images), atol=1e-2)
    exact: dict[str, Any] = {"inference_precision": "f32"}
    for backend, options in (("onnx", {}), ("openvino", exact)):  # and stays so
        engine: Any = bundle.engine("r16", backend=backend, compensated=False, **options)
        engine.refit()
        np.testing.assert_allclose(engine.run(images), wanted, atol=1e-4)
        with pytest.raises(InputError, match="`weights` are given"):
            bundle.engine("r16", backend=backend, compensated=False, weights=bundle.tensors("r16"))


def test_other_weights_while_it_runs(bundle: Bundle):
    images = sample_images(bundle.spec, 2)
    engine = OpenVinoEngine(bundle, "r16", settings=F32, batch=(2,))
    before, stop = engine.run(images), threading.Event()
    wrong: list[Any] = []
    weights = {
        name: tensor * np.float32(1.5) if name.endswith("qkv.weight") else tensor
        for name, tensor in bundle.tensors("r16").items()
    }
    after = OnnxEngine(bundle, "r16", threads=1, weights=weights).run(images)
    assert np.abs(after - before).max() > 0.01

    def ask() -> None:
        while not stop.is_set():
            found = engine.run(images)
            if min(np.abs(found - one).max() for one in (before, after)) > 1e-3:
                wrong.append(found)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    engine.refit(weights)
    stop.set()
    for asker in askers:
        asker.join()
    assert not wrong
    np.testing.assert_allclose(engine.run(images), after, atol=1e-4)
    engine.refit()
    np.testing.assert_allclose(engine.run(images), before, atol=1e-5)
    for other, says in (
        ({"norm.weight": np.ones(3, np.float32)}, r"norm\.weight has another shape"),
        ({"norm.weight": np.ones(64, np.float16)}, r"norm\.weight is of another type"),
        ({"nothing": np.ones(3, np.float32)}, r"r16\.onnx has no weight nothing"),
    ):
        with pytest.raises(BundleError, match=says):
            engine.refit({**weights, **other})
    np.testing.assert_allclose(engine.run(images), before, atol=1e-5)


def test_a_pool(
    fresh: Bundle, blueprint: Blueprint, tmp_path: Path, revise: Callable[..., Blueprint]
):
    images = sample_images(fresh.spec, 2)
    built = write_bundle(revise(blueprint, source=8, scale=0.5), tmp_path / "other")
    options: dict[str, Any] = {"inference_precision": "f32", "threads": 1, "batch": (1, 2)}
    with EnginePool(fresh.path, backend="openvino", memory=0, **options) as pool:
        for bundle in (fresh, built):
            for name in NAMES:
                wanted = OnnxEngine(bundle, name, threads=1).run(images)
                np.testing.assert_allclose(pool.run(images, name), wanted, atol=1e-4)
            pool.refit(bank=blueprint.weights.bank, source=8, scale=0.5)
    weights = fresh.path / "weights.safetensors"
    with EnginePool(fresh.path, backend="openvino", memory=0, **options) as pool:
        weights.write_bytes(weights.read_bytes())
        with pytest.raises(BundleError, match=r"weights\.safetensors was changed.*reload the pool"):
            pool.switch("r16")
        assert np.isfinite(pool.run(images)).all()


def test_a_refit_of_files_is_not_answered_from_the_cache(
    refit_graph: Callable[..., Bundle],
    fresh: Bundle,
    blueprint: Blueprint,
    revise: Callable[..., Blueprint],
):
    images = sample_images(fresh.spec, 3)
    engine = OpenVinoEngine(fresh, "r16", settings=F32)
    before = engine.run(images)
    changed = revise(blueprint, scale=0.5)
    refit_graph(fresh, changed.variants["r16"], changed.weights)
    engine.refit()
    wanted = OnnxEngine(Bundle.open(fresh.path), "r16", threads=1).run(images)
    np.testing.assert_allclose(engine.run(images), wanted, atol=1e-4)
    assert np.abs(wanted - before).max() > 0.01
    assert engine.variant.scale == 0.5


def test_files_that_changed_since_the_bundle_was_opened(
    refit_graph: Callable[..., Bundle],
    fresh: Bundle,
    blueprint: Blueprint,
    revise: Callable[..., Blueprint],
    cache: Path,
):
    """Nothing is kept under the hashes of other files, nor compiled late from them."""
    images = sample_images(fresh.spec, 3)
    early = OpenVinoEngine(fresh, "r16", settings=F32, batch=(1,))
    kept = set(cache.glob("*.blob"))
    changed = revise(blueprint, scale=0.5)
    refit_graph(fresh, changed.variants["r16"], changed.weights)
    for late in (
        lambda: early.run(images),  # of another size than it was compiled for
        lambda: OpenVinoEngine(fresh, "r16", settings=F32),
    ):
        with pytest.raises(BundleError, match=r"r16\.safetensors was changed since its bundle was"):
            late()
    assert set(cache.glob("*.blob")) == kept
    shared = fresh.path / "weights.safetensors"
    content = bytearray(shared.read_bytes())
    content[-1] ^= 1  # of the same size: opening a bundle doesn't notice
    shared.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors was changed"):
        OpenVinoEngine(Bundle.open(fresh.path), "r00", settings=F32)
    assert set(cache.glob("*.blob")) == kept


def test_a_graph_that_is_none(fresh: Bundle):
    graph = fresh.graph("r16")
    graph.write_bytes(b"\x00" * graph.stat().st_size)
    files = {**fresh.files, **record_files(fresh.path, [graph.name])}
    with pytest.raises(BundleError, match=r"r16\.onnx: OpenVINO can't open it \(") as caught:
        OpenVinoEngine(dataclasses.replace(fresh, files=files), "r16", settings=F32)
    assert "Exception from" not in str(caught.value)
