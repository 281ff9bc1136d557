"""Options, data and progress that ``train`` and ``finetune`` share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import MissingPackageError, OutputError
from tocom_export.loading import is_installed

from .options import DATA_HELP, FILE, F, FiniteFloat, add_options, take_output
from .output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from tocom_export.loading import Model
    from tocom_export.training.data.evaluation import EvalData
    from tocom_export.training.data.train import TrainData
    from tocom_export.training.loop.loop import ReportStep
    from tocom_export.training.loop.optimizer import Hyperparameters
    from tocom_export.training.settings import Settings


def _safetensors(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """Refuse a name that would say another format than the file's."""
    if value.suffix != ".safetensors":
        raise click.BadParameter(f"{value} should end in .safetensors.", ctx, param)
    return value


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
        help="Parts that a process takes its share of a batch in; more need less memory.",
    ),
    click.option(
        "--lr",
        type=FiniteFloat(1e-12),
        help="Learning rate at its peak; default: the paper's, in proportion to --batch.",
    ),
    click.option("--weight-decay", type=FiniteFloat(0), help="AdamW's."),
    click.option(
        "--warmup",
        "warmup_epochs",
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
        "--flip/--no-flip", default=True, help="Mirror images at random, unless --augment none."
    ),
    click.option(
        "--crop-scale",
        type=click.FloatRange(0.01, 1),
        help="Smallest share of an image that a random crop keeps; default: 0.08.",
    ),
    click.option("--mixup", type=FiniteFloat(0), help="Mixup's alpha; 0 for none."),
    click.option("--cutmix", type=FiniteFloat(0), help="CutMix's alpha; 0 for none."),
    click.option("--erasing", type=_SHARE, help="Probability of random erasing."),
    click.option("--seed", type=click.IntRange(0), default=0, help="Random seed."),
    click.option(
        "--workers",
        type=click.IntRange(0),
        default=1,
        help="Processes that load images; has no influence on the outcome.",
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: CUDA if any."),
    click.option(
        "--amp",
        type=click.Choice(["none", "bf16", "fp16"]),
        default="none",
        help="Autocast's precision.",
    ),
    click.option("--compile", is_flag=True, help="Compile the MLPs with torch.compile."),
)


def training_options(*, out: str) -> Callable[[F], F]:
    """The options of both commands; those without a default are the paper's."""
    out_option = click.option(
        "--out",
        type=FILE,
        callback=_safetensors,
        default=out,
        metavar="FILE",
        help="File to write.",
    )
    return add_options(*_OPTIONS[:3], out_option, *_OPTIONS[3:])


def start_training(options: dict[str, Any]) -> Output:
    """The output of a training command; of several processes only the first one speaks.

    Raises:
        OutputError: a finished result would be replaced unasked.
    """
    output, out = take_output(options), options["out"]
    if out.exists() and not options["force"]:
        raise OutputError(f"`out` {out} exists; add `force` to replace it, or name another file.")
    return output if int(os.environ.get("RANK", 0)) == 0 else Output(False, -1)


def open_data(
    settings: Settings, options: Mapping[str, Any], model: Model, labels: bool = True
) -> TrainData:
    """The images to train a model on, with or without labels."""
    from tocom_export.training.data.opening import open_images
    from tocom_export.training.data.train import TrainData

    root, download = options["data_root"], options["download"]
    images = open_images(options["data"], data_root=root, download=download, labels=labels)
    return TrainData(
        images, model.spec, model.preprocess, settings.batch,
        seed=settings.seed, workers=options["workers"], warn=_warn, **settings.augmentation(),
    )  # fmt: skip


def open_val(val: str, options: Mapping[str, Any], model: Model, output: Output) -> EvalData:
    """The images of ``--val``, to measure a model on; without labels where a folder has none."""
    from tocom_export.model.preprocess import holds_images
    from tocom_export.training.data.evaluation import open_test_data

    given = {name: options[name] for name in ("workers", "data_root", "download")}
    given["labels"] = not holds_images(val)
    return open_test_data(val, model.spec, model.preprocess, warn=output.note, **given)


def require_torch() -> None:
    """Raise MissingPackageError where torch or timm is not installed."""
    if not is_installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")


def _warn(line: str) -> None:
    """A line on stderr, from whichever process meets what it is about."""
    click.echo(line, err=True)


@contextmanager
def report_steps(
    output: Output, title: str, hyperparameters: Hyperparameters, steps: int
) -> Iterator[ReportStep]:
    """A progress bar on a terminal; else one line for each hundredth of the run.

    Args:
        steps: steps of an epoch.
    """
    from rich.console import Console

    terminal = Console(stderr=True).is_terminal
    with output.open_bar(title, hyperparameters.epochs * steps) as update:
        began, first = time.monotonic(), 0

        def report(step: int, total: int, loss: float, lr: float) -> None:
            nonlocal began, first
            if not first:
                began, first = time.monotonic(), step
                if step > 1:
                    output.note(f"{title} continues after step {step - 1} of {total}")
            pace = (step - first) / max(time.monotonic() - began, 1e-9)  # steps a second
            speed = f" {pace * hyperparameters.batch:.0f} images/s" if step > first else ""
            epoch = f"epoch {(step - 1) // steps + 1}/{hyperparameters.epochs}"
            update(completed=step, description=f"{title} {epoch}, loss {loss:.4f}{speed}")
            if not terminal and (step % -(-total // 100) == 0 or step == total):
                left = f", {(total - step) / pace / 60:.0f} min left" if pace else ""
                output.note(f"{title} step {step}/{total} loss {loss:.4f} lr {lr:.2e}{speed}{left}")

        try:
            yield report
        except KeyboardInterrupt:
            output.note("Run the same command again to go on from the last saved state, if any.")
            raise
