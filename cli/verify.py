"""``tocom-export verify``."""

from __future__ import annotations

from pathlib import Path

import click

from tocom_export.cli.common import (
    FILE,
    Command,
    FiniteFloat,
    common_options,
    installed,
    output_of,
)
from tocom_export.errors import CheckFailed, MissingPackageError


@click.command("verify", cls=Command)
@click.argument("bundle", type=FILE)
@click.option(
    "--atol",
    type=FiniteFloat(0),
    help="What |Δ| of a logit may be; default: 1e-4 of the largest logit.",
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
    logits are numbers. Exit status 1 where an engine fails: where logits are beyond --atol
    or, without it, beyond 1e-4 of the largest on more than one image in twenty (two pairs of
    tokens can be equally similar to within rounding, and either may be merged).

    \b
    Example:
      tocom-export verify reference-source0 --images photos/
    """
    from tocom_export.bundle import Bundle
    from tocom_export.engines.compare import compare, sample_images
    from tocom_export.images import find_images

    output = output_of(as_json, verbose, quiet)
    opened = Bundle.open(bundle, hashes=True)
    if not installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")
    from tocom_export.training.reference import Reference

    if images:
        files = find_images(images)[:100]
        batch = opened.preprocess.load_batch(files, opened.spec.image_size)
    else:
        batch = sample_images(opened.spec)
    checks = []
    with output.progress("checking", len(opened.targets)) as advance:
        for check in compare(opened, batch, Reference(opened), atol):
            advance(f"r{check.target:02d}")
            checks.append(check)
    output.document(
        {
            "bundle": str(bundle),
            "passed": all(c.passed for c in checks),
            "targets": [c.to_json() for c in checks],
        }
    )
    rows = [
        [
            opened.graph(c.target).name,
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
    output.table(columns, rows, f"{bundle} against PyTorch, {len(batch)} images")
    if failed := [c for c in checks if not c.passed]:
        degrees = ", ".join(str(c.target) for c in failed)
        raise CheckFailed(f"{bundle}: the engines at {degrees} differ from the PyTorch model.")
