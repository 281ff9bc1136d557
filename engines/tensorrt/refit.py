"""Other weights into a plan's files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from tocom_export.bundle.weights import ModelWeights
from tocom_export.errors import PlanError
from tocom_export.io.tensors import Tensors
from tocom_export.variant import Variant

from .engine import TensorRtEngine
from .plan import PlanRecord, open_plan, save_plan, select_refittable


def refit_plan(
    plan: Path,
    variant: Variant,
    new: ModelWeights,
    out: Path,
    check: Callable[[TensorRtEngine], None] | None = None,
    *,
    host_code: bool = False,
) -> PlanRecord:
    """A plan with other weights, written to ``out`` once it is right.

    The record says ``refit: none`` where the library saved a plan that can't be refitted again.

    Args:
        variant: as it will be; of the same name and degrees as the plan's.
        new: a checkpoint that was checked against the plan's spec.
        out: may be ``plan`` itself.
        check: called with an engine of what is about to be written; what it raises leaves the
            files as they were.
        host_code: let a version-compatible plan run the code that it brings along.

    Raises:
        PlanError: the plan can't be refitted, or not with these weights.
    """
    weights = {**new.shared(), **new.own(variant)}
    content, record = open_plan(plan)
    if record.refit == "identical":
        raise PlanError(
            f"{plan} takes back the weights that it was built with alone (refit: identical); build "
            "it again with the new ones, or with --refit qkv or all to exchange them later."
        )
    opened = content, dataclasses.replace(record, variant=variant)
    content, saved = refit_opened(plan, opened, weights, host_code)
    if check:
        check(saved)
    record = saved.record
    if not saved.refittable:
        record = dataclasses.replace(record, refit="none", refittable={})
    save_plan(out, content, record)
    return record


def refit_opened(
    plan: Path, opened: tuple[bytes, PlanRecord], weights: Tensors, host_code: bool
) -> tuple[bytes, TensorRtEngine]:
    """A plan with all tensors of a variant: what its file would hold, and an engine of that."""
    record = opened[1]
    chosen = select_refittable(record, weights, plan)
    engine = TensorRtEngine(plan, host_code=host_code, unsaved=opened)
    engine.refit(chosen)
    content = engine.serialize()
    del engine  # the GPU may not have memory for two
    digest = hashlib.sha256(content).hexdigest()
    record = dataclasses.replace(record, stripped=False, sha256=digest)
    return content, TensorRtEngine(plan, host_code=host_code, unsaved=(content, record))
