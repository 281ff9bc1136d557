"""Everything that needs an NVIDIA GPU, in under eight minutes: one JSON, one Markdown table.

python scripts/gpu_check.py [--out DIR] [--model NAME] [--minutes 8]

The package must be importable. Whatever of tensorrt, tensorrt_rtx, onnxruntime-gpu and torch is
installed is checked: plans are built in fp16, run, refitted there and back, stripped and refitted,
each compared with PyTorch, and timed beside torch at r = 0, 4, 8, 12, 16 and with another degree
in each layer: from float32 images on the host to logits on the host, and on what lies on the GPU
already. Each form of a plan (``build --refit``) is timed beside the others, with the number of its
layers that are attention in one kernel. What isn't installed is skipped by name, and what no time
is left for, too. Exit status 1 where a check failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from gpu_forms import time_forms
from gpu_plans import BATCHES, Plans, Run, build_plans, check_plans, make_runs
from gpu_report import HOST, Key, Report
from gpu_steps import FAST, build_bundle, make_torch_runs, need_torch, open_onnx_engines

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.tensorrt.library import LIBRARIES
from tocom_export.engines.verify import sample_images
from tocom_export.model.catalogue import known_model


def time_torch(bundle: Bundle, blueprint: Blueprint, report: Report, seconds: float) -> None:
    """PyTorch's eager runs of every variant."""
    for batch in reversed(BATCHES):
        with report.step(f"torch, batch {batch}"):
            need_torch()
            runs = make_torch_runs(bundle, blueprint, batch, "cuda")
            report.measure("torch", runs, batch, seconds)


def time_onnx(bundle: Bundle, report: Report, seconds: float) -> None:
    """ONNX Runtime's runs of every variant."""
    engines = open_onnx_engines(bundle, report)
    for batch in reversed(BATCHES):
        images = sample_images(bundle.spec, batch)
        runs: dict[Key, Run] = {
            ("onnx", name, HOST): partial(engine.run, images) for name, engine in engines.items()
        }
        report.measure("onnx", runs, batch, seconds)


def time_plans(
    bundle: Bundle, blueprint: Blueprint, report: Report, seconds: float, out: Path
) -> list[Plans]:
    """Each library's plans of every variant, built and timed; those of the usable libraries."""
    usable: list[Plans] = []
    for library in LIBRARIES:
        plans = build_plans(library, bundle, blueprint, report)
        for batch in reversed(BATCHES):
            engines = plans.engines if plans else {}
            runs = make_runs(library, engines, sample_images(bundle.spec, batch))
            report.measure(library, runs, batch, seconds)
        usable += [plans] if plans else []
        report.save(out)
    return usable


def time_compiled(
    bundle: Bundle, blueprint: Blueprint, report: Report, seconds: float, out: Path
) -> None:
    """PyTorch's compiled runs of the variants with one degree for all layers."""
    for batch in reversed(BATCHES):
        for name in sorted(bundle.variants.keys() - {FAST}, reverse=True):
            with report.step(f"torch.compile, {name}, batch {batch}"):
                need_torch()
                report.need(45)
                runs = make_torch_runs(bundle, blueprint, batch, "cuda", compiled=True)
                runs = {key: run for key, run in runs.items() if key[1] == name}
                report.measure("compiled", runs, batch, seconds)
        report.save(out)


def main() -> int:
    """Exit status 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each engine and batch")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    report = Report(options.minutes)
    spec, _ = known_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        subject = build_bundle(spec, "fp16", Path(name))
        # Each is timed as soon as it is there: the many builds must not take the time of that.
        time_torch(*subject, report, options.seconds)
        report.save(out)
        time_onnx(subject[0], report, options.seconds)
        report.save(out)
        usable = time_plans(*subject, report, options.seconds, out)
        for plans in usable:
            time_forms(plans, report, options.seconds, out)
            report.save(out)
        for plans in usable:
            check_plans(plans, report)
            report.save(out)
        # Last, since each compilation takes half a minute.
        time_compiled(*subject, report, options.seconds, out)
    if not report.figures:
        print("No GPU, or nothing that runs on one: nothing was timed; the lines above say why.")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
