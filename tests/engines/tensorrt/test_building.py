"""What we ask of TensorRT's builder."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import PlanRecord
from tocom_export.errors import DegreeError, PlanError

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C as a terminal has it; started in the background, Python finds it ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def built(nvidia: Any, bundle: Bundle, name: str = "r08", **options: Any) -> tuple[Any, PlanRecord]:
    """What was asked of the builder, and the record."""
    library, wanted = open_library("tensorrt"), PlanOptions(**options)
    _, record = build_plan(library, bundle, bundle.variant(name), wanted)
    return next(asked for kind, *(asked) in nvidia.trt.asked[::-1] if kind == "build")[0], record


def test_the_graph_decides_the_types_and_only_the_qkv_weights_are_let_go(nvidia, bundle: Bundle):
    asked, record = built(nvidia, bundle)
    assert ("network", 1 << 1) in nvidia.trt.asked  # STRONGLY_TYPED
    assert asked["graph"] == "r08.onnx"
    assert asked["flags"] == ["REFIT_INDIVIDUAL"]
    assert sorted(asked["marked"]) == QKV == sorted(record.refittable)
    assert asked["shapes"] == ("images", (1, 3, 56, 56), (8, 3, 56, 56), (32, 3, 56, 56))
    assert asked["hardware"] == "NONE"
    assert asked["tf32"] is False
    assert record.refittable[QKV[0]].shape == (192, 64)
    assert record.refittable[QKV[0]].dtype == "float32"


@pytest.mark.parametrize(
    "options, flags",
    [
        ({"refit": "none"}, []),
        ({"strip": True}, ["REFIT_INDIVIDUAL", "STRIP_PLAN"]),
        ({"refit": "all"}, ["REFIT_INDIVIDUAL"]),
        ({"version_compatible": True}, ["REFIT_INDIVIDUAL", "VERSION_COMPATIBLE"]),
    ],
    ids=str,
)
def test_flags(nvidia, bundle: Bundle, options: dict[str, Any], flags: list[str]):
    asked, record = built(nvidia, bundle, **options)
    assert asked["flags"] == flags == list(record.flags)
    whole = set(bundle.spec.weights())
    assert set(asked["marked"]) == {"none": set(), "all": whole}.get(record.refit, set(QKV))
    assert record.stripped == bool(options.get("strip"))


def test_any_gpu_since_ampere(nvidia, bundle: Bundle):
    asked, record = built(nvidia, bundle, hardware_compatible=True)
    assert asked["hardware"] == "AMPERE_PLUS"
    assert "AMPERE_PLUS" in record.flags


def test_a_degree_for_each_layer(nvidia, mixed: Bundle):
    asked, record = built(nvidia, mixed, "fast")
    assert asked["graph"] == "fast.onnx"
    assert sorted(asked["marked"]) == QKV == sorted(record.refittable)
    assert record.variant == mixed.variant("fast")
    assert (record.variant.degrees, record.variant.degree) == ((20, 3, 0, 7), None)
    _, whole = built(nvidia, mixed, "fast", refit="all")
    assert set(whole.refittable) == set(mixed.spec.weights())
    assert record.fixed == built(nvidia, mixed, "r08")[1].fixed  # what the variants share


def test_a_variant_that_the_bundle_lacks(nvidia, bundle: Bundle, mixed: Bundle):
    library = open_library("tensorrt")
    with pytest.raises(DegreeError, match="has no variant fast; it has r00, r08, r16"):
        build_plan(library, bundle, mixed.variant("fast"), PlanOptions())


def test_an_int8_weight_is_let_go_with_its_scales(
    nvidia, blueprint: Blueprint, tmp_path: Path, revise: Callable[..., Blueprint]
):
    int8 = revise(blueprint, precision="int8")
    scales = {f"blocks.{i}.{part}": 0.05 for i in range(1, 4) for part in
              ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    bundle = write_bundle(int8, tmp_path / "int8", calibrate=lambda *_: scales)
    _, record = built(nvidia, bundle)
    assert sorted(record.refittable) == sorted([*QKV, *(f"{name}_scale" for name in QKV[1:])])
    assert [record.refittable[name].dtype for name in QKV] == ["float32", *["int8"] * 3]


def test_timings_are_kept_for_the_next_build(nvidia, bundle: Bundle, tmp_path: Path):
    cache = tmp_path / "timings"
    built(nvidia, bundle, timing_cache=cache)
    assert cache.read_bytes() == b"timings"
    cache.write_bytes(b"broken")
    built(nvidia, bundle, timing_cache=cache)
    assert cache.read_bytes() == b"timings"
    assert {entry for entry in nvidia.trt.asked if entry[0] == "cache"} == {("cache", False)}


def test_progress_and_an_interrupt(nvidia, bundle: Bundle):
    seen: list[Any] = []
    build_plan(
        open_library("tensorrt"),
        bundle,
        bundle.variant("r08"),
        PlanOptions(),
        lambda *a: seen.append(a),
    )
    assert seen == [("all", step, 4) for step in (1, 2, 3, 4)]

    def interrupted(*_: Any) -> None:
        seen.append(len(seen))
        signal.raise_signal(signal.SIGINT)

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        build_plan(
            open_library("tensorrt"), bundle, bundle.variant("r08"), PlanOptions(), interrupted
        )
    assert seen == [0]  # the library was told at once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupts(_: str) -> None:
    """A message of the library's comes with Ctrl-C: what would be raised here would be lost."""
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_while_the_library_speaks(nvidia, bundle: Bundle):
    library = open_library("tensorrt", interrupts)
    with pytest.raises(KeyboardInterrupt):
        build_plan(library, bundle, bundle.variant("r08"), PlanOptions())
    assert library.reason("") == "the build was cancelled"
    open_library("tensorrt", lambda _: None)


