"""The GPU script, as far as it goes without one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images
from tocom_export.training.scatter_merge import ScatterMergeVit, scatter_merge

SCRIPTS = Path(__file__).parent.parent / "scripts"
HOST, GPU = "host to host", "on the GPU"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """One of the script's files, which import each other by their bare names."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def check(load, make_spec, tmp_path: Path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Runs the script on a small model; what its JSON says."""
    script = load("gpu_check")
    monkeypatch.setattr(script, "known_model", lambda name: (make_spec(), None))

    def run(*options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *options])
        status = script.main()
        return {"status": status, **json.loads((tmp_path / "gpu_check.json").read_text())}

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_everything_is_skipped_by_name(check: Any, tmp_path: Path, capsys):
    document = check()
    assert document["status"] == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("No GPU, or nothing that runs on")
    assert {entry["status"] for entry in document["steps"]} == {"skipped"}
    why = {entry["why"] for entry in document["steps"]}
    assert "torch has no GPU" in why
    assert document["figures"] == []
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| onnx, CUDA: r16 compared with PyTorch | skipped |" in page
    assert "| onnx, CUDA: fast compared with PyTorch | skipped |" in page


def test_torch_is_timed(load: Any, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch):
    steps, report = load("gpu_steps"), load("gpu_report")
    monkeypatch.setattr(steps, "TARGETS", (0, 8))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    merged: list[int] = []

    def count(matching: Any, x: Any, size: Any) -> Any:
        merged.append(matching.merged.shape[1])
        return scatter_merge(matching, x, size)

    monkeypatch.setattr(ScatterMergeVit, "merge", staticmethod(count))
    subject = steps.build_bundle(make_spec(), "fp16", tmp_path)
    found = report.Report(1)
    for compiled in (False, True):
        found.measure("torch", steps.make_torch_runs(*subject, 2, "cpu", compiled), 2, 0.0)
    assert [(f["backend"], f["variant"], f["timed"]) for f in found.figures] == [
        (backend, variant, timed)
        for backends in (("torch eager", "torch eager, merging by scatter"), ("torch.compile",))
        for variant in ("r00", "r08", "fast") for timed in (HOST, GPU) for backend in backends
    ]  # fmt: skip
    assert set(merged) == {8, 16, 11, 6}  # it is the scatter that is timed under its name
    assert found.steps[0]["status"] == "ok"
    page = report.format_markdown(found.document())
    assert "| torch eager | host to host | 2 | r00 |" in page


def test_speed_ups_are_over_what_was_timed_in_the_same_way(load: Any):
    paces = {
        ("torch eager", "r00", HOST): 10.0, ("torch eager", "r00", GPU): 20.0,
        ("torch eager", "r08", HOST): 15.0, ("torch eager", "r08", GPU): 40.0,
        ("tensorrt", "r08", HOST): 30.0, ("tensorrt", "r08", GPU): 50.0,
    }  # fmt: skip
    figures = [
        {"backend": b, "variant": v, "timed": t, "batch": 2, "median_ms": 1.0, "images_per_s": p}
        for (b, v, t), p in paces.items()
    ]
    page = load("gpu_report").format_markdown({"machine": {}, "steps": [], "figures": figures})
    assert "| torch eager | host to host | 2 | r08 | 1.00 | 15 | 1.50× | 1.00× |" in page
    assert "| torch eager | on the GPU | 2 | r08 | 1.00 | 40 | 2.00× | 1.00× |" in page
    assert "| tensorrt | host to host | 2 | r08 | 1.00 | 30 | - | 2.00× |" in page
    assert "| tensorrt | on the GPU | 2 | r08 | 1.00 | 50 | - | 1.25× |" in page


def test_plans_are_timed_before_others_are_built(load: Any, check: Any, nvidia: Any, monkeypatch):
    """On a pretended GPU, whose plans give logits of their own."""
    for module in ("gpu_plans", "gpu_forms"):
        monkeypatch.setattr(load(module), "judge", lambda *_: {})
    document = check("--seconds", "0")
    assert document["status"] == 0
    steps = [e["step"] for e in document["steps"] if e["status"] == "ok"]
    timed = [f"{library}, batch 1: timed" for library in ("tensorrt", "tensorrt-rtx")]
    first, second, refitted = (
        steps.index(name) for name in (*timed, "tensorrt: r08 refitted there and back")
    )
    assert first < second < refitted
    assert "tensorrt-rtx: r00 built in fp16, compared with PyTorch" in steps[first:second]
    found = {(f["backend"], f["variant"], f["timed"]) for f in document["figures"]}
    assert {("tensorrt", v, t) for v in ("r00", "r16", "fast") for t in (HOST, GPU)} <= found


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_each_form_is_built_and_timed_beside_the_others(
    load: Any, check: Any, nvidia: Any, monkeypatch, tmp_path: Path, library: str
):
    for module in ("gpu_plans", "gpu_forms"):
        monkeypatch.setattr(load(module), "judge", lambda *_: {})
    document = check("--seconds", "0")
    steps = {e["step"]: e for e in document["steps"]}
    forms, timed = ("qkv", "all", "none", "identical"), set()
    for variant in ("r00", "r16"):
        entries = {f: steps[f"{library}: {variant} built with refit {f}"] for f in forms}
        assert {entry["status"] for entry in entries.values()} == {"ok"}
        fused = {form: entry["fused_attention"] for form, entry in entries.items()}
        assert fused == {"qkv": 0, "all": 0, "none": 4, "identical": 4}  # as the stand-in has it
        assert {entry["of_blocks"] for entry in entries.values()} == {4}
        assert entries["identical"]["bytes"] < entries["all"]["bytes"]
        timed |= {(f"{library}, refit {form}", variant) for form in forms}
        told = json.loads((tmp_path / f"layers-{library}-{variant}-none.json").read_text())
        assert told[0] == {"Name": "kgen", "TacticName": "_gemm_mha_v2"}
    assert timed <= {(f["backend"], f["variant"]) for f in document["figures"]}
    page = (tmp_path / "gpu_check.md").read_text()
    assert (
        "| variant | refit qkv, ms | refit all, ms | refit none, ms | refit identical, ms |" in page
    )
    assert f"| {library} | on the GPU | 128 | r16 | " in page


