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

from tocom_export.training.reduce import merge

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


def test_merging_the_usual_way_is_ours(script: Any):
    generator = torch.Generator().manual_seed(0)
    x, metric = (
        torch.randn(2, 51, 8, generator=generator),
        torch.randn(2, 51, 4, generator=generator),
    )
    size = torch.ones(2, 51, 1)
    found, sizes = script.usual_merge(x, size, metric, 9, 1)
    wanted, expected = merge(x, size, metric, 9, 1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(sizes, expected)


def test_torch_is_timed(script: Any, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(script, "TARGETS", (0, 8))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    bundle, plan = script.build(make_spec(), "fp16", tmp_path)
    report = script.Report(1)
    for compiled in (False, True):
        runs = script.torch_runs(bundle, plan, 2, "cpu", compiled)
        script.measure("torch", runs, 2, report, 0.0)
    assert [(f["engine"], f["target"]) for f in report.figures] == [
        ("torch eager", 0), ("torch eager", 8), ("torch, usual merging", 8),
        ("torch.compile", 0), ("torch.compile", 8),
    ]  # fmt: skip
    assert report.steps[0]["status"] == "ok"
    assert "| torch eager | 2 | 0 |" in script.markdown(report.document())


def test_an_engine_is_judged(script: Any, make_spec: Callable[..., Any], tmp_path: Path):
    from tocom_export.engines.onnxruntime import OnnxEngine

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
