from __future__ import annotations

import gc
import re
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
from tocom_export.bundle.writing import BuildPlan
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.errors import (
    BundleError,
    DegreeError,
    ImageError,
    MissingPackageError,
    ProviderError,
)
from tocom_export.training.evaluate import runner
from tocom_export.training.torch_engine import load_model

TARGETS = (0, 8, 16)
CPU = "CPUExecutionProvider"
Images = Callable[..., np.ndarray]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_target_gives_logits(bundle: Bundle, make_images: Images, target: int, batch: int):
    logits = OnnxEngine(bundle, target).run(make_images(bundle.spec, batch))
    assert logits.shape == (batch, bundle.spec.classes)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("target", TARGETS)
def test_without_compensation_it_is_the_checkpoint(
    bundle: Bundle, plan: BuildPlan, make_images: Images, target: int
):
    images = make_images(bundle.spec, 8)
    model = load_model(bundle.spec, plan.checkpoint.tensors, plan.method)
    expected = runner(model, target)(images)
    plain = OnnxEngine(bundle, target, compensated=False)
    np.testing.assert_allclose(plain.run(images), expected, atol=1e-4)
    differs = np.abs(OnnxEngine(bundle, target).run(images) - expected).max() > 1e-2
    assert differs == (target != bundle.source)  # what the bank adds isn't left out of both


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


def test_targets_differ(bundle: Bundle, make_images: Images):
    images = make_images(bundle.spec)
    answers = [OnnxEngine(bundle, target).run(images) for target in TARGETS]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    assert np.abs(answers[1] - answers[2]).max() > 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_the_same_logits_in_any_batch(
    bundle: Bundle, make_images: Images, target: int
):
    engine = OnnxEngine(bundle, target)
    images = make_images(bundle.spec, 5)
    alone = np.concatenate([engine.run(image[None]) for image in images])
    np.testing.assert_allclose(engine.run(images), alone, atol=1e-5)


def test_the_number_of_threads_changes_nothing(bundle: Bundle, make_images: Images):
    images = make_images(bundle.spec)
    one, two = (OnnxEngine(bundle, 8, threads=n).run(images) for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(3, 56, 56), (1, 3, 56, 48), (1, 1, 56, 56), (0, 3, 56, 56), (1, 56, 56, 3)], ids=str
)
def test_a_batch_of_another_shape(bundle: Bundle, shape: tuple[int, ...]):
    with pytest.raises(ImageError, match=re.escape(f"{shape}; (B, 3, 56, 56) with B ≥ 1")):
        OnnxEngine(bundle, 8).run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
def test_a_batch_of_another_dtype(bundle: Bundle, dtype: str):
    with pytest.raises(ImageError, match=f"images are {dtype}; float32 is expected"):
        OnnxEngine(bundle, 8).run(np.zeros((1, 3, 56, 56), dtype))


@pytest.mark.parametrize("target", [4, 17, -1])
def test_a_target_that_the_bundle_lacks(bundle: Bundle, target: int):
    with pytest.raises(DegreeError, match=f"no target {target}; it has 0, 8, 16"):
        OnnxEngine(bundle, target)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_the_runtime_lacks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str
):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match=f"--provider {provider}: .* has cpu"):
        OnnxEngine(bundle, 8, provider=provider)


def test_a_session_that_falls_back_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    class Fallen:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return [CPU]

    full = "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [full, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match=f"--provider cuda: ONNX Runtime gave {CPU} instead"):
        OnnxEngine(bundle, 8, provider="cuda")


def test_a_provider_error_is_no_bad_input():
    assert ProviderError("").exit_status == 2


@pytest.mark.parametrize("provider, extra", [("cpu", "cpu"), ("cuda", "gpu")])
def test_without_onnxruntime(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str, extra: str
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'tocom-export\[{extra}\]'"):
        OnnxEngine(bundle, 8, provider=provider)


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


def test_a_provider_that_fails_while_running_is_no_fallback(
    bundle: Bundle, make_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    engine = OnnxEngine(bundle, next(iter(bundle.targets)))
    assert engine._opened[0]._enable_fallback is False

    def failing(*_: Any) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("device lost")

    stand_in = SimpleNamespace(run=failing, is_webgpu_graph_capture_enabled=lambda: False)
    monkeypatch.setattr(engine._opened[0], "_sess", stand_in)
    with pytest.raises(Exception, match="device lost"):
        engine.run(make_images(bundle.spec))
