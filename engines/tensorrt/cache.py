"""Plans of earlier builds: what differs in its refittable weights alone is not built again."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import suppress
from pathlib import Path

import onnx

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import DeviceError, OutputError, PlanError
from tocom_export.variant import Variant

from ..machine import digest, find_cache
from .building import PlanOptions
from .cuda import find_gpu
from .library import Nvidia
from .plan import PlanRecord, digest_fixed, list_marked, open_plan, save_plan, select_refittable
from .refit import refit_opened


def find_place(
    nvidia: Nvidia, bundle: Bundle, variant: Variant, options: PlanOptions
) -> Path | None:
    """Where a plan is kept; None for one that can't be refitted.

    Named after what two builds share whose plans differ in refittable weights alone: the graph
    without the places of its weights and without what it says of them, the weights that can't be
    refitted, the options, the library's version, and the GPU.
    """
    gpu, cache = find_gpu(), find_cache()
    if gpu is None or cache is None or options.refit in ("none", "identical"):
        return None
    graph = onnx.load(bundle.graph(variant.name), load_external_data=False)
    del graph.metadata_props[:]
    for tensor in graph.graph.initializer:
        del tensor.external_data[:]
    tensors = bundle.tensors(variant.name)
    facts = (
        hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest(),
        digest_fixed(tensors, list_marked(bundle, tensors, options.refit)),
        dataclasses.asdict(dataclasses.replace(options, timing_cache=None)),
        nvidia.library,
        nvidia.version,
        dataclasses.asdict(gpu),
    )
    return cache / f"{digest(facts)}.plan"


def take_plan(file: Path, bundle: Bundle, variant: Variant) -> tuple[bytes, PlanRecord] | None:
    """A variant's plan, refitted from an earlier build's in its :func:`find_place`; else None."""
    weights = bundle.tensors(variant.name)
    try:
        content, record = open_plan(file)
        record = dataclasses.replace(record, spec=bundle.spec, variant=variant)
        if record.stripped:  # it is the same whatever its weights will be, but for folded ones
            select_refittable(record, weights, file)
            return content, record
        content, engine = refit_opened(file, (content, record), weights, True)
    except (PlanError, DeviceError):
        return None  # none, or damaged, or no longer opened, or of other weights
    # TensorRT before 10.14 may save a plan that is at its end.
    return (content, engine.record) if engine.refittable else None


def keep_plan(file: Path, content: bytes, record: PlanRecord) -> None:
    """Keep a plan that was built and found right; where it can't be kept, it isn't."""
    with suppress(OutputError):
        save_plan(file, content, record)
