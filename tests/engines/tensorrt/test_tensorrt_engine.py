"""Running and refitting a plan, by a library that stands in for TensorRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.errors import DeviceError, ImageError, PlanError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.spec import VitSpec

QKV = [f"blocks.{layer}.attn.qkv.weight" for layer in range(4)]
WritePlan = Callable[..., Path]


def test_an_engine_runs_batches_of_any_size(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    engine = TensorRtEngine(write_plan(fresh, batch=(1, 4, 8)))
    images = make_images(fresh.spec, 8)
    whole = engine.run(images)
    assert whole.shape == (8, 10)
    for batch in (8, 1, 3, 3, 3, 8):  # a graph is recorded for a shape, and launched until the next
        np.testing.assert_array_equal(engine.run(images[:batch]), whole[:batch])
    assert nvidia.cuda.calls.count("cudaGraphInstantiate") == 4
    assert nvidia.cuda.calls.count("cudaGraphLaunch") == 3
    assert nvidia.cuda.calls.count("cudaGraphExecDestroy") == 3
    assert engine.variant == fresh.variant("r08")
    assert engine.largest == 8


def test_what_lies_on_the_gpu_is_run_again(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    """Without copies, by a graph of its own; runs from the host go on as before."""
    engine = TensorRtEngine(write_plan(fresh, batch=(2, 4, 8)))
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


def test_without_cuda_graphs(nvidia, write_plan: WritePlan, fresh: Bundle, make_images):
    engine = TensorRtEngine(write_plan(fresh), cuda_graphs=False)
    images = make_images(fresh.spec, 2)
    np.testing.assert_array_equal(engine.run(images), engine.run(images))
    assert "cudaStreamBeginCapture" not in nvidia.cuda.calls


@pytest.mark.parametrize(
    "step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_an_engine_that_can_t_be_captured(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images, step: str
):
    engine = TensorRtEngine(write_plan(fresh))
    images = make_images(fresh.spec, 2)
    nvidia.cuda.fails = step
    first = engine.run(images)
    assert "cudaGetLastError" in nvidia.cuda.calls
    np.testing.assert_array_equal(engine.run(images), first)
    assert "cudaGraphLaunch" not in nvidia.cuda.calls


def test_rtx_captures_by_itself(nvidia, write_plan: WritePlan, fresh: Bundle, make_images):
    engine = TensorRtEngine(write_plan(fresh, library="tensorrt-rtx"))
    images = make_images(fresh.spec, 2)
    np.testing.assert_array_equal(engine.run(images), engine.run(images))
    assert "cudaStreamBeginCapture" not in nvidia.cuda.calls
    assert ("context", "WHOLE") in nvidia.rtx.asked
    assert ("kernels", "EAGER") in nvidia.rtx.asked  # none that are exchanged in the midst of a run
    TensorRtEngine(fresh.path / "r08.plan", cuda_graphs=False)
    assert ("context", "DISABLED") in nvidia.rtx.asked


def test_a_batch_below_the_smallest_is_filled_up(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    engine = TensorRtEngine(write_plan(fresh, batch=(4, 4, 8)))
    images = make_images(fresh.spec, 6)
    whole = engine.run(images)
    np.testing.assert_array_equal(engine.run(images[:3]), whole[:3])
    shapes = [shape[0] for kind, *rest in nvidia.trt.asked if kind == "shape" for shape in rest]
    assert shapes == [6, 4]


def test_a_batch_that_the_plan_doesn_t_take(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    engine = TensorRtEngine(write_plan(fresh, batch=(2, 3, 4)))
    with pytest.raises(ImageError, match="a batch of 5 images; the plan takes 4 at most"):
        engine.run(make_images(fresh.spec, 5))
    with pytest.raises(ImageError, match="B ≥ 1"):
        engine.run(make_images(fresh.spec, 5)[:0])


def test_errors_of_the_gpu(nvidia, write_plan: WritePlan, fresh: Bundle, make_images):
    plan = write_plan(fresh)
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


def test_a_plan_of_another_gpu_and_version(nvidia, write_plan: WritePlan, fresh: Bundle):
    plan = write_plan(fresh)
    nvidia.trt.refuses.add("deserialize")
    nvidia.trt.__version__ = "10.14.0"
    nvidia.cuda.capability = (9, 0)
    says = r"built by tensorrt 10\.13\.3, this is 10\.14\.0; built for Pretended GPU, this is"
    with pytest.raises(PlanError, match=says) as caught:
        TensorRtEngine(plan)
    assert "no reason" not in str(caught.value)


def test_what_the_library_says_of_a_plan_that_it_refuses(
    nvidia, write_plan: WritePlan, fresh: Bundle, monkeypatch
):
    """What differs need not be why."""
    plan = write_plan(fresh)
    nvidia.trt.__version__ = "10.14.0"
    library = open_library("tensorrt")

    def refuse(content: bytes) -> None:
        library.logger.log("ERROR", "out of memory")

    made = SimpleNamespace(deserialize_cuda_engine=refuse)
    monkeypatch.setattr(nvidia.trt, "Runtime", lambda _: made)
    with pytest.raises(PlanError, match=r"this is 10\.14\.0; out of memory\); build it here"):
        TensorRtEngine(plan)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_plan_for_one_batch_alone(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images, fixed: bool
):
    nvidia.trt.fixes_batch = fixed
    engine = TensorRtEngine(write_plan(fresh, batch=(8, 8, 8)))
    assert engine.run(make_images(fresh.spec, 3)).shape == (3, 10)


@pytest.mark.parametrize("step", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"])
def test_what_was_begun_ends_before_the_next_run(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images, step: str
):
    engine = TensorRtEngine(write_plan(fresh))
    images = make_images(fresh.spec, 2)
    before = engine.run(images)
    nvidia.cuda.fails = step
    nvidia.cuda.calls.clear()
    with pytest.raises(DeviceError):
        engine.run(images if step == "cudaGraphLaunch" else images[:1])
    assert nvidia.cuda.calls[-1] == "cudaStreamSynchronize"
    nvidia.cuda.fails = ""
    np.testing.assert_array_equal(engine.run(images), before)


def test_code_that_a_plan_brings_along_must_be_allowed(
    nvidia, write_plan: WritePlan, fresh: Bundle
):
    plan = write_plan(fresh, version_compatible=True)
    nvidia.trt.asked.clear()
    with pytest.raises(PlanError, match=r"brings code along.*`host_code`"):
        TensorRtEngine(plan)
    assert nvidia.trt.asked == []
    TensorRtEngine(plan, host_code=True)
    TensorRtEngine(write_plan(fresh))
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
def test_a_record_that_asks_for_other_buffers(
    nvidia, write_plan: WritePlan, fresh: Bundle, change: dict[str, Any]
):
    plan = write_plan(fresh)
    content, record = open_plan(plan)
    if "spec" in change:
        spec = decode(VitSpec, {**encode(record.spec), **change["spec"]})
        change = {"spec": spec}
    save_plan(plan, content, dataclasses.replace(record, **change))
    with pytest.raises(PlanError, match="the two are not of one build"):
        TensorRtEngine(plan)


def test_there_and_back(
    nvidia, fresh: Bundle, blueprint: Blueprint, make_images, write_plan: WritePlan
):
    """A → B → A gives the very outputs of A; every marked weight is set each time."""
    engine = TensorRtEngine(write_plan(fresh))
    images = make_images(fresh.spec, 3)
    before = engine.run(images)
    engine.run(images)  # by graph
    first = {name: fresh.tensors(8)[name] for name in QKV}
    weights = blueprint.weights
    engine.refit(weights.own(dataclasses.replace(fresh.variant("r08"), source=16)))
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
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images, change: Callable[..., Any], says: str
):
    engine = TensorRtEngine(write_plan(fresh))
    images = make_images(fresh.spec)
    before = engine.run(images)
    weights = {name: fresh.tensors(8)[name] for name in QKV}
    change(weights)
    with pytest.raises(PlanError, match=says):
        engine.refit(weights)
    np.testing.assert_array_equal(engine.run(images), before)  # nothing was touched


def test_a_half_refitted_engine_is_not_run(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    engine = TensorRtEngine(write_plan(fresh))
    nvidia.trt.refuses.add("refit")
    weights = {name: fresh.tensors(8)[name] for name in QKV}
    with pytest.raises(PlanError, match="tensorrt can't refit it"):
        engine.refit(weights)
    with pytest.raises(PlanError, match="a refit failed, and left the engine with mixed weights"):
        engine.run(make_images(fresh.spec))
    nvidia.trt.refuses.clear()
    engine.refit(weights)
    engine.run(make_images(fresh.spec))


def test_no_refit_while_inference_is_in_flight(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images, monkeypatch
):
    engine = TensorRtEngine(write_plan(fresh), cuda_graphs=False)
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


def test_what_the_engine_and_its_record_say_must_agree(
    nvidia, write_plan: WritePlan, fresh: Bundle, make_images
):
    plan = write_plan(fresh)
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


def test_an_engine_that_the_library_can_t_refit(nvidia, write_plan: WritePlan, fresh: Bundle):
    engine = TensorRtEngine(write_plan(fresh))
    engine._engine.refittable = False
    with pytest.raises(PlanError, match="can't refit this plan"):
        engine.refit({name: fresh.tensors(8)[name] for name in QKV})


def test_a_degree_for_each_layer(
    nvidia, mixed: Bundle, mixed_blueprint: Blueprint, write_plan: WritePlan, make_images
):
    engine = TensorRtEngine(write_plan(mixed, "fast"))
    assert (engine.variant, engine.record.variant) == (mixed.variant("fast"),) * 2
    images = make_images(mixed.spec, 3)
    before = engine.run(images)
    other = dataclasses.replace(mixed.variant("fast"), source=9)
    engine.refit(mixed_blueprint.weights.own(other))
    assert not np.array_equal(engine.run(images), before)
    engine.refit(mixed.tensors("fast"))  # more than it lets go of
    np.testing.assert_array_equal(engine.run(images), before)
