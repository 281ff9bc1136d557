"""Which backend runs a bundle where that is left open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.engines import picking
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.openvino.engine import OpenVinoEngine
from tocom_export.engines.picking import Choice, choose, find_pick, keep_pick, list_choices
from tocom_export.engines.verify import sample_images
from tocom_export.errors import InputError, MissingPackageError, OutputError

pytest.importorskip("openvino")
F32 = Choice("openvino", "f32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these packages be all that is installed."""

    def call(*packages: str) -> None:
        monkeypatch.setattr(picking, "is_installed", lambda *names: set(names) <= set(packages))

    return call


def test_what_could_run_it(bundle: Bundle, install: Callable[..., None]):
    found = list_choices(bundle)
    assert found[:2] == [Choice("onnx"), F32]
    assert found[2:] in ([], [Choice("openvino", "bf16")])
    install("onnxruntime")
    assert list_choices(bundle) == [Choice("onnx")]
    install()
    with pytest.raises(MissingPackageError, match="onnxruntime is not installed"):
        list_choices(bundle)


def test_without_a_pick_what_agrees_to_the_last_bit(bundle: Bundle, install: Callable[..., None]):
    assert choose(bundle) == Choice("onnx")
    install("openvino")
    assert choose(bundle) == F32
    assert isinstance(bundle.engine("r08", backend="auto"), OpenVinoEngine)


@pytest.mark.parametrize(
    ("device", "backend"), [("cuda", "onnx"), ("CPU", "openvino"), ("NPU", "openvino")]
)
def test_a_device_may_decide(bundle: Bundle, device: str, backend: str):
    keep_pick(bundle, F32)
    assert choose(bundle, device).backend == backend


def test_a_pick_is_kept_for_this_bundle_on_this_machine(
    mixed: Bundle, bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    assert find_pick(mixed) is None
    place = keep_pick(mixed, F32)
    assert place.is_relative_to(cache)
    assert find_pick(mixed) == choose(mixed) == F32
    assert find_pick(bundle) is None
    engine = mixed.engine("r08", backend="auto")
    assert isinstance(engine, OpenVinoEngine)
    assert engine.precision == "fp32"
    assert isinstance(mixed.engine("r08"), OnnxEngine)
    with monkeypatch.context() as patch:
        patch.setattr(picking, "name_processor", lambda: "another")
        assert find_pick(mixed) is None
    for text in ('{"choice": {"backend": "tensorrt"}}', "[]", "null", "{}", "no JSON"):
        place.write_text(text)
        assert find_pick(mixed) is None


def test_a_user_without_a_home(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TOCOM_EXPORT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert choose(bundle) == Choice("onnx")
    images = sample_images(bundle.spec, 1)
    options = {"inference_precision": "f32", "threads": 1}
    found = bundle.engine("r08", backend="openvino", **options).run(images)
    np.testing.assert_allclose(found, bundle.engine("r08").run(images), atol=1e-4)
    with pytest.raises(OutputError, match="no home to keep it in"):
        keep_pick(bundle, F32)


def test_a_precision_that_is_asked_for_decides(bundle: Bundle):
    engine = bundle.engine("r08", backend="auto", inference_precision="f32")
    assert isinstance(engine, OpenVinoEngine)


def test_a_pick_that_is_no_longer_installed(bundle: Bundle, install: Callable[..., None]):
    keep_pick(bundle, F32)
    install("onnxruntime")
    assert choose(bundle) == Choice("onnx")


def test_a_pool_serves_on_what_was_picked(fresh: Bundle):
    images = sample_images(fresh.spec, 2)
    with EnginePool(fresh.path) as pool:
        assert isinstance(pool.serving.engine, OnnxEngine)
        before = pool.run(images)
    keep_pick(fresh, F32)
    with EnginePool(fresh.path, threads=1) as pool:
        assert isinstance(pool.serving.engine, OpenVinoEngine)
        np.testing.assert_allclose(pool.run(images), before, atol=1e-4)
        pool.reload()
        assert isinstance(pool.serving.engine, OpenVinoEngine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx", "inference_precision": "bf16"}, "`inference_precision` is for"),
        ({"backend": "onnx", "streams": 2}, "`streams` is for `backend` openvino"),
        ({"backend": "onnx", "hint": "throughput"}, "`hint` is for `backend` openvino"),
        ({"backend": "openvino", "host_code": True}, "`host_code` is for `backend` tensorrt"),
        ({"backend": "openvino", "graph": b"x"}, "`graph` is for `backend` onnx"),
        ({"backend": "fast"}, "`backend` 'fast': it is onnx, openvino"),
    ],
)
def test_options_of_other_backends(bundle: Bundle, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        bundle.engine("r08", **options)
