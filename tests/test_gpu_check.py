"""The GPU script, as far as it goes without one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.training.scatter_merge import UsualVit, usual_merge

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_is_skipped_by_name(
    script: Any, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "known_model", lambda name: (make_spec(), None))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert script.main() == 0
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {entry["status"] for entry in document["steps"]} == {"skipped"}
    why = {entry["why"] for entry in document["steps"]}
    assert "torch has no GPU" in why
    assert document["figures"] == []
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| onnxruntime, CUDA: r16 compared with PyTorch | skipped |" in page


def test_torch_is_timed(script: Any, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(script, "TARGETS", (0, 8))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    merged: list[int] = []

    def usual(x: Any, size: Any, metric: Any, remove: int, prefix: int) -> Any:
        merged.append(remove)
        return usual_merge(x, size, metric, remove, prefix)

    monkeypatch.setattr(UsualVit, "merge", staticmethod(usual))
    bundle, plan = script.build(make_spec(), "fp16", tmp_path)
    report = script.Report(1)
    for compiled in (False, True):
        runs = script.torch_runs(bundle, plan, 2, "cpu", compiled)
        script.measure("torch", runs, 2, report, 0.0)
    host, gpu = "host to host", "on the GPU"
    assert [(f["engine"], f["target"], f["timed"]) for f in report.figures] == [
        (engine, target, timed)
        for engines in (("torch eager", "torch, usual merging"), ("torch.compile",))
        for target in (0, 8) for timed in (host, gpu) for engine in engines
    ]  # fmt: skip
    assert merged  # it is the usual merging that is timed under its name
    assert report.steps[0]["status"] == "ok"
    assert "| torch eager | host to host | 2 | 0 |" in script.markdown(report.document())


def test_speed_ups_are_over_what_was_timed_in_the_same_way(script: Any):
    paces = {
        ("torch eager", 0, script.HOST): 10.0, ("torch eager", 0, script.GPU): 20.0,
        ("torch eager", 8, script.HOST): 15.0, ("torch eager", 8, script.GPU): 40.0,
        ("tensorrt", 8, script.HOST): 30.0, ("tensorrt", 8, script.GPU): 50.0,
    }  # fmt: skip
    figures = [
        {"engine": e, "target": t, "timed": c, "batch": 2, "median_ms": 1.0, "throughput": pace}
        for (e, t, c), pace in paces.items()
    ]
    page = script.markdown({"machine": {}, "steps": [], "figures": figures})
    assert "| torch eager | host to host | 2 | 8 | 1.00 | 15 | 1.50× | 1.00× |" in page
    assert "| torch eager | on the GPU | 2 | 8 | 1.00 | 40 | 2.00× | 1.00× |" in page
    assert "| tensorrt | host to host | 2 | 8 | 1.00 | 30 | - | 2.00× |" in page
    assert "| tensorrt | on the GPU | 2 | 8 | 1.00 | 50 | - | 1.25× |" in page


def test_plans_are_timed_before_others_are_built(
    script: Any, nvidia: Any, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch
):
    """On a pretended GPU, whose plans give logits of their own."""
    monkeypatch.setattr(script, "known_model", lambda name: (make_spec(), None))
    monkeypatch.setattr(script, "judge", lambda *_: {})
    arguments = ["gpu_check.py", "--out", str(tmp_path), "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    steps = [e["step"] for e in document["steps"] if e["status"] == "ok"]
    timed = [f"{library}, batch 1: timed" for library in ("tensorrt", "tensorrt-rtx")]
    first, second, refitted = (
        steps.index(name) for name in (*timed, "tensorrt: r08 refitted there and back")
    )
    assert first < second < refitted
    assert "tensorrt-rtx: r00 built in fp16, compared with PyTorch" in steps[first:second]
    assert "tensorrt: r08 stripped and refitted" in steps[refitted:]
    found = {(f["engine"], f["target"], f["timed"]) for f in document["figures"]}
    assert {("tensorrt", 16, script.HOST), ("tensorrt", 16, script.GPU)} <= found


def test_an_engine_is_judged(script: Any, make_spec: Callable[..., Any], tmp_path: Path):
    from tocom_export.engines.onnx.engine import OnnxEngine

    bundle, _ = script.build(make_spec(), "fp16", tmp_path)
    images = script.sample_images(bundle.spec, 32)
    run = OnnxEngine(bundle, 8).run
    assert script.judge(run, bundle, 8, images)["max_difference"] > 0
    with pytest.raises(AssertionError, match="32 of 32 images differ"):
        script.judge(lambda x: run(x) + np.float32(1), bundle, 8, images)


def test_a_step_that_fails_ends_alone_and_none_begins_too_late(script: Any):
    report = script.Report(0.01)
    with report.step("broken"):
        raise RuntimeError("no")
    with report.step("too long"):
        report.need(60)
        raise AssertionError("not reached")
    assert [(e["status"], e["why"]) for e in report.steps] == [
        ("failed", "RuntimeError: no"), ("skipped", "no time left"),
    ]  # fmt: skip
