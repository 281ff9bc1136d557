"""``tocom-export run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tocom_export.errors import CheckFailed

from ..output import DEGREE, FILE, Command, common_options, output_of

if TYPE_CHECKING:
    from tocom_export.engines.onnx.engine import Provider


@click.command("run", cls=Command)
@click.argument("bundle", type=FILE)
@click.option("--target", type=DEGREE, required=True, help="Degree of the engine to run.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime runs it.",
)
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
@common_options
def run_command(
    bundle: Path,
    target: int,
    provider: Provider,
    images: tuple[Path, ...],
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Classify image files with one engine of a bundle: the five likeliest classes.

    \b
    Example:
      tocom-export run reference-source0 --target 8 cat.jpg dog.png
    """
    import numpy as np

    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.onnx.engine import OnnxEngine

    output = output_of(as_json, verbose, quiet)
    opened = Bundle.open(bundle)
    opened.graph(target)  # a wrong target is told before the images are read
    batch = opened.preprocess.load_batch(images, opened.spec.image_size)
    logits = OnnxEngine(opened, target, provider=provider).run(batch).astype(np.float64)
    if not np.isfinite(logits).all():
        raise CheckFailed(f"{opened.graph(target)} gave logits that are not numbers.")
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = weights / weights.sum(axis=1, keepdims=True)
    documents, rows = [], []
    for file, share in zip(images, shares, strict=True):
        top = share.argsort()[::-1][:5]
        names = [opened.classes[i] if opened.classes else f"class {i}" for i in top]
        documents.append(
            {
                "image": str(file),
                "top5": [
                    {"class": n, "index": int(i), "probability": float(share[i])}
                    for n, i in zip(names, top, strict=True)
                ],
            }
        )
        rows += [
            [file.name if place == 0 else "", name, f"{100 * share[i]:.1f} %"]
            for place, (name, i) in enumerate(zip(names, top, strict=True))
        ]
    output.document({"bundle": str(bundle), "target": target, "images": documents})
    output.table(["image", "class", "probability"], rows, f"{opened.spec.model} at degree {target}")
