"""Plans for the variants of a bundle that is being put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tocom_export.bundle.manifest import plan_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import CheckFailed
from tocom_export.variant import Variant

from ..engine import Images
from ..verify import Oracle, verify
from .building import PlanOptions, Progress, build_plan
from .cache import find_place, keep_plan, take_plan
from .cuda import find_gpu
from .library import Library, open_library
from .plan import PlanRecord, save_plan


def add_plans(
    bundle: Bundle,
    backend: Library,
    options: PlanOptions,
    images: Images | None,
    oracle: Oracle | None = None,
    oracle_name: str = "",
    *,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[str], Progress | None] = lambda _: None,
) -> Bundle:
    """Build a plan for each variant; the bundle that has them.

    On a machine with a GPU each plan is run before the build is called done, against the oracle if
    there is one: TensorRT may drop a bias of a refittable plan.

    Args:
        images: to run the plans on (B, C, H, W); None runs none.
        oracle: see :func:`~tocom_export.engines.verify.verify`.
        tell: called with a line on each plan, and with what the library says.
        progress: a plan's name → what is called as its build goes on.

    Raises:
        CheckFailed: a plan says something else than the oracle.
        PlanError: the library can't build it.
    """
    nvidia = open_library(backend, tell)
    advice = "no bundle was written. Try `refit` none, and please report this."
    if find_gpu() is None:
        images = None

    def put(variant: Variant, how: str, content: bytes, record: PlanRecord) -> None:
        plan = bundle.path / plan_name(variant.name)
        save_plan(plan, content, record)
        tell(f"{plan.name}: {how}, {len(content)} bytes, {backend} {nvidia.version}")
        if images is not None:
            having = dataclasses.replace(bundle, plans=(variant.name,))
            for found in verify(  # host code of our own building
                having, images, oracle, backend=backend, variants=having.plans, host_code=True
            ):
                found.require(oracle_name, advice)

    for name, variant in bundle.variants.items():
        earlier = find_place(nvidia, bundle, variant, options)
        if earlier and (kept := take_plan(earlier, bundle, variant)):
            try:
                put(variant, "refitted from an earlier build's", *kept)
                continue
            except CheckFailed:
                tell(f"{plan_name(name)}: refitted, it fails its check; it is built afresh")
        built = build_plan(nvidia, bundle, variant, options, progress(plan_name(name)))
        put(variant, "built", *built)
        if earlier and images is not None:
            keep_plan(earlier, *built)
    return dataclasses.replace(bundle, plans=tuple(bundle.variants))


def count_hundredths(advance: Callable[[str], None], plan: str) -> Progress:
    """What the build of a plan is to call, so that ``advance`` is called for each hundredth."""
    done = 0

    def follow(phase: str, number: int, steps: int) -> None:
        nonlocal done
        while done < 100 * number // steps:
            done += 1
            advance(f"{plan}, {phase}")

    return follow
