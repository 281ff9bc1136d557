"""``tocom-export train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bank_table import show_bank
from ..model_options import checkpoint_options, form_options, open_model
from ..options import FILE, FiniteFloat, common_options, method_options
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
    help="Steps between adjacent degrees (default); or, as the paper's ablation has it, one group "
    "for all pairs (of 16 times the rank), or groups of their own for the way down.",
)
@click.option("--rank", type=click.IntRange(1, 64), help="Rank of each step; default: 2.")
@click.option(
    "--scale",
    type=FiniteFloat(0),
    default=0.1,
    help="What the steps are multiplied by while training.",
)
@click.option(
    "--from",
    "start",
    metavar="BANK|zero",
    help="Distil a local bank: for this model alone, on images of its own, from the degree that it "
    "was trained at. It begins with a bank of its backbone, or with nothing (zero).",
)
@click.option(
    "--schedules",
    type=FILE,
    metavar="BUNDLE",
    help="Distil for the variants of a bundle of this model alone, from the degree that it was "
    "trained at.",
)
@click.option("--val", metavar="DATA", help="Images to measure on what the bank gives.")
@training_options(out="bank.safetensors")
@common_options
def train_command(
    model: str | None,
    checkpoint: Path | None,
    method: str | None,
    proportional: bool | None,
    merge: Any,
    loss: Any,
    arithmetic: Any,
    rank: int | None,
    scale: float,
    start: str | None,
    schedules: Path | None,
    **options: Any,
) -> None:
    """Distil a ToCom bank from a model and its images, which need no labels.

    Each step runs the frozen model at one degree as the teacher, and at another, compensated
    by the bank, as the student. Options that have no default here follow the paper: 10 epochs
    of 1,024 images a step, learning rate 2e-3 (in proportion to the batch), RandAugment,
    mixup, CutMix and erasing, on the pre-training images. A local bank (--from) takes some
    600 steps of 64 images at learning rate 4e-3, with random crops alone.

    The state is saved beside --out each minute (.state), and a log is kept (.csv, and
    TensorBoard's where that is installed). Run the same command again to go on with a stopped
    run; Ctrl-C and SIGTERM save and stop it.

    \b
    Examples:
      tocom-export train --checkpoint vit.safetensors --data images/train --out bank.safetensors
      tocom-export train --checkpoint mine.safetensors --data pictures --from bank.safetensors \\
        --out local.safetensors
      torchrun --nproc-per-node 8 --no-python tocom-export train --model deit_base_patch16_224 \\
        --data 'imagenet/train-{0000..1023}.tar' --amp bf16 --workers 12
    """
    require_torch()
    from tocom_export.compensation import choose_method
    from tocom_export.training.bank_report import PAIRS, explain_labels, list_pairs, report_bank
    from tocom_export.training.data.seeding import seed_all
    from tocom_export.training.distill import distill
    from tocom_export.training.local_bank import fit_epochs, load_start, make_bank, plan_degrees
    from tocom_export.training.loop.distributed import join_processes
    from tocom_export.training.settings import DISTILL, LOCAL
    from tocom_export.training.starting import make_network

    output, settings = start_training(options), (LOCAL if start else DISTILL).change(options)
    loaded, out = open_model(model, checkpoint, options, output), options["out"]
    spec, info, known = loaded.spec, loaded.checkpoint.info, load_start(start)
    chosen = choose_method(method, known, info, proportional, merge)
    draw, about = plan_degrees(spec, info.source or 0, bool(start), schedules, chosen.merge)
    about |= {"from": known.sha256} if known else {}
    with join_processes(options["device"], options["amp"]) as process:
        images = open_data(settings, options, loaded, labels=loss == "classes")
        if start and options["epochs"] is None:
            settings = fit_epochs(settings, images.steps_per_epoch)
        val = options["val"]
        judged = open_val(val, options, loaded, output) if val else None
        if unlabelled := judged and explain_labels(loaded, judged, f"`val` {val}"):
            output.note(f"{unlabelled} Accuracy is left out.")
        seed_all(settings.seed)
        bank = make_bank(spec, chosen, known, rank=rank, arithmetic=arithmetic, scale=scale)
        network = make_network(loaded, chosen, settings.drop_path)
        if options["compile"]:
            network.compile()
        with report_steps(output, "distilling", settings, images.steps_per_epoch) as report:
            trained = distill(
                network, bank, images, settings, out,
                loss=loss or ("kl" if spec.classes else "features"), draw=draw, about=about,
                process=process, accumulate=options["accumulate"], report=report,
            )  # fmt: skip
        worth, backbone = None, sum(t.size for t in loaded.checkpoint.tensors.values())
        output.note(  # before it is measured: who stops that has the bank nevertheless
            f"Wrote {out}: {trained.parameters:,} parameters for {spec.model}, "
            f"{100 * trained.parameters / backbone:.2f} % of its own."
        )
        if judged and process.first:
            labelled, bar = not unlabelled, output.progress
            pairs = list_pairs(info.source or 0) if start or schedules else PAIRS
            worth = report_bank(network, bank, judged, pairs, labelled=labelled, progress=bar)
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
