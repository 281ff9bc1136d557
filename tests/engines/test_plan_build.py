"""What we ask of TensorRT's builder, and what is written beside a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import PlanRecord, open_plan, record_path, save_plan
from tocom_export.errors import MissingPackageError, PlanError

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C as a terminal has it; started in the background, Python finds it ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def built(nvidia: Any, bundle: Bundle, target: int = 8, **options: Any) -> tuple[Any, PlanRecord]:
    """What was asked of the builder, and the record."""
    _, record = build_plan(open_library("tensorrt"), bundle, target, PlanOptions(**options))
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


def test_an_int8_weight_is_let_go_with_its_scales(nvidia, plan: BuildPlan, tmp_path: Path):
    int8 = dataclasses.replace(plan, precision="int8")
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
    build_plan(open_library("tensorrt"), bundle, 8, PlanOptions(), lambda *a: seen.append(a))
    assert seen == [("all", step, 4) for step in (1, 2, 3, 4)]

    def interrupted(*_: Any) -> None:
        seen.append(len(seen))
        signal.raise_signal(signal.SIGINT)

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        build_plan(open_library("tensorrt"), bundle, 8, PlanOptions(), interrupted)
    assert seen == [0]  # the library was told at once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupts(_: str) -> None:
    """A message of the library's comes with Ctrl-C: what would be raised here would be lost."""
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_while_the_library_speaks(nvidia, bundle: Bundle):
    library = open_library("tensorrt", interrupts)
    with pytest.raises(KeyboardInterrupt):
        build_plan(library, bundle, 8, PlanOptions())
    assert library.reason("") == "the build was cancelled"
    open_library("tensorrt", lambda _: None)


def test_nvidia_s_own_builder_stops(bundle: Bundle):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    begun: list[Any] = []
    library = open_library("tensorrt-rtx", lambda text: interrupts(text) if begun else None)
    options = PlanOptions(refit="none")
    with pytest.raises(KeyboardInterrupt):
        build_plan(library, bundle, 8, options, lambda *a: begun.append(a))
    assert "cancel" in library.reason("").lower()
    begun.clear()
    assert build_plan(library, bundle, 8, options)[0]


def test_signals_that_somebody_else_handles_are_left_to_them(nvidia, bundle: Bundle):
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        build_plan(open_library("tensorrt", interrupts), bundle, 8, PlanOptions())
    finally:
        signal.signal(signal.SIGINT, before)
        open_library("tensorrt", lambda _: None)
    assert got == [signal.SIGINT]


def test_a_build_beside_the_main_thread(nvidia, bundle: Bundle):
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(build_plan, open_library("tensorrt"), bundle, 8, PlanOptions())
    assert job.result()[1].target == 8


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
    with pytest.raises(PlanError, match="--version-compatible is TensorRT's alone"):
        build_plan(open_library("tensorrt-rtx"), bundle, 8, options)
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
    with pytest.raises(PlanError, match="ahead of time for other machines, with --refit none"):
        build_plan(rtx, bundle, 8, PlanOptions())
    _, record = build_plan(rtx, bundle, 8, PlanOptions(refit="none"))
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
    with pytest.raises(PlanError, match=r"need a folded constant, too, .* --refit none"):
        built(nvidia, bundle, refit=refit)


