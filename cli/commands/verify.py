"""``tocom-export verify``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, DeviceError, MissingPackageError, PlanError

from ..output import (
    FILE,
    Command,
    FiniteFloat,
    common_options,
    installed,
    output_of,
)

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.tensorrt.plan import PlanRecord
    from tocom_export.engines.verify import Comparison


@click.command("verify", cls=Command)
@click.argument("bundle", type=FILE)
@click.option(
    "--atol",
    type=FiniteFloat(0),
    help="What |Δ| of a logit may be, on each image; default: by precision, as above.",
)
@click.option(
    "--images",
    type=FILE,
    metavar="DIR",
    help="Image files to compare on, 100 at most; default: 20 generated ones.",
)
@common_options
def verify_command(
    bundle: Path, atol: float | None, images: Path | None, as_json: bool, verbose: int, quiet: bool
) -> None:
    """Hold every engine of a bundle against the PyTorch model.

    Checks the files' hashes, then max |Δ| of the logits, top-1 agreement, and that all
    logits are numbers; of TensorRT plans, too, where they can be run here. The model has the
    bundle's own weights: what rounding them costs is not seen (docs/precision.md has figures
    against float32).

    Exit status 1 where an engine fails: where a logit is beyond --atol on any image or, without
    it, beyond a share of the largest logit on more than one image in twenty in fp32 (0.0001), on
    more than half of them in fp16 (0.002), bf16 (0.02) and int8 (0.1). Two pairs of tokens can
    be equally similar to within rounding, and either may be merged.

    \b
    Example:
      tocom-export verify reference-source0 --images photos/
    """
    from tocom_export.bundle.opening import Bundle, plan_name
    from tocom_export.engines.verify import compare, sample_images
    from tocom_export.model.preprocess import find_images

    output = output_of(as_json, verbose, quiet)
    opened = Bundle.open(bundle, hashes=True)
    if not installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")
    from tocom_export.training.torch_engine import Reference

    if images:
        files = find_images(images)[:100]
        batch = opened.preprocess.load_batch(files, opened.spec.image_size)
    else:
        batch = sample_images(opened.spec)
    checks, reference = [], Reference(opened)
    with output.progress("checking", len(opened.targets) + len(opened.plans)) as advance:
        for check in compare(opened, batch, reference, atol):
            advance(f"r{check.target:02d}")
            checks.append(check)
        plans, skipped = _plans(opened, batch, reference, atol, advance)
    output.document(
        {
            "bundle": str(bundle),
            "passed": all(c.passed for c in [*checks, *plans]),
            "targets": [c.to_json() for c in checks],
            "plans": [c.to_json() for c in plans],
            "not_run": skipped,
        }
    )
    rows = [
        [
            name,
            f"{c.max_difference:.2e}",
            f"{c.tolerance:.2e}",
            f"{c.beyond} of {c.images}",
            f"{c.agreement:.1f} %",
            "yes" if c.finite else "NO",
            "passed" if c.passed else "FAILED",
        ]
        for c, name in [
            *((c, opened.graph(c.target).name) for c in checks),
            *((c, plan_name(c.target)) for c in plans),
        ]
    ]
    columns = ["engine", "max |Δ|", "allowed", "images beyond", "same top-1", "finite", ""]
    output.table(columns, rows, f"{bundle} against PyTorch, {len(batch)} images")
    for name, why in skipped.items():
        output.note(f"{name} was not run: {why}")
    if failed := {c.target for c in [*checks, *plans] if not c.passed}:
        degrees = ", ".join(map(str, sorted(failed)))
        raise CheckFailed(f"{bundle}: the engines at {degrees} differ from the PyTorch model.")


def _plans(
    bundle: Bundle,
    images: Any,
    reference: Callable[[int, Any], Any],
    atol: float | None,
    advance: Callable[[str], None],
) -> tuple[list[Comparison], dict[str, str]]:
    """The plans that can be run here, compared; of the others, file name → why not.

    Raises:
        PlanError: a plan or its JSON is missing or damaged.
    """
    from tocom_export.engines.tensorrt.checking import compare_plan
    from tocom_export.engines.tensorrt.plan import open_plan

    checks, skipped = [], {}
    for target in bundle.plans:
        plan = bundle.plan(target)
        advance(plan.name)
        _, record = open_plan(plan)
        if why := _not_to_run(bundle, record):
            skipped[plan.name] = why
            continue
        try:
            judge = partial(reference, target)
            checks.append(compare_plan(bundle, target, images, judge, atol))
        except (PlanError, DeviceError, MissingPackageError) as error:
            skipped[plan.name] = str(error)
    return checks, skipped


def _not_to_run(bundle: Bundle, record: PlanRecord) -> str:
    """Why a plan is not held against the bundle's model; empty where it is to be."""
    if "VERSION_COMPATIBLE" in record.flags:
        return "it brings code along, which verify doesn't let run."
    graph = bundle.refitted.get(record.target, bundle)
    compensated = graph.compensated and record.target != graph.source
    ours = (record.source, record.scale, record.compensated)
    if not record.stripped and ours != (graph.source, graph.scale, compensated):
        return f"it was refitted apart from the graph (source {ours[0]}, scale {ours[1]})."
    return ""
