"""``tocom-export verify``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, DeviceError, MissingPackageError, PlanError
from tocom_export.loading import is_installed

from ..options import FILE, FiniteFloat, common_options, take_output
from ..output import Command, Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.tensorrt.plan import PlanRecord
    from tocom_export.engines.verify import Comparison, Oracle


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
def verify_command(bundle: Path, atol: float | None, images: Path | None, **options: Any) -> None:
    """Hold every engine of a bundle against the PyTorch model.

    Checks the files' hashes, then max |Δ| of the logits, top-1 agreement, and that no logit is
    NaN or Inf; of TensorRT plans, too, where they can be run here. The model has the bundle's own
    weights: what rounding them costs is not seen (docs/precision.md has figures against float32).

    Exit status 1 where an engine fails: where a logit is beyond --atol on any image or, without
    it, beyond a share of the largest logit on more than one image in twenty in fp32 (0.0001), on
    more than half of them in fp16 (0.002), bf16 (0.02) and int8 (0.1). Two pairs of tokens can
    be equally similar to within rounding, and either may be merged.

    \b
    Example:
      tocom-export verify reference-source0 --images photos/
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.verify import sample_images, verify
    from tocom_export.model.preprocess import find_images

    output = take_output(options)
    opened = Bundle.open(bundle, hashes=True)
    if not is_installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")
    from tocom_export.training.torch_engine import make_oracle

    if images:
        files = find_images(images)[:100]
        batch = opened.preprocess.load_batch(files, opened.spec.image_size)
    else:
        batch = sample_images(opened.spec)
    checks, oracle = [], make_oracle(opened)
    with output.progress("checking", len(opened.variants) + len(opened.plans)) as advance:
        for check in verify(opened, batch, oracle, atol=atol):
            advance(check.variant)
            checks.append(check)
        plans, skipped = _verify_plans(opened, batch, oracle, atol, advance)
    _report(opened, [*checks, *plans], skipped, len(batch), output)


def _report(
    bundle: Bundle, checks: list[Comparison], skipped: dict[str, str], images: int, output: Output
) -> None:
    """Raise CheckFailed, after all is told, where an engine failed."""
    passed = all(check.passed for check in checks)
    output.document(
        {
            "bundle": str(bundle.path),
            "passed": passed,
            "engines": [check.to_json() for check in checks],
            "not_run": skipped,
        }
    )
    rows = [
        [
            c.engine,
            f"{c.max_difference:.2e}",
            f"{c.tolerance:.2e}",
            f"{c.beyond} of {c.images}",
            f"{c.agreement:.1f} %",
            "yes" if c.finite else "NO",
            "passed" if c.passed else "FAILED",
        ]
        for c in checks
    ]
    columns = ["engine", "max |Δ|", "allowed", "images beyond", "same top-1", "finite", ""]
    output.table(columns, rows, f"{bundle.path} against PyTorch, {images} images")
    for name, why in skipped.items():
        output.note(f"{name} was not run: {why}")
    if not passed:
        failed = [check.engine for check in checks if not check.passed]
        differ = "differs" if len(failed) == 1 else "differ"
        raise CheckFailed(f"{bundle.path}: {', '.join(failed)} {differ} from the PyTorch model.")


def _verify_plans(
    bundle: Bundle,
    images: Any,
    oracle: Oracle,
    atol: float | None,
    advance: Callable[[str], None],
) -> tuple[list[Comparison], dict[str, str]]:
    """The plans that can be run here, compared; of the others, file name → why not.

    Raises:
        PlanError: a plan or its JSON is missing or damaged.
    """
    from tocom_export.engines.tensorrt.plan import check_plan, open_plan
    from tocom_export.engines.verify import verify

    checks: list[Comparison] = []
    skipped: dict[str, str] = {}
    for name in bundle.plans:
        plan = bundle.plan(name)
        advance(plan.name)
        _, record = open_plan(plan)
        check_plan(bundle, name, record)
        if why := _explain_skipping(bundle, record):
            skipped[plan.name] = why
            continue
        try:
            checks += verify(
                bundle, images, oracle, backend=record.backend, variants=[name], atol=atol
            )
        except (PlanError, DeviceError, MissingPackageError) as error:
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
