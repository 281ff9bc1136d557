"""Other weights in engines: TensorRT's by a stand-in, ONNX Runtime's for real."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.opening import Bundle, Refitted
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.refit import NewWeights, refit_graph, refit_plan
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.errors import CheckFailed, CheckpointError, DeviceError, ImageError, PlanError
from tocom_export.model.spec import VitSpec

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]


def planned(bundle: Bundle, target: int = 8, **options: Any) -> Path:
    content, record = build_plan(open_library("tensorrt"), bundle, target, PlanOptions(**options))
    plan = bundle.path / f"r{target:02d}.plan"
    save_plan(plan, content, record)
    return plan


def new_weights(plan: BuildPlan, source: int = 0, scale: float = 0.1) -> NewWeights:
    return NewWeights(plan.checkpoint, plan.bank, source, scale)


def test_an_engine_runs_batches_of_any_size(nvidia, fresh: Bundle, make_images):
    engine = TensorRtEngine(planned(fresh, batch=(1, 4, 8)))
    images = make_images(fresh.spec, 8)
    whole = engine.run(images)
    assert whole.shape == (8, 10)
    for batch in (8, 1, 3, 3, 3, 8):  # a graph is recorded for a shape, and launched until the next
        np.testing.assert_array_equal(engine.run(images[:batch]), whole[:batch])
    assert nvidia.cuda.calls.count("cudaGraphInstantiate") == 4
    assert nvidia.cuda.calls.count("cudaGraphLaunch") == 3
    assert nvidia.cuda.calls.count("cudaGraphExecDestroy") == 3
    assert engine.target == 8


def test_what_lies_on_the_gpu_is_run_again(nvidia, fresh: Bundle, make_images):
    """Without copies, by a graph of its own; runs from the host go on as before."""
    engine = TensorRtEngine(planned(fresh, batch=(2, 4, 8)))
    images = make_images(fresh.spec, 4)
    before = engine.run(images)
    nvidia.cuda.calls.clear()
    for _ in range(3):
        engine.run_again(4)
    assert "cudaMemcpyAsync" not in nvidia.cuda.calls
    assert nvidia.cuda.calls.count("cudaGraphLaunch") == 2
    np.testing.assert_array_equal(engine.run(images[::-1]), before[::-1])
    np.testing.assert_array_equal(engine.run(images), before)
    for batch in (1, 9):
        with pytest.raises(ImageError, match=f"a batch of {batch}; the plan takes 2 to 8"):
            engine.run_again(batch)


def test_without_cuda_graphs(nvidia, fresh: Bundle, make_images):
    engine = TensorRtEngine(planned(fresh), cuda_graphs=False)
    images = make_images(fresh.spec, 2)
    np.testing.assert_array_equal(engine.run(images), engine.run(images))
    assert "cudaStreamBeginCapture" not in nvidia.cuda.calls


@pytest.mark.parametrize(
    "step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_an_engine_that_can_t_be_captured(nvidia, fresh: Bundle, make_images, step: str):
    engine = TensorRtEngine(planned(fresh))
    images = make_images(fresh.spec, 2)
    nvidia.cuda.fails = step
    first = engine.run(images)
    assert "cudaGetLastError" in nvidia.cuda.calls
    np.testing.assert_array_equal(engine.run(images), first)
    assert "cudaGraphLaunch" not in nvidia.cuda.calls


def test_rtx_captures_by_itself(nvidia, fresh: Bundle, make_images):
    content, record = build_plan(open_library("tensorrt-rtx"), fresh, 8, PlanOptions())
    save_plan(fresh.path / "r08.plan", content, record)
    engine = TensorRtEngine(fresh.path / "r08.plan")
    images = make_images(fresh.spec, 2)
    np.testing.assert_array_equal(engine.run(images), engine.run(images))
    assert "cudaStreamBeginCapture" not in nvidia.cuda.calls
    assert ("context", "WHOLE") in nvidia.rtx.asked
    assert ("kernels", "EAGER") in nvidia.rtx.asked  # none that are exchanged in the midst of a run
    TensorRtEngine(fresh.path / "r08.plan", cuda_graphs=False)
    assert ("context", "DISABLED") in nvidia.rtx.asked


def test_a_batch_below_the_smallest_is_filled_up(nvidia, fresh: Bundle, make_images):
    engine = TensorRtEngine(planned(fresh, batch=(4, 4, 8)))
    images = make_images(fresh.spec, 6)
    whole = engine.run(images)
    np.testing.assert_array_equal(engine.run(images[:3]), whole[:3])
    shapes = [shape[0] for kind, *rest in nvidia.trt.asked if kind == "shape" for shape in rest]
    assert shapes == [6, 4]


def test_a_batch_that_the_plan_doesn_t_take(nvidia, fresh: Bundle, make_images):
    engine = TensorRtEngine(planned(fresh, batch=(2, 3, 4)))
    with pytest.raises(ImageError, match="a batch of 5 images; the plan takes 4 at most"):
        engine.run(make_images(fresh.spec, 5))
    with pytest.raises(ImageError, match="B ≥ 1"):
        engine.run(make_images(fresh.spec, 5)[:0])


def test_images_of_another_form(nvidia, fresh: Bundle):
    engine = TensorRtEngine(planned(fresh))
    with pytest.raises(ImageError, match=r"\(1, 3, 8, 8\)"):
        engine.run(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ImageError, match="float64"):
        engine.run(np.zeros((1, 3, 56, 56)))  # type: ignore[arg-type]


def test_errors_of_the_gpu(nvidia, fresh: Bundle, make_images):
    plan = planned(fresh)
    nvidia.cuda.fails = "cudaMalloc"
    with pytest.raises(DeviceError, match=r"CUDA: out of memory \(cudaMalloc\); lower the batch"):
        TensorRtEngine(plan)
    nvidia.cuda.fails = ""
    nvidia.trt.refuses.add("context")
    with pytest.raises(DeviceError, match="gets no context"):
        TensorRtEngine(plan)
    nvidia.cuda.gpus = 0
    with pytest.raises(DeviceError, match="no GPU that CUDA can use"):
        TensorRtEngine(plan)


def test_a_plan_of_another_gpu_and_version(nvidia, fresh: Bundle):
    plan = planned(fresh)
    nvidia.trt.refuses.add("deserialize")
    nvidia.trt.__version__ = "10.14.0"
    nvidia.cuda.capability = (9, 0)
    says = r"built by tensorrt 10\.13\.3, this is 10\.14\.0; built for Pretended GPU, this is"
    with pytest.raises(PlanError, match=says) as caught:
        TensorRtEngine(plan)
    assert "no reason" not in str(caught.value)


def test_what_the_library_says_of_a_plan_that_it_refuses(nvidia, fresh: Bundle, monkeypatch):
    """What differs need not be why."""
    plan = planned(fresh)
    nvidia.trt.__version__ = "10.14.0"
    library = open_library("tensorrt")

    def refuse(content: bytes) -> None:
        library.logger.log("ERROR", "out of memory")

    made = SimpleNamespace(deserialize_cuda_engine=refuse)
    monkeypatch.setattr(nvidia.trt, "Runtime", lambda _: made)
    with pytest.raises(PlanError, match=r"this is 10\.14\.0; out of memory\); build it here"):
        TensorRtEngine(plan)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_plan_for_one_batch_alone(nvidia, fresh: Bundle, make_images, fixed: bool):
    nvidia.trt.fixes_batch = fixed
    engine = TensorRtEngine(planned(fresh, batch=(8, 8, 8)))
    assert engine.run(make_images(fresh.spec, 3)).shape == (3, 10)


@pytest.mark.parametrize("step", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"])
def test_what_was_begun_ends_before_the_next_run(nvidia, fresh: Bundle, make_images, step: str):
    engine = TensorRtEngine(planned(fresh))
    images = make_images(fresh.spec, 2)
    before = engine.run(images)
    nvidia.cuda.fails = step
    nvidia.cuda.calls.clear()
    with pytest.raises(DeviceError):
        engine.run(images if step == "cudaGraphLaunch" else images[:1])
    assert nvidia.cuda.calls[-1] == "cudaStreamSynchronize"
    nvidia.cuda.fails = ""
    np.testing.assert_array_equal(engine.run(images), before)


def test_code_that_a_plan_brings_along_must_be_allowed(nvidia, fresh: Bundle):
    plan = planned(fresh, version_compatible=True)
    nvidia.trt.asked.clear()
    with pytest.raises(PlanError, match=r"brings code along.*--host-code"):
        TensorRtEngine(plan)
    assert nvidia.trt.asked == []
    TensorRtEngine(plan, host_code=True)
    TensorRtEngine(planned(fresh))
    asked = [entry[1] for entry in nvidia.trt.asked if entry[0] == "deserialize"]
    assert (asked[0], asked[-1]) == (True, False)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": (1, 8, 64)}, {"spec": {"classes": 11}}, {"spec": {"image_size": [64, 64]}},
        {"spec": {"channels": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_asks_for_other_buffers(nvidia, fresh: Bundle, change: dict[str, Any]):
    plan = planned(fresh)
    content, record = open_plan(plan)
    if "spec" in change:
        spec = VitSpec.from_json({**record.spec.to_json(), **change["spec"]})
        change = {"spec": spec}
    save_plan(plan, content, dataclasses.replace(record, **change))
    with pytest.raises(PlanError, match="the two are not of one build"):
        TensorRtEngine(plan)


def test_there_and_back(nvidia, fresh: Bundle, plan: BuildPlan, make_images):
    """A → B → A gives the very outputs of A; every marked weight is set each time."""
    engine = TensorRtEngine(planned(fresh))
    images = make_images(fresh.spec, 3)
    before = engine.run(images)
    engine.run(images)  # by graph
    first = {name: fresh.tensors(8)[name] for name in QKV}
    engine.refit(new_weights(plan, source=16).at(fresh.spec, 8, "fp32"))
    assert not np.array_equal(engine.run(images), before)
    engine.refit(first)
    np.testing.assert_array_equal(engine.run(images), before)
    refits = [names for kind, *names in nvidia.trt.asked if kind == "refit"]
    assert refits == [[QKV], [QKV]]
    assert {entry[2] for entry in nvidia.trt.asked if entry[0] == "set"} == {"HOST"}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: w.pop(QKV[2]), r"weights for blocks\.2\.attn\.qkv\.weight are missing \(1"),
        (
            lambda w: w.update({QKV[1]: w[QKV[1]][:5]}),
            r"float32 of shape \(5, 64\); the plan takes",
        ),
        (lambda w: w.update({QKV[0]: w[QKV[0]].astype(np.float16)}), r"is float16 of shape"),
    ],
)
def test_weights_of_another_form(
    nvidia, fresh: Bundle, make_images, change: Callable[..., Any], says: str
):
    engine = TensorRtEngine(planned(fresh))
    images = make_images(fresh.spec)
    before = engine.run(images)
    weights = {name: fresh.tensors(8)[name] for name in QKV}
    change(weights)
    with pytest.raises(PlanError, match=says):
        engine.refit(weights)
    np.testing.assert_array_equal(engine.run(images), before)  # nothing was touched


def test_a_half_refitted_engine_is_not_run(nvidia, fresh: Bundle, make_images):
    engine = TensorRtEngine(planned(fresh))
    nvidia.trt.refuses.add("refit")
    weights = {name: fresh.tensors(8)[name] for name in QKV}
    with pytest.raises(PlanError, match="tensorrt can't refit it"):
        engine.refit(weights)
    with pytest.raises(PlanError, match="a refit failed, and left the engine with mixed weights"):
        engine.run(make_images(fresh.spec))
    nvidia.trt.refuses.clear()
    engine.refit(weights)
    engine.run(make_images(fresh.spec))


def test_no_refit_while_inference_is_in_flight(nvidia, fresh: Bundle, make_images, monkeypatch):
    engine = TensorRtEngine(planned(fresh), cuda_graphs=False)
    weights = {name: fresh.tensors(8)[name] for name in QKV}
    seen: list[str] = []

    def meanwhile(stream: int) -> Any:
        for action in (lambda: engine.refit(weights), engine.serialize):
            with pytest.raises(PlanError, match="inference is in flight") as caught:
                action()
            seen.append(str(caught.value))
        return (0,)

    monkeypatch.setattr(type(nvidia.cuda), "cudaStreamSynchronize", lambda self, s: meanwhile(s))
    engine.run(make_images(fresh.spec))
    assert len(seen) == 2


def test_what_the_engine_and_its_record_say_must_agree(nvidia, fresh: Bundle, make_images):
    plan = planned(fresh)
    content, record = open_plan(plan)
    known = dict(record.refittable)
    first = known.pop(QKV[0])
    for refittable, says in (
        (known, r"the engine wants blocks\.0\.attn\.qkv\.weight, unlike the plan's JSON"),
        ({**record.refittable, "z": first}, r"the engine doesn't know z"),
        ({**known, QKV[0]: dataclasses.replace(first, shape=(3, 64))}, "not of one build"),
    ):
        save_plan(plan, content, dataclasses.replace(record, refittable=refittable))
        engine = TensorRtEngine(plan)
        weights = {name: fresh.tensors(8)[name] for name in QKV}
        weights["z"] = weights[QKV[0]]
        weights[QKV[0]] = weights[QKV[0]][: refittable.get(QKV[0], first).shape[0]]
        with pytest.raises(PlanError, match=says):
            engine.refit(weights)


def test_a_stripped_plan_runs_once_it_is_refitted(
    nvidia, fresh: Bundle, plan: BuildPlan, make_images
):
    images = make_images(fresh.spec, 2)
    wanted = TensorRtEngine(planned(fresh)).run(images)
    stripped = planned(fresh, strip=True)
    size = stripped.stat().st_size
    with pytest.raises(PlanError, match="stripped of its weights; tocom-export refit"):
        TensorRtEngine(stripped).run(images)
    refit_plan(stripped, new_weights(plan), stripped)
    assert stripped.stat().st_size > size
    engine = TensorRtEngine(stripped)
    assert not engine.record.stripped
    np.testing.assert_array_equal(engine.run(images), wanted)


def test_a_refitted_plan_can_be_refitted_again(nvidia, fresh: Bundle, plan: BuildPlan, make_images):
    images = make_images(fresh.spec, 2)
    file = planned(fresh)
    before = TensorRtEngine(file).run(images)
    out = fresh.path / "other.plan"
    changed = refit_plan(file, new_weights(plan, source=4, scale=0.05), out)
    assert (changed.source, changed.scale, changed.target) == (4, 0.05, 8)
    assert open_plan(out)[1] == changed
    np.testing.assert_array_equal(TensorRtEngine(file).run(images), before)
    assert not np.array_equal(TensorRtEngine(out).run(images), before)
    refit_plan(out, new_weights(plan), out)
    np.testing.assert_array_equal(TensorRtEngine(out).run(images), before)
    assert ("serialize", ["INCLUDE_REFIT"]) in nvidia.trt.asked  # with weights, and refittable


def test_before_10_14_a_saved_refit_may_be_the_last(
    nvidia, fresh: Bundle, plan: BuildPlan, monkeypatch
):
    monkeypatch.delattr(nvidia.trt.SerializationFlag, "INCLUDE_REFIT")
    file = planned(fresh)
    refit_plan(file, new_weights(plan, source=4), file)
    assert ("serialize", "plainly") in nvidia.trt.asked
    assert open_plan(file)[1].refit == "qkv"  # this one came out refittable
    stripped = planned(fresh, 16, strip=True)
    engine = TensorRtEngine(stripped)
    engine.refit({name: fresh.tensors(16)[name] for name in QKV})
    engine.serialize()
    assert nvidia.trt.asked[-1] == ("serialize", [])

    monkeypatch.setattr(TensorRtEngine, "refittable", False)
    changed = refit_plan(file, new_weights(plan), file)
    assert (changed.refit, changed.refittable) == ("none", {})
    with pytest.raises(PlanError, match="--refit none"):
        refit_plan(file, new_weights(plan), file)


def test_an_engine_that_the_library_can_t_refit(nvidia, fresh: Bundle):
    engine = TensorRtEngine(planned(fresh))
    engine._engine.refittable = False
    with pytest.raises(PlanError, match="can't refit this plan"):
        engine.refit({name: fresh.tensors(8)[name] for name in QKV})


def test_a_plan_that_lets_nothing_go(nvidia, fresh: Bundle, plan: BuildPlan):
    with pytest.raises(PlanError, match="--refit none; build it with --refit qkv"):
        refit_plan(planned(fresh, refit="none"), new_weights(plan), fresh.path / "out.plan")


@pytest.fixture
def other(plan: BuildPlan, tmp_path: Path) -> Callable[..., NewWeights]:
    """Weights of a checkpoint in which some tensors are others."""

    def make(*names: str) -> NewWeights:
        tensors = {name: np.array(tensor) for name, tensor in plan.checkpoint.tensors.items()}
        for name in names:
            tensors[name] *= np.float32(1.5)
        save_file(tensors, tmp_path / "other.safetensors")
        return NewWeights(Checkpoint.open(tmp_path / "other.safetensors"), plan.bank, 0, 0.1)

    return make


def test_another_model_in_a_plan(nvidia, fresh: Bundle, other, make_images):
    images = make_images(fresh.spec)
    plan = planned(fresh)
    before = TensorRtEngine(plan).run(images)
    refit_plan(plan, other(*QKV), plan)
    assert not np.array_equal(TensorRtEngine(plan).run(images), before)
    content = plan.read_bytes()
    with pytest.raises(PlanError, match=r"differ from those of .*r08\.plan .* --refit all"):
        refit_plan(plan, other(*QKV, "head.weight"), plan)
    assert plan.read_bytes() == content
    refit_plan(planned(fresh, refit="all"), other(*QKV, "head.weight"), plan)


def test_a_model_with_other_classes(nvidia, fresh: Bundle, plan: BuildPlan, tmp_path: Path):
    tensors = dict(plan.checkpoint.tensors)
    tensors["head.weight"] = np.ones((4, 64), np.float32)
    tensors["head.bias"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "four.safetensors")
    new = NewWeights(Checkpoint.open(tmp_path / "four.safetensors"), None, 0, 0.1)
    with pytest.raises(CheckpointError, match="has 4 classes, the engine 10"):
        refit_plan(planned(fresh), new, fresh.path / "r08.plan")


def test_what_is_checked_is_what_is_written(
    nvidia, fresh: Bundle, plan: BuildPlan, make_images, monkeypatch
):
    """A library may run what it refitted, and save something else."""
    images = make_images(fresh.spec, 2)
    file = planned(fresh)
    content, before = file.read_bytes(), TensorRtEngine(file).run(images)
    seen: list[Any] = []
    new = new_weights(plan, source=4)
    refit_plan(file, new, file, lambda engine: seen.append(engine.run(images)))
    np.testing.assert_array_equal(TensorRtEngine(file).run(images), seen[0])
    monkeypatch.setattr(TensorRtEngine, "serialize", lambda _: content)
    refit_plan(file, new, fresh.path / "r16.plan", lambda engine: seen.append(engine.run(images)))
    np.testing.assert_array_equal(seen[1], before)


def test_a_failed_check_leaves_the_files_as_they_were(nvidia, fresh: Bundle, plan: BuildPlan):
    def fails(*_: Any) -> None:
        raise CheckFailed("no")

    file = planned(fresh)
    names = ("r08.plan", "r08.plan.json", "r08.safetensors", "manifest.json")
    before = {name: (fresh.path / name).read_bytes() for name in names}
    with pytest.raises(CheckFailed):
        refit_plan(file, new_weights(plan, source=4), file, fails)
    with pytest.raises(CheckFailed):
        refit_graph(fresh, 8, new_weights(plan, source=4), fails)
    assert {name: (fresh.path / name).read_bytes() for name in names} == before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_onnx_engine_is_what_a_new_build_would_be(
    plan: BuildPlan, tmp_path: Path, make_images, precision: Any
):
    plan = dataclasses.replace(plan, precision=precision, targets=(8, 16))
    bundle = write_bundle(plan, tmp_path / "bundle")
    images = make_images(bundle.spec, 3)
    engine, beside = OnnxEngine(bundle, 8), OnnxEngine(bundle, 16)
    before, other = engine.run(images), beside.run(images)
    graph = bundle.graph(8).read_bytes()

    changed = refit_graph(bundle, 8, new_weights(plan, source=4, scale=0.05))

    built = write_bundle(dataclasses.replace(plan, source=4, scale=0.05), tmp_path / "built")
    fresh, wanted = (load_file(b.path / "r08.safetensors") for b in (bundle, built))
    assert fresh.keys() == wanted.keys()
    assert all(np.array_equal(fresh[name], wanted[name]) for name in wanted)
    assert bundle.graph(8).read_bytes() == graph
    np.testing.assert_array_equal(engine.run(images), before)  # open engines go on as they were
    engine.reload()
    np.testing.assert_array_equal(engine.run(images), OnnxEngine(built, 8).run(images))
    assert not np.array_equal(engine.run(images), before)
    beside.reload()
    np.testing.assert_array_equal(beside.run(images), other)

    opened = Bundle.open(bundle.path, hashes=True)
    assert opened == dataclasses.replace(changed, path=bundle.path)
    assert opened.refitted[8] == Refitted(4, 0.05, compensated=True)

    refit_graph(opened, 8, new_weights(plan))
    engine.reload()
    np.testing.assert_array_equal(engine.run(images), before)


def test_an_onnx_engine_at_its_own_source(fresh: Bundle, plan: BuildPlan):
    refit_graph(fresh, 8, new_weights(plan, source=8))
    assert Bundle.open(fresh.path).refitted[8] == Refitted(8, 0.1, compensated=False)


def test_an_onnx_engine_without_a_bank(fresh: Bundle, plan: BuildPlan):
    refit_graph(fresh, 8, NewWeights(plan.checkpoint, None, 4, 0.05))
    assert Bundle.open(fresh.path).refitted[8] == Refitted(4, 0.05, compensated=False)
    file = fresh.path / "manifest.json"
    data = json.loads(file.read_text())
    del data["refitted"]["8"]["compensated"]  # as manifests were written before it was known
    file.write_text(json.dumps(data))
    assert Bundle.open(fresh.path).refitted[8].compensated


def test_an_engine_without_weights_of_its_own(fresh: Bundle, plan: BuildPlan):
    with pytest.raises(PlanError, match=r"r00\.onnx has no weights of its own"):
        refit_graph(fresh, 0, new_weights(plan, source=4))


def test_another_model_in_an_onnx_engine(fresh: Bundle, other):
    refit_graph(fresh, 8, other(*QKV))
    with pytest.raises(PlanError, match=r"has another head\.bias than the bundle"):
        refit_graph(fresh, 8, other("head.bias"))


def test_a_manifest_that_tells_of_plans_it_can_t_have(fresh: Bundle):
    file = fresh.path / "manifest.json"
    data = json.loads(file.read_text())
    for extra in ({"plans": [4]}, {"refitted": {"4": {"source": 0, "scale": 0.1}}}):
        file.write_text(json.dumps({**data, **extra}))
        with pytest.raises(Exception, match="plans, refitted weights or accuracy of no target"):
            Bundle.open(fresh.path)
