"""``tocom-export finetune``."""

from __future__ import annotations

from pathlib import Path

import click

from tocom_export.cli.common import (
    DEGREE,
    FILE,
    Command,
    FiniteFloat,
    common_options,
    output_of,
)
from tocom_export.cli.training import check_out, recipe_options, reporting, require_torch
from tocom_export.errors import InputError


@click.command("finetune", cls=Command)
@click.option(
    "--model",
    metavar="NAME",
    help="A timm model name, or a .json file with a model "
    "spec; default: what the checkpoint's metadata say, else 'reference'.",
)
@click.option("--checkpoint", type=FILE, metavar="FILE", help="Weights to start from.")
@click.option(
    "--init",
    type=click.Choice(["checkpoint", "random"]),
    default="checkpoint",
    show_default=True,
    help="'random' trains from scratch.",
)
@click.option(
    "--source",
    type=DEGREE,
    help="Degree to train at; default: what the checkpoint's metadata say, else 0.",
)
@click.option(
    "--method",
    type=click.Choice(["tome", "evit"]),
    help="Merge or prune; default: the checkpoint's, else tome.",
)
@click.option(
    "--val", type=FILE, metavar="DIR", help="Images to measure accuracy on after each epoch."
)
@click.option(
    "--warmup", type=click.IntRange(0), default=0, show_default=True, help="Epochs of warm-up."
)
@click.option("--clip", type=FiniteFloat(1e-12), help="Largest norm of the gradient.")
@recipe_options(epochs=30, batch=64, lr=2e-4, out="finetuned.safetensors")
@common_options
def finetune_command(
    model: str | None,
    checkpoint: Path | None,
    init: str,
    source: int | None,
    method: str | None,
    val: Path | None,
    warmup: int,
    clip: float | None,
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
    """Train a model at a source degree, from a checkpoint or from scratch.

    The classes are the folders in --data; a head of another size is replaced by a new one.
    The state is saved beside --out each minute
    (.state), and a log is kept (.csv). Run the same command again to continue a stopped run.

    \b
    Example:
      tocom-export finetune --checkpoint vit.safetensors --source 8 --data flowers/train
    """
    require_torch()
    check_out(out, force)
    from tocom_export.cli.resolve import choose_method, open_model, spec_of
    from tocom_export.images import Preprocess
    from tocom_export.info import ModelInfo
    from tocom_export.training.data import TrainData, eval_loader, seed_all
    from tocom_export.training.evaluate import accuracy
    from tocom_export.training.finetune import finetune, read_spec, with_classes
    from tocom_export.training.loop import Recipe
    from tocom_export.training.model import CompressedVit
    from tocom_export.training.reference import load_weights
    from tocom_export.training.zoo import vit_from_spec

    output = output_of(as_json, verbose, quiet)
    if init == "random":
        if checkpoint:
            raise InputError("--checkpoint has no meaning with --init random.")
        if model and model.endswith(".json"):
            spec, preprocess = read_spec(Path(model)), Preprocess()
        else:
            spec, preprocess = spec_of(model or "reference")
        tensors, info = None, ModelInfo()
    else:
        spec, opened, preprocess = open_model(model, checkpoint)
        tensors, info = opened.tensors, opened.info
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
    if source is None:
        source = info.source or 0
    seed_all(seed)
    spec, tensors = with_classes(spec, tensors, len(images.classes))
    vit = vit_from_spec(spec)
    if tensors is not None:
        load_weights(vit, tensors)
    network = CompressedVit(vit, choose_method(method, None, info), spec.model)
    test = eval_loader(val, spec, preprocess) if val else None
    if test is not None and tuple(test.dataset.classes) != images.classes:  # type: ignore[attr-defined]
        raise InputError(f"--val {val} has other class folders than --data {data}.")
    history: list[float] = []

    def after_epoch(epoch: int) -> None:
        if test is not None:
            history.append(accuracy(network, test, source))
            output.note(f"epoch {epoch}: accuracy {history[-1]:.2f} % on {val}")

    recipe = Recipe(epochs, batch, lr, warmup_epochs=warmup, clip=clip, seed=seed)
    with reporting(output, "training", recipe, images.steps_per_epoch) as report:
        finetune(
            network,
            images,
            recipe,
            out,
            source=source,
            preprocess=preprocess,
            report=report,
            after_epoch=after_epoch,
        )
    output.document(
        {
            "checkpoint": str(out),
            "model": spec.model,
            "source": source,
            "classes": list(images.classes),
            "accuracy": history,
        }
    )
    output.note(f"Wrote {out}: {spec.model} with {spec.classes} classes, source {source}.")
