"""A bundle's plans held against the model, as far as they can be run here."""

from __future__ import annotations

from collections.abc import Callable

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import DeviceError, InputError, MissingPackageError, PlanError

from ..engine import Images
from ..verify import Comparison, Oracle, verify
from .library import Library
from .plan import PlanRecord, check_plan, open_plan


def verify_plans(
    bundle: Bundle,
    images: Images,
    oracle: Oracle,
    atol: float | None = None,
    backend: Library | None = None,
    advance: Callable[[str], None] = lambda plan: None,
) -> tuple[list[Comparison], dict[str, str]]:
    """The plans that can be run here, compared; of the others, file name → why not.

    Args:
        oracle, atol: see :func:`~tocom_export.engines.verify.verify`.
        backend: asked for, so that a plan that can't be run is an error.
        advance: called with the name of each plan.

    Raises:
        PlanError: a plan or its JSON is missing or damaged.
        InputError: a plan can't be run, or there is none, and it was asked for.
    """
    checks: list[Comparison] = []
    skipped: dict[str, str] = {}
    # Where they are asked for and there are none, the first variant says so.
    for name in bundle.plans or list(bundle.variants)[: bool(backend)]:
        plan = bundle.plan(name)
        advance(plan.name)
        _, record = open_plan(plan)
        check_plan(bundle, name, record)
        why = _explain_skipping(bundle, record)
        if backend and backend != record.backend:
            why = f"it is of {record.backend}."
        if backend and why:
            raise InputError(f"`backend` {backend}: {plan} can't be verified: {why}")
        if why:
            skipped[plan.name] = why
            continue
        try:
            checks += verify(
                bundle, images, oracle, backend=record.backend, variants=[name], atol=atol
            )
        except (PlanError, DeviceError, MissingPackageError) as error:
            if backend:
                raise
            skipped[plan.name] = str(error)
    return checks, skipped


def _explain_skipping(bundle: Bundle, record: PlanRecord) -> str:
    """Why a plan is not held against the bundle's model; empty where it is to be."""
    if "VERSION_COMPATIBLE" in record.flags:
        return "it brings code along, which verify doesn't let run."
    ours, theirs = bundle.variants[record.variant.name], record.variant
    same = (ours.source, ours.scale, ours.baked) == (theirs.source, theirs.scale, theirs.baked)
    if not record.stripped and not same:
        return (
            f"it was refitted apart from the graph (source {theirs.source}, scale {theirs.scale})."
        )
    return ""
