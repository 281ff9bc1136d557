"""What ``gpu_check.py`` does with TensorRT: plans built, compared, refitted, saved and stripped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_report import GPU, HOST, Key, Report, Skip
from gpu_steps import FAST, judge

from tocom_export.bundle.manifest import plan_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.engine import Images
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.cuda import find_gpu
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.library import Library, Nvidia, open_library
from tocom_export.engines.tensorrt.plan import save_plan
from tocom_export.engines.tensorrt.refit import refit_plan
from tocom_export.engines.verify import sample_images
from tocom_export.variant import Variant

BATCHES = (1, 8, 32, 128)
Run = Callable[[], object]
Entry = dict[str, Any]
"""What is told of a step."""


class Plans:
    """A library's plans of a bundle's variants."""

    def __init__(self, nvidia: Nvidia, bundle: Bundle, blueprint: Blueprint) -> None:
        self.nvidia, self.bundle, self.blueprint = nvidia, bundle, blueprint
        self.folder = bundle.path / nvidia.library
        self.folder.mkdir()
        self.options = PlanOptions(
            batch=(1, 32, max(BATCHES)), timing_cache=self.folder / "timings"
        )
        self.engines: dict[str, TensorRtEngine] = {}
        self.built: dict[str, float] = {}
        """Variant → seconds."""

    def file(self, variant: Variant) -> Path:
        """Where a variant's plan lies."""
        return self.folder / plan_name(variant.name)

    def build(self, bundle: Bundle, variant: Variant, file: Path, **changes: Any) -> None:
        """Build one plan, with some options changed."""
        options = dataclasses.replace(self.options, **changes)
        save_plan(file, *build_plan(self.nvidia, bundle, variant, options))

    def rewrite(self, folder: str, variant: Variant, **changes: Any) -> Bundle:
        """A bundle of one variant alone, its weights made with something changed."""
        blueprint = dataclasses.replace(
            self.blueprint,
            weights=dataclasses.replace(self.blueprint.weights, **changes),
            variants={variant.name: variant},
        )
        return write_bundle(blueprint, self.folder / folder)


def make_runs(backend: str, engines: Mapping[str, Any], images: Images) -> dict[Key, Run]:
    """What is timed of a batch, of plans by the names of their variants."""
    runs: dict[Key, Run] = {}
    for name, engine in engines.items():
        runs[backend, name, HOST] = partial(engine.run, images)
        runs[backend, name, GPU] = partial(engine.run_again, len(images))
    return runs


def build_plans(
    library: Library, bundle: Bundle, blueprint: Blueprint, report: Report
) -> Plans | None:
    """Build every variant, and compare it with PyTorch; None where the library can't be used."""
    with report.step(f"{library}: installed, and a GPU") as entry:
        nvidia = open_library(library)
        entry["version"] = nvidia.version
        if find_gpu() is None:
            raise Skip("no GPU that CUDA can use")
    if entry["status"] != "ok":
        return None
    plans = Plans(nvidia, bundle, blueprint)
    for name, variant in bundle.variants.items():
        with report.step(f"{library}: {name} built in fp16, compared with PyTorch") as entry:
            report.need(60)
            began = time.monotonic()
            plans.build(bundle, variant, plans.file(variant))
            plans.built[name] = entry["build_seconds"] = time.monotonic() - began
            engine = TensorRtEngine(plans.file(variant))
            entry |= judge(engine.run, bundle, variant, sample_images(bundle.spec, 32))
            plans.engines[name] = engine
    return plans


def check_plans(plans: Plans, report: Report) -> None:
    """Refit there and back, save, strip, and build in fp32."""
    library, bundle = plans.nvidia.library, plans.bundle
    images = sample_images(bundle.spec, 32)
    r08, r16, fast = (bundle.variant(name) for name in ("r08", "r16", FAST))
    for variant in (r08, fast):
        with report.step(f"{library}: {variant.name} refitted there and back") as entry:
            report.need(10)
            check_refit(plans, variant, images, entry)
    saved = "{}: {} refitted and saved, twice, against a new build"
    with report.step(saved.format(library, "r08")) as entry:
        report.need(90)
        check_saved(plans, r08, images, entry)
    with report.step(f"{library}: r08 stripped and refitted") as entry:
        report.need(60)
        check_stripped(plans, r08, images, entry)
    with report.step(f"{library}: r16 in fp32, compared with PyTorch") as entry:
        report.need(60)
        exact = plans.rewrite("fp32", r16, precision="fp32")
        file = exact.path / plan_name(r16.name)
        plans.build(exact, r16, file)
        entry |= judge(TensorRtEngine(file).run, exact, r16, images)
    with report.step(saved.format(library, FAST)) as entry:
        report.need(90)
        check_saved(plans, fast, images, entry)


def check_refit(plans: Plans, variant: Variant, images: Images, entry: Entry) -> None:
    """Other weights into an engine, and its own again.

    Raises:
        AssertionError: the outputs are not what they were.
    """
    if variant.name not in plans.engines:
        raise Skip("it was not built")
    engine = plans.engines[variant.name]
    first = engine.run(images)
    other = dataclasses.replace(variant, source=4, scale=0.05)  # another gap in every layer
    there, back = plans.blueprint.weights.own(other), plans.bundle.tensors(variant.name)
    began = time.monotonic()
    engine.refit({name: there[name] for name in engine.record.refittable})
    entry["refit_seconds"] = time.monotonic() - began
    entry["building_over_refitting"] = plans.built[variant.name] / entry["refit_seconds"]
    if np.array_equal(engine.run(images), first):
        raise AssertionError("a refit changed nothing")
    engine.refit({name: back[name] for name in engine.record.refittable})
    if not np.array_equal(engine.run(images), first):
        raise AssertionError("A, B, A does not give the outputs of A")


def check_saved(plans: Plans, variant: Variant, images: Images, entry: Entry) -> None:
    """A plan refitted and saved, twice, against one that is built with the last weights.

    Raises:
        AssertionError: they differ.
    """
    weights, file = plans.blueprint.weights, plans.file(variant)
    moved, other = file.with_name(f"moved-{file.name}"), dataclasses.replace(variant, source=16)
    refit_plan(file, dataclasses.replace(variant, source=4), weights, moved)
    refit_plan(moved, other, weights, moved)
    bundle = plans.rewrite(f"other-{variant.name}", other)
    fresh = bundle.path / file.name
    plans.build(bundle, other, fresh)
    found, wanted = (TensorRtEngine(plan).run(images) for plan in (moved, fresh))
    differs = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max()
    entry["median_relative_difference"] = float(np.median(differs))
    entry["largest_relative_difference"] = float(differs.max())
    if entry["median_relative_difference"] > 1e-3:  # two builds may round, and merge, otherwise
        raise AssertionError(f"half of the images differ by more than {np.median(differs):.1e}")


def check_stripped(plans: Plans, variant: Variant, images: Images, entry: Entry) -> None:
    """A plan built without its weights, and refitted, against PyTorch.

    Raises:
        AssertionError: it says something else.
    """
    bare = plans.folder / "bare.plan"
    plans.build(plans.bundle, variant, bare, strip=True)
    entry["bytes_stripped"] = bare.stat().st_size
    entry["bytes_whole"] = plans.file(variant).stat().st_size
    refit_plan(bare, variant, plans.blueprint.weights, bare)
    entry |= judge(TensorRtEngine(bare).run, plans.bundle, variant, images)
