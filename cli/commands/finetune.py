"""``tocom-export finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..output import (
    DEGREE,
    FILE,
    Command,
    FiniteFloat,
    common_options,
)
from ..training_options import (
    Settings,
    check_out,
    reporting,
    require_torch,
    training_options,
    training_output,
)

if TYPE_CHECKING:
    from tocom_export.compression.metadata import ModelInfo
    from tocom_export.model.preprocess import Preprocess
    from tocom_export.model.spec import VitSpec


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
    "--image-size",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Train at another image size; position embeddings are resampled.",
)
@click.option(
    "--tune",
    type=click.Choice(["full", "adaptformer"]),
    default="full",
    show_default=True,
    help="All weights, or AdaptFormer's branches and the head while the rest stays as it is.",
)
@click.option(
    "--adapter-width",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Bottleneck of AdaptFormer's branches.",
)
@click.option(
    "--adapter-scale",
    type=FiniteFloat(1e-6),
    default=0.1,
    show_default=True,
    help="What the branches are multiplied by; the paper tries 0.01 to 100.",
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
    "--proportional/--no-proportional",
    default=None,
    help="Whether a merged token weighs as much as those it stands for; default: the "
    "checkpoint's, else yes. MAE backbones want it off.",
)
@click.option("--label-smoothing", type=click.FloatRange(0, 1), help="Share spread over classes.")
@click.option("--val", metavar="DATA", help="Images to measure accuracy on after each epoch.")
@training_options(out="finetuned.safetensors")
@common_options
def finetune_command(
    model: str | None,
    checkpoint: Path | None,
    init: str,
    image_size: int | None,
    tune: str,
    adapter_width: int,
    adapter_scale: float,
    source: int | None,
    method: str | None,
    proportional: bool | None,
    label_smoothing: float | None,
    val: str | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a model at a source degree, from a checkpoint or from scratch.

    The classes are those of --data; a head of other classes is replaced by a new one.
    Options that have no default here follow the paper: with --tune full 30 epochs of 64
    images a step, learning rate 2e-4, RandAugment, mixup, CutMix, erasing and label smoothing;
    with --tune adaptformer 100 epochs, learning rate 1e-3, images only resized.

    The state is saved beside --out each minute (.state), and a log is kept (.csv, and
    TensorBoard's where that is installed). Run the same command again to go on with a stopped
    run; SIGTERM saves and stops it.

    \b
    Examples:
      tocom-export finetune --checkpoint vit.safetensors --source 8 --data flowers/train
      tocom-export finetune --model deit_small_patch16_224 --tune adaptformer \\
        --data torch/cifar100 --data-root data --val torch/cifar100:test
    """
    require_torch()
    from tocom_export.training.loop.defaults import ADAPTFORMER, FULL

    if init == "random" and tune == "adaptformer":
        raise InputError(
            "--tune adaptformer leaves the backbone as it is, and --init random leaves it "
            "untrained; use --tune full, or start from a checkpoint."
        )
    defaults = FULL if tune == "full" else ADAPTFORMER
    settings = Settings.of(options, defaults)
    check_out(settings.out, settings.force)
    from tocom_export.training.adaptformer import add_adapters, freeze_all_but_adapters
    from tocom_export.training.data.evaluation import EvalData
    from tocom_export.training.data.opening import open_images
    from tocom_export.training.data.train import seed_all
    from tocom_export.training.evaluate import accuracy
    from tocom_export.training.finetune import finetune, with_classes
    from tocom_export.training.loop.distributed import placed
    from tocom_export.training.model import CompressedVit
    from tocom_export.training.timm_models import resize_positions, vit_from_spec
    from tocom_export.training.torch_engine import load_weights

    from ..resolve import choose_method

    output = training_output(as_json, verbose, quiet)
    spec, tensors, info, preprocess = _start(model, checkpoint, init)
    if image_size:
        spec, tensors = resize_positions(spec, tensors or {}, (image_size, image_size))
    with placed(settings.device, settings.amp) as placement:
        images = settings.images(spec, preprocess, output)
        if source is None:
            source = info.source or 0
        seed_all(settings.seed)
        spec, tensors = with_classes(spec, tensors, info.classes, images.classes)
        vit = vit_from_spec(spec, settings.drop_path)
        if tensors:
            load_weights(vit, tensors)
        if tune == "adaptformer":
            add_adapters(vit, adapter_width, adapter_scale)
            freeze_all_but_adapters(vit)
        network = CompressedVit(vit, choose_method(method, None, info, proportional), spec.model)
        if settings.compile:
            network.compile()
        test = None
        if val:
            held_out = open_images(
                val, root=settings.data_root, split="test", download=settings.download
            )
            test = EvalData(held_out, spec, preprocess, workers=settings.workers, warn=output.note)
            if test.classes != images.classes:
                raise InputError(
                    f"--val {val} has other classes than --data {settings.data}; "
                    "both need the same names in the same order."
                )
        history: dict[int, float] = {}  # of the epochs since the run was last started

        def after_epoch(epoch: int) -> None:
            if test is not None:
                history[epoch] = accuracy(network, test, source)
                output.note(f"epoch {epoch}: accuracy {history[epoch]:.2f} % on {val}")

        recipe = settings.recipe()
        with reporting(output, "training", recipe, images.steps_per_epoch) as report:
            finetune(
                network,
                images,
                recipe,
                settings.out,
                source=source,
                preprocess=preprocess,
                label_smoothing=(
                    defaults.label_smoothing if label_smoothing is None else label_smoothing
                ),
                placement=placement,
                accumulate=settings.accumulate,
                report=report,
                after_epoch=after_epoch,
            )
    output.document(
        {
            "checkpoint": str(settings.out),
            "model": spec.model,
            "source": source,
            "classes": list(images.classes),
            "accuracy_after_epoch": history,
            "unreadable_images": len(images.unreadable),
        }
    )
    output.note(f"Wrote {settings.out}: {spec.model} with {spec.classes} classes, source {source}.")


def _start(
    model: str | None, checkpoint: Path | None, init: str
) -> tuple[VitSpec, Any, ModelInfo, Preprocess]:
    """Spec, weights (None to start at random), metadata and image statistics."""
    from tocom_export.compression.metadata import ModelInfo
    from tocom_export.model.preprocess import Preprocess
    from tocom_export.training.finetune import read_spec

    from ..resolve import open_model, spec_of

    if init == "checkpoint":
        spec, opened, preprocess = open_model(model, checkpoint)
        return spec, opened.tensors, opened.info, preprocess
    if checkpoint:
        raise InputError("--checkpoint has no meaning with --init random.")
    if model and model.endswith(".json"):
        return read_spec(Path(model)), None, ModelInfo(), Preprocess()
    spec, preprocess = spec_of(model or "reference")
    return spec, None, ModelInfo(), preprocess
