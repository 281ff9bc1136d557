"""``tocom-export train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bank_table import show_bank
from ..model_options import checkpoint_options, form_options, open_model
from ..options import FiniteFloat, common_options, method_options
from ..output import Command, Output
from ..training_options import (
    open_data,
    open_val,
    report_steps,
    require_torch,
    start_training,
    training_options,
)

if TYPE_CHECKING:
    from tocom_export.compression.bank import ToComBank
    from tocom_export.training.bank_report import BankReport


@click.command("train", cls=Command)
@click.option(
    "--model",
    metavar="NAME",
    help="A timm model name; default: what the checkpoint's metadata say, else 'reference'.",
)
@checkpoint_options("The model's weights.")
@form_options
@method_options("the checkpoint's, else tome")
@click.option(
    "--loss",
    type=click.Choice(["kl", "features", "classes"]),
    help="Soft targets of the teacher, its embedding (L1), or labels; default: kl, and "
    "features where the model has no head.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["steps", "shared", "no-inversion"]),
    default="steps",
    help="Steps between adjacent degrees; or, as the paper's ablation has it, one group for all "
    "pairs (of 16 times the rank), or groups of their own for the way down.",
)
@click.option("--rank", type=click.IntRange(1, 64), default=2, help="Rank of each step.")
@click.option(
    "--scale",
    type=FiniteFloat(0),
    default=0.1,
    help="What the steps are multiplied by while training.",
)
@click.option("--val", metavar="DATA", help="Images to measure on what the bank gives.")
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
    **options: Any,
) -> None:
    """Distil a ToCom bank from a model and its pre-training images.

    Each step runs the frozen model at one degree as the teacher, and at another, compensated
    by the bank, as the student. Options that have no default here follow the paper: 10 epochs
    of 1,024 images a step, learning rate 2e-3 (in proportion to the batch), RandAugment,
    mixup, CutMix and erasing.

    The state is saved beside --out each minute (.state), and a log is kept (.csv, and
    TensorBoard's where that is installed). Run the same command again to go on with a stopped
    run; Ctrl-C and SIGTERM save and stop it.

    \b
    Examples:
      tocom-export train --checkpoint vit.safetensors --data images/train --out bank.safetensors
      torchrun --nproc-per-node 8 --no-python tocom-export train --model deit_base_patch16_224 \\
        --data 'imagenet/train-{0000..1023}.tar' --amp bf16 --workers 12
    """
    require_torch()
    from tocom_export.compensation import choose_method
    from tocom_export.compression.schedule import MAX_DEGREE
    from tocom_export.training.bank_report import explain_labels, report_bank
    from tocom_export.training.data.seeding import seed_all
    from tocom_export.training.distill import distill
    from tocom_export.training.loop.distributed import join_processes
    from tocom_export.training.lora import TrainableBank
    from tocom_export.training.settings import DISTILL
    from tocom_export.training.starting import make_network

    output, settings = start_training(options), DISTILL.change(options)
    loaded, out = open_model(model, checkpoint, options, output), options["out"]
    spec = loaded.spec
    chosen = choose_method(method, None, loaded.checkpoint.info, proportional)
    with join_processes(options["device"], options["amp"]) as process:
        images = open_data(settings, options, loaded)
        val = options["val"]
        judged = open_val(val, options, loaded, output) if val else None
        if unlabelled := judged and explain_labels(loaded, judged, f"`val` {val}"):
            output.note(f"{unlabelled} Accuracy is left out.")
        seed_all(settings.seed)
        rank *= MAX_DEGREE if arithmetic == "shared" else 1
        bank = TrainableBank(spec, chosen, rank=rank, scale=scale, arithmetic=arithmetic)
        network = make_network(loaded, chosen, settings.drop_path)
        if options["compile"]:
            network.compile()
        with report_steps(output, "distilling", settings, images.steps_per_epoch) as report:
            trained = distill(
                network, bank, images, settings, out,
                loss=loss or ("kl" if spec.classes else "features"),
                process=process, accumulate=options["accumulate"], report=report,
            )  # fmt: skip
        worth, backbone = None, sum(t.size for t in loaded.checkpoint.tensors.values())
        output.note(  # before it is measured: who stops that has the bank nevertheless
            f"Wrote {out}: {trained.parameters:,} parameters for {spec.model}, "
            f"{100 * trained.parameters / backbone:.2f} % of its own."
        )
        if judged and process.first:
            labelled, bar = not unlabelled, output.progress
            worth = report_bank(network, bank, judged, labelled=labelled, progress=bar)
        process.wait()
    _report(options, trained, backbone, worth, len(images.unreadable), output)


def _report(
    options: Mapping[str, Any], bank: ToComBank, backbone: int, worth: BankReport | None,
    unreadable: int, output: Output,
) -> None:  # fmt: skip
    output.document(
        {
            "bank": str(options["out"]),
            "model": bank.model,
            "parameters": bank.parameters,
            "backbone_parameters": backbone,
            "unreadable_images": unreadable,
            **({"val": worth.to_json()} if worth else {}),
        }
    )
    if worth:
        show_bank(worth, options["val"], output)
    elif not options["val"]:
        output.note("What it gives, `val` DATA would measure.")
