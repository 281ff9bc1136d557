"""Options, data and progress that ``train`` and ``finetune`` share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import MissingPackageError, OutputError

from .output import (
    FILE,
    F,
    FiniteFloat,
    Output,
    installed,
    output_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tocom_export.model.preprocess import Preprocess
    from tocom_export.model.spec import VitSpec
    from tocom_export.training.data.train import TrainData
    from tocom_export.training.loop.defaults import Defaults
    from tocom_export.training.loop.loop import Recipe, Report


@dataclass(frozen=True)
class Settings:
    """The shared options, under the names of their parameters."""

    data: str
    data_root: Path | None
    download: bool
    workers: int
    out: Path
    force: bool
    epochs: int
    batch: int
    accumulate: int
    lr: float
    weight_decay: float
    warmup: int
    clip: float | None
    drop_path: float
    augment: str
    flip: bool
    crop_scale: float
    mixup: float
    cutmix: float
    erasing: float
    seed: int
    device: str | None
    amp: Any
    compile: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], defaults: Defaults) -> Settings:
        """Options as Click hands them over; where one is None, the recipe's.

        A learning rate that isn't given grows with the batch, and a warm-up that isn't given is
        shorter in a run that is.
        """
        values: dict[str, Any] = {
            field.name: options[field.name]
            if options[field.name] is not None
            else getattr(defaults, field.name, None)
            for field in fields(cls)
        }
        if options["lr"] is None:
            values["lr"] = defaults.lr * values["batch"] / defaults.batch
        if options["warmup"] is None:
            share = defaults.warmup * values["epochs"] // defaults.epochs
            values["warmup"] = min(defaults.warmup, share)
        return cls(**values)

    def recipe(self) -> Recipe:
        """What the training loop reads of them."""
        from tocom_export.training.loop.loop import Recipe

        return Recipe(
            self.epochs,
            self.batch,
            self.lr,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup,
            clip=self.clip,
            seed=self.seed,
        )

    def images(self, spec: VitSpec, preprocess: Preprocess, output: Output) -> TrainData:
        """The training images, opened."""
        from tocom_export.training.data.opening import open_images
        from tocom_export.training.data.train import TrainData

        return TrainData(
            open_images(self.data, root=self.data_root, download=self.download),
            spec,
            preprocess,
            self.batch,
            augment=self.augment,
            flip=self.flip,
            crop_scale=self.crop_scale,
            erasing=self.erasing,
            mixup=self.mixup,
            cutmix=self.cutmix,
            seed=self.seed,
            workers=self.workers,
            warn=partial(click.echo, err=True),  # whichever process meets them
        )


def _safetensors(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """Refuse a name that would say another format than the file's."""
    if value.suffix != ".safetensors":
        raise click.BadParameter(f"{value} should end in .safetensors.", ctx, param)
    return value