def test_nvidia_s_own_builder_stops(bundle: Bundle):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    begun: list[Any] = []
    library = open_library("tensorrt-rtx", lambda text: interrupts(text) if begun else None)
    options = PlanOptions(refit="none")
    with pytest.raises(KeyboardInterrupt):
        build_plan(library, bundle, bundle.variant("r08"), options, lambda *a: begun.append(a))
    assert "cancel" in library.reason("").lower()
    begun.clear()
    assert build_plan(library, bundle, bundle.variant("r08"), options)[0]


def test_signals_that_somebody_else_handles_are_left_to_them(nvidia, bundle: Bundle):
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        build_plan(
            open_library("tensorrt", interrupts), bundle, bundle.variant("r08"), PlanOptions()
        )
    finally:
        signal.signal(signal.SIGINT, before)
        open_library("tensorrt", lambda _: None)
    assert got == [signal.SIGINT]


def test_a_build_beside_the_main_thread(nvidia, bundle: Bundle):
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            build_plan, open_library("tensorrt"), bundle, bundle.variant("r08"), PlanOptions()
        )
    assert job.result()[1].variant == bundle.variant("r08")


@pytest.mark.parametrize(
    "step, says",
    [
        ("parse", r"r08\.onnx: tensorrt's parser refuses it \(an operator it doesn't know\)"),
        ("mark", r"r08\.onnx: tensorrt can't refit blocks\.0"),
        ("build", r"r08\.onnx: tensorrt can't build it \(out of memory\)"),
    ],
)
def test_what_the_library_refuses(nvidia, bundle: Bundle, step: str, says: str):
    nvidia.trt.refuses.add(step)
    with pytest.raises(PlanError, match=says):
        built(nvidia, bundle)


@pytest.mark.parametrize("step", ["parse", "mark", "build"])
def test_a_bundle_that_is_not_finished_is_not_named(nvidia, bundle: Bundle, step: str):
    """Its folder is gone by the time somebody reads this."""
    nvidia.trt.refuses.add(step)
    with pytest.raises(PlanError, match=r"^r08\.onnx: "):
        built(nvidia, bundle)


def test_version_compatible_plans_are_tensorrt_s_alone(nvidia, bundle: Bundle):
    options = PlanOptions(refit="none", version_compatible=True)
    with pytest.raises(PlanError, match="`version_compatible` is TensorRT's alone"):
        build_plan(open_library("tensorrt-rtx"), bundle, bundle.variant("r08"), options)
    assert nvidia.rtx.asked == []


def test_without_a_gpu(nvidia, bundle: Bundle, monkeypatch):
    nvidia.cuda.gpus = 0
    with pytest.raises(
        PlanError, match=r"no GPU that CUDA can use \(it counts no device\)\. TensorRT"
    ):
        built(nvidia, bundle)
    monkeypatch.setattr(type(nvidia.cuda), "cudaGetDeviceCount", lambda _: (35, None))
    with pytest.raises(PlanError, match=r"with a driver for CUDA 12: pip install 'cuda-python<13'"):
        built(nvidia, bundle)
    rtx = open_library("tensorrt-rtx")
    with pytest.raises(PlanError, match="ahead of time for other machines, with `refit` none"):
        build_plan(rtx, bundle, bundle.variant("r08"), PlanOptions())
    _, record = build_plan(rtx, bundle, bundle.variant("r08"), PlanOptions(refit="none"))
    assert (record.gpu, record.compute_capability) == (None, None)


def test_weights_that_the_library_folded(nvidia, bundle: Bundle):
    nvidia.trt.hides = {"pos_embed", "cls_token"}
    _, record = built(nvidia, bundle, refit="all")
    assert set(record.refittable) == set(bundle.spec.weights()) - nvidia.trt.hides
    nvidia.trt.hides = {QKV[1]}
    with pytest.raises(PlanError, match=r"can't exchange blocks\.1\.attn\.qkv\.weight"):
        built(nvidia, bundle)


@pytest.mark.parametrize("refit", ["qkv", "all"])
def test_a_plan_that_asks_for_more_than_was_marked(nvidia, bundle: Bundle, refit: str):
    nvidia.trt.adds = {"a folded constant"}
    with pytest.raises(PlanError, match=r"asks for a folded constant, too, .* `refit` none"):
        built(nvidia, bundle, refit=refit)


@pytest.mark.parametrize(
    "options, flag, says",
    [
        ({}, "REFIT_INDIVIDUAL", r"`refit` qkv: tensorrt 10\.1\.0 .*10\.2 has.*`refit` none"),
        ({"refit": "all"}, "REFIT_INDIVIDUAL", r"`refit` all: tensorrt 10\.1\.0 has no"),
        ({"version_compatible": True}, "VERSION_COMPATIBLE", "`version_compatible`: tensorrt"),
    ],
    ids=str,
)
def test_a_flag_that_the_library_lacks(
    nvidia, bundle: Bundle, monkeypatch, options: dict[str, Any], flag: str, says: str
):
    """10.0 and 10.1 can't mark single weights."""
    nvidia.trt.__version__ = "10.1.0"
    monkeypatch.delattr(nvidia.trt.BuilderFlag, flag)
    with pytest.raises(PlanError, match=says):
        built(nvidia, bundle, **options)
    assert nvidia.trt.asked == []  # said before any work
    assert built(nvidia, bundle, refit="none")[1].version == "10.1.0"
