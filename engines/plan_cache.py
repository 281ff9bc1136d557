"""Plans of earlier builds: what differs in its refittable weights alone is not built again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import onnx

from tocom_export.bundle import Bundle
from tocom_export.engines.cuda import Gpu, find_gpu
from tocom_export.engines.nvidia import Nvidia
from tocom_export.engines.plan import (
    PlanRecord,
    fixed_digest,
    open_plan,
    refittable_names,
    save_plan,
)
from tocom_export.engines.plan_build import PlanOptions, Progress, build_plan
from tocom_export.engines.tensorrt import TensorRtEngine
from tocom_export.errors import PlanError


def cache_folder() -> Path:
    """``$TOCOM_EXPORT_CACHE``, else ``tocom-export`` in the user's cache folder."""
    if named := os.environ.get("TOCOM_EXPORT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tocom-export"


def plan_key(nvidia: Nvidia, bundle: Bundle, target: int, options: PlanOptions, gpu: Gpu) -> str:
    """What two builds share whose plans differ in refittable weights alone.

    The graph without the places of its weights and without what it says of them, the weights
    that can't be refitted, the options, the library's version, and the GPU.
    """
    graph = onnx.load(bundle.graph(target), load_external_data=False)
    del graph.metadata_props[:]
    for tensor in graph.graph.initializer:
        del tensor.external_data[:]
    tensors = bundle.tensors(target)
    built = dataclasses.replace(options, timing_cache=None)
    facts = [
        hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest(),
        fixed_digest(tensors, refittable_names(bundle, tensors, options.refit)),
        json.dumps(dataclasses.asdict(built)),
        nvidia.library,
        nvidia.version,
        gpu.name,
        gpu.capability,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def cached_plan(
    nvidia: Nvidia,
    bundle: Bundle,
    target: int,
    options: PlanOptions,
    progress: Progress | None = None,
) -> tuple[bytes, PlanRecord, bool]:
    """A target's plan, refitted from an earlier build's where there is one, and whether it was.

    Raises:
        PlanError, DegreeError: as :func:`~tocom_export.engines.plan_build.build_plan`.
    """
    gpu = find_gpu()
    if gpu is None or options.refit == "none":
        return *build_plan(nvidia, bundle, target, options, progress), False
    kept = cache_folder() / f"{plan_key(nvidia, bundle, target, options, gpu)}.plan"
    if kept.exists():
        try:
            return *_refitted(kept, bundle, target), True
        except PlanError:
            pass  # damaged, or no longer opened: it is built again
    content, record = build_plan(nvidia, bundle, target, options, progress)
    save_plan(kept, content, record)
    return content, record, False


def _refitted(kept: Path, bundle: Bundle, target: int) -> tuple[bytes, PlanRecord]:
    content, record = open_plan(kept)
    if not record.stripped:  # a stripped plan is the same whatever its weights will be
        engine = TensorRtEngine(kept)
        tensors = bundle.tensors(target)
        engine.refit({name: tensors[name] for name in record.refittable})
        content = engine.serialize()
    return content, dataclasses.replace(
        record,
        source=bundle.source,
        scale=bundle.scale,
        compensated=bundle.compensated and target != bundle.source,
        sha256=hashlib.sha256(content).hexdigest(),
    )
