"""A bundle's variants in ONNX Runtime."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.errors import (
    BundleError,
    DegreeError,
    DeviceError,
    MissingPackageError,
)
from tocom_export.training.torch_engine import load_model, make_oracle, make_runner

NAMES = ("r00", "r08", "r16")
CPU = "CPUExecutionProvider"
Images = Callable[..., np.ndarray]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_variant_gives_logits(bundle: Bundle, make_images: Images, name: str, batch: int):
    logits = OnnxEngine(bundle, name).run(make_images(bundle.spec, batch))
    assert logits.shape == (batch, bundle.spec.classes)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", [*NAMES, "fast"])
def test_without_compensation_it_is_the_checkpoint(
    mixed: Bundle, mixed_blueprint: Blueprint, make_images: Images, name: str
):
    bundle, variant = mixed, mixed.variant(name)
    images = make_images(bundle.spec, 8)
    model = load_model(
        bundle.spec, mixed_blueprint.weights.checkpoint.tensors, mixed_blueprint.method
    )
    expected = make_runner(model, variant.degrees)(images)
    plain = OnnxEngine(bundle, name, compensated=False)
    np.testing.assert_allclose(plain.run(images), expected, atol=1e-4)
    differs = np.abs(OnnxEngine(bundle, name).run(images) - expected).max() > 1e-2
    assert differs == variant.baked  # what the bank adds isn't left out of both


@pytest.mark.parametrize("name", [*NAMES, "fast"])
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_with_compensation_it_is_the_model_with_the_bank_beside_it(
    mixed: Bundle, mixed_blueprint: Blueprint, tmp_path: Path, make_bank: Any, make_images: Images,
    revise: Callable[..., Blueprint], name: str, method: Any,
):  # fmt: skip
    """A constant degree or one for each layer, from source 0 and from source 16."""
    bundle, bank = mixed, mixed_blueprint.weights.bank
    if method == "evit":
        bank = make_bank(mixed.spec, method="evit")
        pruned = revise(mixed_blueprint, bank=bank, method=bank.method)
        bundle = write_bundle(pruned, tmp_path / "pruned")
    images = make_images(bundle.spec, 8)
    engine = OnnxEngine(bundle, name)
    assert engine.variant == bundle.variants[name]
    wanted = make_oracle(bundle, bank)(engine.variant, images)
    np.testing.assert_allclose(engine.run(images), wanted, atol=1e-4)


def test_each_layer_is_compensated_for_the_tokens_that_reach_it(mixed: Bundle):
    fast = mixed.variant("fast")
    assert fast.degrees == (20, 3, 0, 7)
    assert max(fast.degrees) > 16
    assert fast.targets == pytest.approx((16, 16, 11.5, 7 + 2 / 3))
    shared, own = mixed.tensors("r00" if fast.source == 0 else "r16"), mixed.tensors("fast")
    changed = [
        not np.array_equal(shared[name], own[name])
        for name in (f"blocks.{layer}.attn.qkv.weight" for layer in range(4))
    ]
    assert changed == [target != fast.source for target in fast.targets]


def test_an_engine_without_compensation_goes_on_as_others_come_and_go(
    bundle: Bundle, make_images: Images
):
    """It reads weights that lie in memory, not in a file."""
    images = make_images(bundle.spec)
    plain = OnnxEngine(bundle, 8, compensated=False)
    first = plain.run(images)
    for _ in range(3):
        OnnxEngine(bundle, 8).run(images)
        gc.collect()
    np.testing.assert_array_equal(plain.run(images), first)


def test_variants_differ(bundle: Bundle, make_images: Images):
    images = make_images(bundle.spec)
    answers = [OnnxEngine(bundle, name).run(images) for name in NAMES]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    assert np.abs(answers[1] - answers[2]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_the_same_logits_in_any_batch(bundle: Bundle, make_images: Images, name: str):
    engine = OnnxEngine(bundle, name)
    images = make_images(bundle.spec, 5)
    alone = np.concatenate([engine.run(image[None]) for image in images])
    np.testing.assert_allclose(engine.run(images), alone, atol=1e-5)


def test_the_number_of_threads_changes_nothing(bundle: Bundle, make_images: Images):
    images = make_images(bundle.spec)
    one, two = (OnnxEngine(bundle, 8, threads=n).run(images) for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("name", [4, "4", "r04", 17, -1, "fast", ""])
def test_a_variant_that_the_bundle_lacks(bundle: Bundle, name: str | int):
    with pytest.raises(DegreeError, match=f"no variant {name}; it has r00, r08, r16"):
        OnnxEngine(bundle, name)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_the_runtime_lacks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str
):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(DeviceError, match=f"`device` {device}: .* has cpu"):
        OnnxEngine(bundle, 8, device=device)


def test_a_session_that_falls_back_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    class Fallen:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return [CPU]

    full = "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [full, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(DeviceError, match=f"`device` cuda: ONNX Runtime gave {CPU} instead"):
        OnnxEngine(bundle, 8, device="cuda")


def test_a_device_error_is_no_bad_input():
    assert DeviceError("").exit_status == 2


@pytest.mark.parametrize("device, extra", [("cpu", "cpu"), ("cuda", "gpu")])
def test_without_onnxruntime(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str, extra: str
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'tocom-export\[{extra}\]'"):
        OnnxEngine(bundle, 8, device=device)


@pytest.mark.parametrize("name", ["weights.safetensors", "r08.safetensors", "r08.onnx"])
def test_a_file_that_went_missing(fresh: Bundle, name: str):
    (fresh.path / name).unlink()
    with pytest.raises(BundleError, match=r"r08\.onnx") as caught:
        OnnxEngine(fresh, 8)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_graph_that_is_none(fresh: Bundle, content: bytes):
    fresh.graph(8).write_bytes(content)
    with pytest.raises(BundleError, match=r"r08\.onnx: ONNX Runtime can't open it"):
        OnnxEngine(fresh, 8)


def test_a_moved_bundle_still_runs(fresh: Bundle, make_images: Images):
    images = make_images(fresh.spec)
    before = OnnxEngine(fresh, 8).run(images)
    moved = fresh.path.rename(fresh.path.with_name("moved"))
    np.testing.assert_array_equal(OnnxEngine(Bundle.open(moved), 8).run(images), before)


def test_threads_share_an_engine(bundle: Bundle, make_images: Images):
    engine = OnnxEngine(bundle, 16)
    batches = [make_images(bundle.spec, seed=seed) for seed in range(32)]
    expected = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(engine.run, batches))
    for got, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_weights_are_mapped_from_the_bundle(fresh: Bundle):
    def mapped() -> bool:
        return str(fresh.path / "weights.safetensors") in Path("/proc/self/maps").read_text()

    assert not mapped()
    engine = OnnxEngine(fresh, 8)
    assert mapped()
    del engine


def test_a_device_that_fails_while_running_is_no_fallback(
    bundle: Bundle, make_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    engine = OnnxEngine(bundle, next(iter(bundle.variants)))
    assert engine._opened[0]._enable_fallback is False

    def failing(*_: Any) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("device lost")

    stand_in = SimpleNamespace(run=failing, is_webgpu_graph_capture_enabled=lambda: False)
    monkeypatch.setattr(engine._opened[0], "_sess", stand_in)
    with pytest.raises(Exception, match="device lost"):
        engine.run(make_images(bundle.spec))


def test_other_weights(bundle: Bundle, make_images: Images):
    """Runs take the new ones from then on; the files are as they were."""
    images = make_images(bundle.spec)
    wanted = {name: OnnxEngine(bundle, name).run(images) for name in NAMES}
    engine = OnnxEngine(bundle, "r08")
    shared = {name: np.array(tensor) for name, tensor in bundle.tensors("r00").items()}
    engine.refit(shared)
    plain = OnnxEngine(bundle, "r08", compensated=False).run(images)
    np.testing.assert_array_equal(engine.run(images), plain)
    given = OnnxEngine(bundle, "r08", weights=shared)
    np.testing.assert_array_equal(given.run(images), plain)
    engine.refit(bundle.tensors("r08"))
    np.testing.assert_array_equal(engine.run(images), wanted["r08"])
    engine.refit(shared)
    engine.refit()  # what the files hold
    np.testing.assert_array_equal(engine.run(images), wanted["r08"])


def test_a_refit_that_fails_leaves_the_old_weights(fresh: Bundle, make_images: Images):
    images = make_images(fresh.spec)
    engine = OnnxEngine(fresh, "r08")
    before = engine.run(images)
    weights = {**fresh.tensors("r08"), "head.bias": np.zeros(3, np.float32)}
    with pytest.raises(BundleError, match=r"r08\.onnx: ONNX Runtime can't open it"):
        engine.refit(weights)
    (fresh.path / "r08.safetensors").rename(fresh.path / "gone")
    with pytest.raises(BundleError, match=r"r08\.safetensors is missing"):
        engine.refit()
    np.testing.assert_array_equal(engine.run(images), before)
