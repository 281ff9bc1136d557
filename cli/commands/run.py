"""``tocom-export run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tocom_export.errors import CheckFailed

from ..options import FILE, common_options, take_output
from ..output import Command
from ..runtime_options import run_options


@click.command("run", cls=Command)
@click.argument("bundle", type=FILE)
@click.option("--variant", help="A name or a bare degree; default: the one of the most MACs.")
@run_options
@click.option("--top-k", type=click.IntRange(1), default=5, help="Classes.")
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
@common_options
def run_command(
    bundle: Path,
    variant: str | None,
    top_k: int,
    images: tuple[Path, ...],
    **options: Any,
) -> None:
    """Classify image files with one engine of a bundle: the likeliest classes.

    \b
    Example:
      tocom-export run reference-source0 --variant r08 cat.jpg dog.png
      tocom-export run reference-source0 --backend openvino --inference-precision f32 cat.jpg
    """
    import numpy as np

    from tocom_export.bundle.opening import Bundle

    output = take_output(options)
    opened = Bundle.open(bundle)
    # A wrong one is told before the images are read.
    chosen = opened.variant(variant or opened.by_cost()[0])
    batch = opened.preprocess.load_batch(images, opened.spec.image_size)
    engine = opened.engine(chosen.name, **options)
    logits = engine.run(batch).astype(np.float64)
    if not np.isfinite(logits).all():
        raise CheckFailed(f"{opened.graph(chosen.name)}: logits are NaN or Inf.")
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = weights / weights.sum(axis=1, keepdims=True)
    documents, rows = [], []
    for file, share in zip(images, shares, strict=True):
        top = share.argsort()[::-1][:top_k]
        names = [opened.classes[i] if opened.classes else f"class {i}" for i in top]
        classes = [
            {"name": name, "index": int(i), "probability": float(share[i])}
            for name, i in zip(names, top, strict=True)
        ]
        documents.append({"file": str(file), "variant": chosen.name, "classes": classes})
        rows += [
            [file.name if place == 0 else "", name, f"{100 * share[i]:.1f} %"]
            for place, (name, i) in enumerate(zip(names, top, strict=True))
        ]
    output.document({"bundle": str(bundle), "engine": engine.about, "images": documents})
    title = f"{opened.spec.model}, {chosen.name}, {engine.about}"
    output.table(["image", "class", "probability"], rows, title)
