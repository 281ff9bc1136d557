"""What OpenVINO is asked before it is used, and what is kept for the next start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.openvino import cache as keeping
from tocom_export.engines.openvino import library
from tocom_export.engines.openvino.engine import OpenVinoEngine
from tocom_export.engines.openvino.library import Settings, check_device, open_core
from tocom_export.engines.verify import sample_images
from tocom_export.errors import DeviceError, InputError, MissingPackageError

F32 = Settings(precision="f32", threads=1)


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without bfloat16."""

    def tell(device: str, name: str) -> Any:
        return {"FULL_DEVICE_NAME": "Old CPU", "OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"]}[name]

    core = SimpleNamespace(available_devices=["CPU"], get_property=tell)
    monkeypatch.setattr(library, "open_core", lambda: core)


def test_a_precision_that_the_device_lacks(old_processor: None):
    assert check_device(Settings(precision="f32")) == "Old CPU"
    assert check_device(Settings()) == "Old CPU"
    with pytest.raises(DeviceError) as caught:
        check_device(Settings(precision="bf16"))
    assert str(caught.value) == (
        "`inference_precision` bf16: Old CPU can't compute in it; it has f32, and auto takes the "
        "fastest."
    )


@pytest.mark.parametrize("device", ["GPU", "npu", "CPU.7"])
def test_a_device_that_isn_t_there(old_processor: None, device: str):
    with pytest.raises(DeviceError, match=rf"^`device` {device.upper()}: OpenVINO .* finds CPU"):
        check_device(Settings(device))


def test_the_best_device_is_openvino_s_choice(bundle: Bundle):
    engine = OpenVinoEngine(bundle, "r16", settings=Settings("auto", "f32"))
    assert np.isfinite(engine.run(sample_images(bundle.spec, 2))).all()
    assert "on AUTO" in engine.about


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tocom-export\[openvino\]'"):
        open_core.__wrapped__()  # the core of the process stays


def test_it_is_too_old(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2024.6.0-17404-4c0f"))
    with pytest.raises(DeviceError, match=r"^openvino 2024\.6\.0 is too old; 20\d\d\.\d or newer"):
        open_core.__wrapped__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "`inference_precision` 'fp16': it is auto, f32, bf16"),
        ({"hint": "speed"}, "`hint` 'speed': it is latency or throughput"),
        ({"threads": 0}, "`threads` 0: there is one at least"),
        ({"streams": -1}, "`streams` -1: there is one at least"),
    ],
)
def test_settings_that_there_are_not(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Settings(**options)


def test_settings_reach_the_device(bundle: Bundle):
    settings = Settings(precision="f32", hint="throughput", streams=2, threads=2)
    engine = OpenVinoEngine(bundle, "r16", settings=settings)
    (compiled,) = engine._opened.values()
    assert compiled.model.get_property("NUM_STREAMS") == 2
    assert compiled.model.get_property("INFERENCE_NUM_THREADS") == 2
    assert engine.about.startswith("OpenVINO 20")
    assert engine.about.endswith(", fp32")


def test_the_precision_is_told(bundle: Bundle, has_bf16: bool):
    engine = OpenVinoEngine(bundle, "r16", settings=Settings(threads=1))
    assert engine.precision == ("bf16" if has_bf16 else "fp32")


def test_a_second_start_compiles_nothing(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    images = sample_images(bundle.spec, 3)
    first = OpenVinoEngine(bundle, "r16", settings=F32, batch=(3,)).run(images)
    (place,) = cache.glob("*.blob")
    content = place.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(open_core()), "compile_model", None)
        again = OpenVinoEngine(bundle, "r16", settings=F32, batch=(3,))
        np.testing.assert_array_equal(again.run(images), first)
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"no model" * 99, b"", content[:-99], flipped):  # compiled and kept anew
        place.write_bytes(damaged)
        again = OpenVinoEngine(bundle, "r16", settings=F32, batch=3)
        np.testing.assert_array_equal(again.run(images), first)
        assert place.stat().st_size == len(content)
        assert place.read_bytes() != damaged


def test_what_is_kept_does_not_grow_for_ever(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    OpenVinoEngine(bundle, "r16", settings=F32)
    (oldest,) = cache.glob("*.blob")
    monkeypatch.setattr(keeping, "LARGEST", oldest.stat().st_size + 1)
    OpenVinoEngine(bundle, "r00", settings=F32)
    (left,) = cache.glob("*.blob")
    assert left != oldest


def test_a_cache_that_can_t_be_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "file"))
    engine = OpenVinoEngine(bundle, "r16", settings=F32)
    assert np.isfinite(engine.run(sample_images(bundle.spec, 2))).all()
