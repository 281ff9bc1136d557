"""Plans of earlier builds: what differs in its refittable weights alone is not built again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import onnx

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import DeviceError, OutputError, PlanError

from ..refit import exchanged
from .building import PlanOptions
from .cuda import Gpu, find_gpu
from .engine import TensorRtEngine
from .library import Nvidia
from .plan import (
    PlanRecord,
    fixed_digest,
    open_plan,
    refittable_names,
    save_plan,
)


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


def kept_plan(file: Path, bundle: Bundle, target: int) -> tuple[bytes, PlanRecord] | None:
    """A target's plan, refitted from an earlier build's; None where there is none to be had.

    Args:
        file: its :func:`place`.
    """
    if not file.exists():
        return None
    try:
        content, record = open_plan(file)
        # Of the weights that were marked, the builder may have folded some; these must be equal.
        weights = exchanged(record, bundle.tensors(target), file)
        if not record.stripped:  # a stripped plan is the same whatever its weights will be
            engine = TensorRtEngine(file, host_code=True)  # of our own building
            engine.refit(weights)
            content = engine.serialize()
            del engine  # the GPU may not have memory for two
        record = dataclasses.replace(
            record,
            spec=bundle.spec,
            source=bundle.source,
            scale=bundle.scale,
            compensated=bundle.compensated and target != bundle.source,
            sha256=hashlib.sha256(content).hexdigest(),
        )
        if not TensorRtEngine(file, host_code=True, unsaved=(content, record)).refittable:
            return None  # TensorRT before 10.14 saves plans that are at their end
    except (PlanError, DeviceError):
        return None  # damaged, or no longer opened, or of other weights: it is built again
    return content, record


def keep_plan(file: Path, content: bytes, record: PlanRecord) -> None:
    """Keep a plan that was built and found right; where it can't be kept, it isn't."""
    with suppress(OutputError):
        save_plan(file, content, record)


def place(nvidia: Nvidia, bundle: Bundle, target: int, options: PlanOptions) -> Path | None:
    """Where a plan is kept; None for one that can't be refitted."""
    gpu = find_gpu()
    if gpu is None or options.refit == "none":
        return None
    return cache_folder() / f"{plan_key(nvidia, bundle, target, options, gpu)}.plan"
