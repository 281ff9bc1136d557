"""``tocom-export train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..output import FILE, Command, FiniteFloat, common_options
from ..training_options import (
    Settings,
    check_out,
    reporting,
    require_torch,
    training_options,
    training_output,
)


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
    "--proportional/--no-proportional",
    default=None,
    help="Whether a merged token weighs as much as those it stands for; default: the "
    "checkpoint's, else yes. MAE backbones want it off.",
)
@click.option(
    "--loss",
    type=click.Choice(["kl", "features", "classes"]),
    help="Soft targets of the teacher, its pooled features (L1), or labels; default: kl, and "
    "features where the model has no head.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["steps", "shared", "no-inversion"]),
    default="steps",
    show_default=True,
    help="Steps between adjacent degrees; or, as the paper's ablation has it, one group for all "
    "pairs (of 16 times the rank), or groups of their own for the way down.",
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
@training_options(out="bank.safetensors")
@common_options
def train_command(
    model: str | None,
    checkpoint: Path | None,
    method: str | None,
    proportional: bool | None,
    loss: Any,
    arithmetic: Any,
    rank: int,
    scale: float,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Distil a ToCom bank from a model and its pre-training images.

    Each step runs the frozen model at one degree as the teacher, and at another, compensated
    by the bank, as the student. Options that have no default here follow the paper: 10 epochs
    of 1,024 images a step, learning rate 2e-3 (in proportion to the batch), RandAugment,
    mixup, CutMix and erasing.

    The state is saved beside --out each minute (.state), and a log is kept (.csv, and
    TensorBoard's where that is installed). Run the same command again to go on with a stopped
    run; SIGTERM saves and stops it.

    \b
    Examples:
      tocom-export train --checkpoint vit.safetensors --data images/train --out bank.safetensors
      torchrun --nproc-per-node 8 --no-python tocom-export train --model deit_base_patch16_224 \\
        --data 'imagenet/train-{0000..1023}.tar' --amp bf16 --workers 12
    """
    require_torch()
    from tocom_export.training.loop.defaults import DISTILL

    settings = Settings.of(options, DISTILL)
    check_out(settings.out, settings.force)
    from tocom_export.compression.schedule import MAX_DEGREE
    from tocom_export.training.data.train import seed_all
    from tocom_export.training.distill import distill
    from tocom_export.training.loop.distributed import placed
    from tocom_export.training.lora import TrainableBank
    from tocom_export.training.torch_engine import load_model

    from ..resolve import choose_method, open_model

    output = training_output(as_json, verbose, quiet)
    spec, opened, preprocess = open_model(model, checkpoint)
    chosen = choose_method(method, None, opened.info, proportional)
    with placed(settings.device, settings.amp) as placement:
        images = settings.images(spec, preprocess, output)
        seed_all(settings.seed)
        bank = TrainableBank(
            spec,
            chosen,
            rank=rank * (MAX_DEGREE if arithmetic == "shared" else 1),
            scale=scale,
            arithmetic=arithmetic,
        )
        network = load_model(spec, opened.tensors, chosen, drop_path=settings.drop_path)
        if settings.compile:
            network.compile()
        recipe = settings.recipe()
        with reporting(output, "distilling", recipe, images.steps_per_epoch) as report:
            trained = distill(
                network,
                bank,
                images,
                recipe,
                settings.out,
                loss=loss or ("kl" if spec.classes else "features"),
                placement=placement,
                accumulate=settings.accumulate,
                report=report,
            )
    backbone = sum(t.size for t in opened.tensors.values())
    share = 100 * trained.parameters / backbone
    output.document(
        {
            "bank": str(settings.out),
            "model": spec.model,
            "parameters": trained.parameters,
            "backbone_parameters": backbone,
            "unreadable_images": len(images.unreadable),
        }
    )
    output.note(
        f"Wrote {settings.out}: {trained.parameters:,} parameters for {spec.model}, "
        f"{share:.2f} % of its own."
    )
