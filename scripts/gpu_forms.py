"""The forms of a plan (``build --refit``), side by side: what each costs, and what is fused in it.

A weight that can be exchanged is one that the builder can't fold, and attention may then stay in
pieces. Which form should be the default is for these figures to say.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any, get_args

from gpu_plans import BATCHES, Entry, Plans, make_runs
from gpu_report import DENSE, FORM, Key, Report
from gpu_steps import judge

from tocom_export.bundle.manifest import plan_name
from tocom_export.engines.engine import Engine
from tocom_export.engines.tensorrt.library import Nvidia
from tocom_export.engines.tensorrt.plan import Refit
from tocom_export.engines.tensorrt.refitter import open_engine
from tocom_export.engines.verify import sample_images
from tocom_export.variant import Variant

FORMS: tuple[Refit, ...] = get_args(Refit)
VARIANTS = (DENSE, "r16")
FUSED = re.compile("mha|flash", re.IGNORECASE)
"""What NVIDIA's kernels of fused attention are called: ``_gemm_mha_v2``, ``sm90_fmha...``."""


def time_forms(plans: Plans, report: Report, seconds: float, out: Path) -> None:
    """Each form of some variants built and compared with PyTorch; then all timed in turns."""
    library = plans.nvidia.library
    engines: dict[tuple[Refit, str], Engine] = {}
    for name in VARIANTS:
        for form in FORMS:
            with report.step(f"{library}: {name} built with refit {form}") as entry:
                report.need(60)
                variant = plans.bundle.variant(name)
                engines[form, name] = build_form(plans, variant, form, out, entry)
    for batch in reversed(BATCHES):
        images = sample_images(plans.bundle.spec, batch)
        runs: dict[Key, Any] = {}
        for (form, name), engine in engines.items():
            runs |= make_runs(f"{library}{FORM}{form}", {name: engine}, images)
        report.measure(f"{library}, each form", runs, batch, seconds)


def build_form(plans: Plans, variant: Variant, form: Refit, out: Path, entry: Entry) -> Engine:
    """One plan in a bundle of its own, opened as users do, since one form needs its bundle."""
    library = plans.nvidia.library
    bundle = plans.rewrite(f"{variant.name}-{form}", variant)
    plan = bundle.path / plan_name(variant.name)
    began = time.monotonic()
    plans.build(bundle, variant, plan, refit=form, detailed=True)
    entry["build_seconds"] = time.monotonic() - began
    entry["bytes"] = plan.stat().st_size
    layers = list_layers(plans.nvidia, plan.read_bytes())
    saved = out / f"layers-{library}-{variant.name}-{form}.json"
    saved.write_text(json.dumps(layers, indent=1) + "\n", "utf-8")
    entry |= {"layers": len(layers), "fused_attention": count_fused(layers)}
    entry["of_blocks"] = bundle.spec.depth
    having = dataclasses.replace(bundle, plans=(variant.name,))
    began = time.monotonic()
    engine = having.engine(variant.name, backend=library)
    entry["open_seconds"] = time.monotonic() - began
    entry |= judge(engine.run, bundle, variant, sample_images(bundle.spec, 32))
    return engine


def list_layers(nvidia: Nvidia, content: bytes) -> list[Any]:
    """What the library's inspector tells of a plan's layers: of each its name, or a dictionary."""
    inspector = open_engine(nvidia, content).create_engine_inspector()
    told = inspector.get_engine_information(nvidia.trt.LayerInformationFormat.JSON)
    found: list[Any] = json.loads(told)["Layers"]
    return found


def count_fused(layers: list[Any]) -> int:
    """How many layers are attention in one kernel, by the name of the layer or its tactic."""
    names = [
        (layer, "") if isinstance(layer, str) else (layer.get("Name"), layer.get("TacticName"))
        for layer in layers
    ]
    return sum(any(FUSED.search(name or "") for name in pair) for pair in names)
