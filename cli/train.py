"""``tocom-export train``."""

from __future__ import annotations

from pathlib import Path

import click

from tocom_export.cli.common import (
    FILE,
    Command,
    FiniteFloat,
    common_options,
    output_of,
)
from tocom_export.cli.training import check_out, recipe_options, reporting, require_torch


@click.command("train", cls=Command)
@click.option(
    "--model",
    metavar="NAME",
    help="A timm model name; default: what the checkpoint's metadata say, else 'reference'.",
)
@click.option("--checkpoint", type=FILE, metavar="FILE", help="The model's weights.")
@click.option(
    "--method",
    type=click.Choice(["tome", "evit"]),
    help="Merge or prune; default: the checkpoint's, else tome.",
)
@click.option(
    "--rank", type=click.IntRange(1, 64), default=2, show_default=True, help="Rank of each step."
)
@click.option(
    "--scale",
    type=FiniteFloat(0),
    default=0.1,
    show_default=True,
    help="What the steps are multiplied by while training.",
)
@recipe_options(epochs=10, batch=128, lr=1e-3, out="bank.safetensors")
@common_options
def train_command(
    model: str | None,
    checkpoint: Path | None,
    method: str | None,
    rank: int,
    scale: float,
    data: Path,
    out: Path,
    force: bool,
    epochs: int,
    batch: int,
    lr: float,
    crop_scale: float,
    augment: str | None,
    seed: int,
    workers: int,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Distil a ToCom bank from a model and its pre-training images.

    Each step runs the frozen model at one degree as the teacher, and at another, compensated
    by the bank, as the student. The state is saved beside --out each minute
    (.state), and a log is kept (.csv). Run the same command again to continue a stopped run.

    \b
    Example:
      tocom-export train --checkpoint vit.safetensors --data images/train --out bank.safetensors
    """
    require_torch()
    check_out(out, force)
    from tocom_export.cli.resolve import choose_method, open_model
    from tocom_export.training.data import TrainData, seed_all
    from tocom_export.training.distill import distill
    from tocom_export.training.loop import Recipe
    from tocom_export.training.lowrank import TrainableBank
    from tocom_export.training.reference import load_model

    output = output_of(as_json, verbose, quiet)
    spec, opened, preprocess = open_model(model, checkpoint)
    chosen = choose_method(method, None, opened.info)
    images = TrainData(
        data,
        spec,
        preprocess,
        batch,
        crop_scale=crop_scale,
        augment=augment,
        seed=seed,
        workers=workers,
    )
    seed_all(seed)
    bank = TrainableBank(spec, chosen, rank=rank, scale=scale)
    recipe = Recipe(epochs, batch, lr, seed=seed)
    with reporting(output, "distilling", recipe, images.steps_per_epoch) as report:
        trained = distill(
            load_model(spec, opened.tensors, chosen), bank, images, recipe, out, report=report
        )
    output.document({"bank": str(out), "model": spec.model, "parameters": trained.parameters})
    output.note(f"Wrote {out}: {trained.parameters} parameters for {spec.model}.")