def test_what_is_fused_is_known_by_name(load: Any):
    count = load("gpu_forms").count_fused
    assert count(["a", "_gemm_mha_v2_myl0_3", "blocks.0.attn/MatMul"]) == 1
    named = {"Name": "x", "TacticName": "sm90_xmma_fmha_e4m3", "LayerType": "kgen"}
    assert count([named, {"Name": "blocks.0.attn/Softmax"}, {"Name": None}]) == 1


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_plans_are_refitted_saved_and_stripped(
    load: Any, check: Any, nvidia: Any, monkeypatch, library: str
):
    judged: list[tuple[str, str]] = []

    def judge(run: Any, bundle: Any, variant: Any, images: Any) -> dict[str, Any]:
        judged.append((bundle.precision, variant.name))
        return {"images_beyond": 0}

    monkeypatch.setattr(load("gpu_plans"), "judge", judge)
    monkeypatch.setattr(load("gpu_forms"), "judge", lambda *_: {})
    document = check("--seconds", "0")
    steps = {e["step"]: e for e in document["steps"]}
    for name in ("r08", "fast"):
        assert steps[f"{library}: {name} refitted there and back"]["building_over_refitting"] > 0
        saved = steps[f"{library}: {name} refitted and saved, twice, against a new build"]
        assert saved["largest_relative_difference"] == 0
    stripped = steps[f"{library}: r08 stripped and refitted"]
    assert stripped["bytes_stripped"] < stripped["bytes_whole"]
    assert steps[f"{library}: r16 in fp32, compared with PyTorch"]["status"] == "ok"
    whole = [("fp16", v) for v in ("r00", "r04", "r08", "r12", "r16", "fast")]
    assert judged == 2 * whole + 2 * [("fp16", "r08"), ("fp32", "r16")]


def test_a_refit_that_does_nothing_is_noticed(load: Any, check: Any, nvidia: Any, monkeypatch):
    plans = load("gpu_plans")
    for module in (plans, load("gpu_forms")):
        monkeypatch.setattr(module, "judge", lambda *_: {})
    monkeypatch.setattr(plans.TensorRtEngine, "refit", lambda *_: None)
    document = check("--seconds", "0")
    failed = {e["step"]: e["why"] for e in document["steps"] if e["status"] == "failed"}
    for name in ("r08", "fast"):
        why = failed[f"tensorrt: {name} refitted there and back"]
        assert why == "AssertionError: a refit changed nothing"
        why = failed[f"tensorrt: {name} refitted and saved, twice, against a new build"]
        assert "half of the images differ" in why
    assert document["status"] == 1


def test_an_engine_is_judged(load: Any, make_spec: Callable[..., Any], tmp_path: Path):
    steps = load("gpu_steps")
    bundle, _ = steps.build_bundle(make_spec(), "fp16", tmp_path)
    images = sample_images(bundle.spec, 32)
    for name in ("r08", "fast"):
        variant = bundle.variant(name)
        run = OnnxEngine(bundle, variant).run
        assert steps.judge(run, bundle, variant, images)["max_difference"] > 0
        with pytest.raises(AssertionError, match="32 of 32 images differ"):
            steps.judge(lambda x, run=run: run(x) + np.float32(1), bundle, variant, images)


def test_a_step_that_fails_ends_alone_and_none_begins_too_late(load: Any):
    report = load("gpu_report").Report(0.01)
    with report.step("broken"):
        raise RuntimeError("no")
    with report.step("too long"):
        report.need(60)
        raise AssertionError("not reached")
    assert [(e["status"], e["why"]) for e in report.steps] == [
        ("failed", "RuntimeError: no"), ("skipped", "no time left"),
    ]  # fmt: skip