@pytest.mark.parametrize(
    "options, flag, says",
    [
        ({}, "REFIT_INDIVIDUAL", r"--refit qkv: tensorrt 10\.1\.0 .*10\.2 has.*--refit none"),
        ({"refit": "all"}, "REFIT_INDIVIDUAL", r"--refit all: tensorrt 10\.1\.0 has no"),
        ({"version_compatible": True}, "VERSION_COMPATIBLE", "--version-compatible: tensorrt"),
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


@pytest.mark.parametrize("version", ["8.6.1", "12.0.0", "unknown"])
def test_a_version_that_is_not_known(nvidia, version: str):
    nvidia.trt.__version__ = version
    with pytest.raises(PlanError, match=rf"tensorrt {version} is installed; 10\.0 to 11\.x"):
        open_library("tensorrt")


def test_rtx_before_what_we_use(nvidia):
    nvidia.rtx.__version__ = "1.6.0.5"
    with pytest.raises(PlanError, match=r"tensorrt_rtx 1\.6\.0\.5 is installed; 1\.7 to 1\.x"):
        open_library("tensorrt-rtx")


@pytest.mark.parametrize(
    "content, says",
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("raise OSError('libnvinfer.so.10: no such file')", "libnvinfer.so.10: no such file"),
        ("raise ImportError('libcudart.so.13: not found')", "libcudart.so.13: not found"),
    ],
)
def test_a_library_that_can_t_be_loaded(tmp_path: Path, monkeypatch, content: str, says: str):
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(PlanError, match="tensorrt is installed, but can't be loaded") as caught:
        open_library("tensorrt")
    assert says in str(caught.value)
    assert "pip install --force-reinstall 'tocom-export[tensorrt]'" in str(caught.value)


@pytest.mark.parametrize("library, extra", [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_library_that_is_not_installed(monkeypatch, library: Any, extra: str):
    monkeypatch.setitem(sys.modules, library.replace("-", "_"), None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'tocom-export\[{extra}\]'"):
        open_library(library)


def test_the_record(nvidia, bundle: Bundle, tmp_path: Path):
    content, record = build_plan(open_library("tensorrt"), bundle, 8, PlanOptions(batch=(2, 4, 6)))
    save_plan(tmp_path / "r08.plan", content, record)
    assert open_plan(tmp_path / "r08.plan") == (content, record)
    data = json.loads((tmp_path / "r08.plan.json").read_text())
    assert data["sha256"] == hashlib.sha256(content).hexdigest()
    assert (data["target"], data["source"], data["scale"]) == (8, 0, 0.1)
    assert (data["library"], data["version"]) == ("tensorrt", "10.13.3")
    assert (data["gpu"], data["compute_capability"]) == ("Pretended GPU", [8, 9])
    assert (data["precision"], data["batch"], data["refit"]) == ("fp32", [2, 4, 6], "qkv")
    assert data["compensated"] is True


def saved(nvidia: Any, bundle: Bundle, folder: Path) -> Path:
    content, record = build_plan(open_library("tensorrt"), bundle, 8, PlanOptions())
    save_plan(folder / "r08.plan", content, record)
    return folder / "r08.plan"


def test_a_plan_without_its_record(nvidia, bundle: Bundle, tmp_path: Path):
    plan = saved(nvidia, bundle, tmp_path)
    record_path(plan).unlink()
    with pytest.raises(PlanError, match=r"has no r08\.plan\.json beside it"):
        open_plan(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9}, {"spec": {}}, {"library": "other"}, {"precision": "fp8"}, {"batch": [1]},
        {"refittable": 3}, {"compute_capability": "8.9"}, {"target": "8"}, {"target": 999},
        {"target": True}, {"source": None}, {"source": 8.0}, {"scale": "x"}, {"scale": -1},
        {"scale": float("nan")}, {"compensated": 1}, {"stripped": "yes"}, {"refit": "some"},
        {"refit": []}, {"batch": [1, 8, 4]}, {"batch": ["1", "8", "32"]}, {"gpu": 4},
        {"compute_capability": [8, "9"]}, {"flags": "STRIP_PLAN"}, {"flags": [1]}, {"version": 10},
        {"refittable": {"a": ["x", "float32"]}}, {"refittable": {"a": [[3], "float8"]}},
        {"proportional": None}, {"fixed": 0}, {"sha256": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record(nvidia, bundle: Bundle, tmp_path: Path, change: dict[str, Any]):
    plan = saved(nvidia, bundle, tmp_path)
    file = record_path(plan)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(PlanError, match=r"r08\.plan\.json can't be understood"):
        open_plan(plan)


def test_a_record_that_is_no_json(nvidia, bundle: Bundle, tmp_path: Path):
    plan = saved(nvidia, bundle, tmp_path)
    for text in ("", "{", "[]", "null", "[" * 100_000):
        record_path(plan).write_text(text)
        with pytest.raises(PlanError, match="can't be understood"):
            open_plan(plan)


def test_a_damaged_plan(nvidia, bundle: Bundle, tmp_path: Path):
    plan = saved(nvidia, bundle, tmp_path)
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(PlanError, match=r"is damaged, or r08\.plan\.json is another plan's"):
        open_plan(plan)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_broken_off_write_leaves_a_plan_and_what_describes_it(
    nvidia, bundle: Bundle, tmp_path: Path, monkeypatch, stop_after: int
):
    plan = saved(nvidia, bundle, tmp_path)
    content, old = open_plan(plan)
    other = content + b"other"
    new = dataclasses.replace(old, source=4, sha256=hashlib.sha256(other).hexdigest())
    import tocom_export.engines.tensorrt.plan as module

    write, count = module.replaced, iter(range(9))

    def breaking(path: Path) -> Any:
        if next(count) == stop_after:
            raise OSError("killed")
        return write(path)

    monkeypatch.setattr(module, "replaced", breaking)
    with pytest.raises(OSError, match="killed"):
        save_plan(plan, other, new)
    assert open_plan(plan) == ((content, old) if stop_after < 2 else (other, new))
    monkeypatch.setattr(module, "replaced", write)
    save_plan(plan, content, old)
    assert open_plan(plan) == (content, old)


def test_a_damaged_record_is_written_over(nvidia, bundle: Bundle, tmp_path: Path):
    plan = saved(nvidia, bundle, tmp_path)
    content, record = open_plan(plan)
    for text in ("{", "[]", "{}"):
        record_path(plan).write_text(text)
        save_plan(plan, content, record)
        assert open_plan(plan) == (content, record)


def test_messages_of_the_library(nvidia):
    told: list[str] = []
    library = open_library("tensorrt", told.append)
    library.logger.log("INFO", "fine")
    library.logger.log("VERBOSE", "too much")
    library.logger.log("ERROR", "not\n  fine.")
    assert told == ["fine"]
    assert library.reason("nothing") == "not fine"
    open_library("tensorrt").logger.log("WARNING", "slow")  # as an engine does that is opened
    assert told == ["fine", "slow"]