DATA_HELP = (
    "Images: a folder <DIR>/<class>/<image>, WebDataset shards (a folder of .tar files, or "
    "'train-{000..127}.tar'), or a timm data set as torch/cifar10 or hfds/<name>[:<split>]."
)
_SHARE = click.FloatRange(0, 1)
_OPTIONS = (
    click.option("--data", required=True, metavar="DATA", help=DATA_HELP),
    click.option("--data-root", type=FILE, metavar="DIR", help="Where a timm data set lies."),
    click.option("--download", is_flag=True, help="Let timm download the data set."),
    click.option("--force", is_flag=True, help="Replace an existing --out."),
    click.option("--epochs", type=click.IntRange(1), help="Passes over the images."),
    click.option(
        "--batch",
        type=click.IntRange(1),
        help="Images a step, over all processes; an epoch's last, smaller batch is left out.",
    ),
    click.option(
        "--accumulate",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Parts that a process takes its share of a batch in; more need less memory.",
    ),
    click.option(
        "--lr",
        type=FiniteFloat(1e-12),
        help="Learning rate at its peak; default: the recipe's, in proportion to --batch.",
    ),
    click.option("--weight-decay", type=FiniteFloat(0), help="AdamW's."),
    click.option(
        "--warmup",
        type=click.IntRange(0),
        help="Of the epochs, those in which the learning rate rises.",
    ),
    click.option("--clip", type=FiniteFloat(1e-12), help="Largest norm of the gradient."),
    click.option("--drop-path", type=_SHARE, help="Stochastic depth of the last layer."),
    click.option(
        "--augment",
        metavar="TEXT",
        help="timm's RandAugment, such as rand-m9-mstd0.5-inc1; 'crop' for random crops alone; "
        "'none' only resizes.",
    ),
    click.option(
        "--flip/--no-flip",
        default=True,
        show_default=True,
        help="Mirror images at random, unless --augment none.",
    ),
    click.option(
        "--crop-scale",
        type=click.FloatRange(0.01, 1),
        default=0.08,
        show_default=True,
        help="Smallest share of an image that a random crop keeps.",
    ),
    click.option("--mixup", type=FiniteFloat(0), help="Mixup's alpha; 0 for none."),
    click.option("--cutmix", type=FiniteFloat(0), help="CutMix's alpha; 0 for none."),
    click.option("--erasing", type=_SHARE, help="Probability of random erasing."),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Processes that load images; has no influence on the outcome.",
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: CUDA if any."),
    click.option(
        "--amp",
        type=click.Choice(["none", "bf16", "fp16"]),
        default="none",
        show_default=True,
        help="Autocast's precision.",
    ),
    click.option("--compile", is_flag=True, help="Compile the MLPs with torch.compile."),
)


def training_options(*, out: str) -> Callable[[F], F]:
    """The options of :class:`Settings`; those without a default are the recipe's."""

    def add(function: F) -> F:
        out_option = click.option(
            "--out",
            type=FILE,
            callback=_safetensors,
            default=out,
            show_default=True,
            metavar="FILE",
            help="File to write.",
        )
        for option in (*reversed(_OPTIONS), out_option):
            function = option(function)
        return function

    return add


def require_torch() -> None:
    """Raise MissingPackageError where torch or timm is not installed."""
    if not installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")


def training_output(as_json: bool, verbose: int, quiet: bool) -> Output:
    """The command's output; of several processes only the first one speaks."""
    if int(os.environ.get("RANK", 0)):
        return Output(False, -1)
    return output_of(as_json, verbose, quiet)


def check_out(out: Path, force: bool) -> None:
    """Refuse to replace a finished result unasked."""
    if out.exists() and not force:
        raise OutputError(f"--out {out} exists; add --force to replace it, or name another file.")


@contextmanager
def reporting(output: Output, title: str, recipe: Recipe, steps: int) -> Iterator[Report]:
    """A progress bar on a terminal; else one line for each hundredth of the run.

    Args:
        steps: steps of an epoch.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = console.is_terminal and output.verbosity >= 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(title, total=recipe.epochs * steps)
        began, first = time.monotonic(), 0

        def report(step: int, total: int, loss: float, lr: float) -> None:
            nonlocal began, first
            if not first:
                began, first = time.monotonic(), step
                if step > 1:
                    output.note(f"{title} continues after step {step - 1} of {total}")
            pace = (step - first) / max(time.monotonic() - began, 1e-9)  # steps a second
            speed = f" {pace * recipe.batch:.0f} images/s" if step > first else ""
            epoch = f"epoch {(step - 1) // steps + 1}/{recipe.epochs}"
            bar.update(task, completed=step, description=f"{title} {epoch}, loss {loss:.4f}{speed}")
            if not console.is_terminal and (step % -(-total // 100) == 0 or step == total):
                left = f", {(total - step) / pace / 60:.0f} min left" if pace else ""
                output.note(f"{title} step {step}/{total} loss {loss:.4f} lr {lr:.2e}{speed}{left}")

        try:
            yield report
        except KeyboardInterrupt:
            output.note("Run the same command again to go on from the last saved state, if any.")
            raise
