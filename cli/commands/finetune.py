"""``tocom-export finetune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..model_options import checkpoint_options, form_options, open_model
from ..options import DEGREE, FiniteFloat, common_options, method_options
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
    from tocom_export.loading import Model
    from tocom_export.training.model import CompressedVit


@click.command("finetune", cls=Command)
@click.option(
    "--model",
    metavar="NAME",
    help="A timm model name, or a .json file with a model "
    "spec; default: what the checkpoint's metadata say, else 'reference'.",
)
@checkpoint_options("Weights to start from.")
@form_options
@click.option(
    "--init",
    type=click.Choice(["checkpoint", "random"]),
    default="checkpoint",
    help="'random' trains from scratch.",
)
@click.option(
    "--tune",
    type=click.Choice(["full", "adaptformer"]),
    default="full",
    help="All weights, or AdaptFormer's branches and the head while the rest stays as it is.",
)
@click.option(
    "--adapter-width",
    type=click.IntRange(1),
    default=32,
    help="Bottleneck of AdaptFormer's branches.",
)
@click.option(
    "--adapter-scale",
    type=FiniteFloat(1e-6),
    default=0.1,
    help="What the branches are multiplied by; the paper tries 0.01 to 100.",
)
@click.option(
    "--source",
    type=DEGREE,
    help="Degree to train at; default: what the checkpoint's metadata say, else 0.",
)
@method_options("the checkpoint's, else tome")
@click.option("--label-smoothing", type=click.FloatRange(0, 1), help="Share spread over classes.")
@click.option("--val", metavar="DATA", help="Images to measure accuracy on after each epoch.")
@training_options(out="finetuned.safetensors")
@common_options
def finetune_command(
    model: str | None,
    checkpoint: Path | None,
    init: str,
    source: int | None,
    val: str | None,
    **options: Any,
) -> None:
    """Train a model at a source degree, from a checkpoint or from scratch.

    The classes are those of --data; a head of other classes is replaced by a new one.
    Options that have no default here follow the paper: with --tune full 30 epochs of 64
    images a step, learning rate 2e-4, RandAugment, mixup, CutMix, erasing and label smoothing;
    with --tune adaptformer 100 epochs, learning rate 1e-3, images only resized.

    The state is saved beside --out each minute (.state), and a log is kept (.csv, and
    TensorBoard's where that is installed). Run the same command again to go on with a stopped
    run; Ctrl-C and SIGTERM save and stop it.

    \b
    Examples:
      tocom-export finetune --checkpoint vit.safetensors --source 8 --data flowers/train
      tocom-export finetune --model deit_small_patch16_224 --tune adaptformer \\
        --data torch/cifar100 --data-root data --val torch/cifar100:test
    """
    require_torch()
    from tocom_export.training.data.seeding import seed_all
    from tocom_export.training.finetune import finetune
    from tocom_export.training.loop.distributed import join_processes
    from tocom_export.training.settings import ADAPTFORMER, FULL
    from tocom_export.training.starting import change_classes

    output, out = start_training(options), options["out"]
    settings = (FULL if options["tune"] == "full" else ADAPTFORMER).change(options)
    start = _open_start(model, checkpoint, init, options, output)
    with join_processes(options["device"], options["amp"]) as process:
        images = open_data(settings, options, start)
        source = start.checkpoint.info.source or 0 if source is None else source
        seed_all(settings.seed)
        start = change_classes(start, images.classes)
        network = _make_network(start, settings.drop_path, options)
        accuracy = _Accuracy(val, options, start, images.classes, output)
        with report_steps(output, "training", settings, images.steps_per_epoch) as report:
            finetune(
                network,
                images,
                settings,
                out,
                source=source,
                preprocess=start.preprocess,
                label_smoothing=settings.label_smoothing,
                process=process,
                accumulate=options["accumulate"],
                report=report,
                after_epoch=partial(accuracy.measure, network, source),
            )
    output.document(
        {
            "checkpoint": str(out),
            "model": start.spec.model,
            "source": source,
            "classes": list(images.classes),
            "accuracy_after_epoch": accuracy.history,
            "unreadable_images": len(images.unreadable),
        }
    )
    output.note(
        f"Wrote {out}: {start.spec.model} with {start.spec.classes} classes, source {source}."
    )


def _open_start(
    model: str | None,
    checkpoint: Path | None,
    init: str,
    options: Mapping[str, Any],
    output: Output,
) -> Model:
    from tocom_export.training.starting import start_at_random

    if init == "checkpoint":
        return open_model(model, checkpoint, options, output)
    if options["tune"] == "adaptformer":
        raise InputError(
            "`tune` adaptformer leaves the backbone as it is, and `init` random leaves it "
            "untrained; use `tune` full, or start from a checkpoint."
        )
    given = {"checkpoint": checkpoint, **options}
    if named := next((n for n in ("checkpoint", "weights_key", "pool") if given[n]), None):
        raise InputError(f"`{named}` has no meaning with `init` random.")
    return start_at_random(model, options["image_size"])


def _make_network(start: Model, drop_path: float, options: Mapping[str, Any]) -> CompressedVit:
    from tocom_export.compensation import choose_method
    from tocom_export.training.starting import make_network

    info = start.checkpoint.info
    asked = (options["method"], None, info, options["proportional"], options["merge"])
    method = choose_method(*asked)
    adapter = (options["adapter_width"], options["adapter_scale"])
    adapter_if_any = adapter if options["tune"] == "adaptformer" else None
    network = make_network(start, method, drop_path, adapter_if_any)
    if options["compile"]:
        network.compile()
    return network


class _Accuracy:
    """Accuracy on the images of ``--val``, if any, after each epoch.

    Raises:
        InputError: its classes are not those that are trained.
    """

    def __init__(
        self,
        val: str | None,
        options: Mapping[str, Any],
        start: Model,
        classes: Sequence[str],
        output: Output,
    ) -> None:
        self.history: dict[int, float] = {}
        """In percent; of the epochs since the run was last started."""
        self._val, self._output = val, output
        if val is None:
            return
        self._images = open_val(val, options, start, output)
        if self._images.classes != tuple(classes):
            raise InputError(
                f"`val` {val} has other classes than `data` {options['data']}; both need the same "
                "names in the same order."
            )

    def measure(self, network: CompressedVit, degree: int, epoch: int) -> None:
        from tocom_export.training.torch_engine import evaluate_model

        if self._val is not None:
            self.history[epoch] = evaluate_model(network, self._images, degree)
            told = f"{self.history[epoch]:.2f} % on {self._val}"
            self._output.note(f"epoch {epoch}: accuracy {told}")
