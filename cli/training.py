"""Options and progress that ``train`` and ``finetune`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tocom_export.cli.common import (
    FILE,
    F,
    FiniteFloat,
    Output,
    installed,
)
from tocom_export.errors import MissingPackageError, OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from tocom_export.training.loop import Recipe, Report


def require_torch() -> None:
    """Raise MissingPackageError where torch or timm is not installed."""
    if not installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")


def _safetensors(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """Refuse a name that would say another format than the file's."""
    if value.suffix != ".safetensors":
        raise click.BadParameter(f"{value} should end in .safetensors.", ctx, param)
    return value


def recipe_options(*, epochs: int, batch: int, lr: float, out: str) -> Callable[[F], F]:
    """The options of a training run, with this command's defaults."""

    def add(function: F) -> F:
        for option in (
            click.option(
                "--workers",
                type=click.IntRange(0),
                default=1,
                show_default=True,
                help="Processes that load images; has no influence on the outcome.",
            ),
            click.option(
                "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
            ),
            click.option(
                "--augment",
                metavar="TEXT",
                help="timm's RandAugment, such as rand-m9-mstd0.5-inc1; default: none.",
            ),
            click.option(
                "--crop-scale",
                type=click.FloatRange(0.01, 1),
                default=0.08,
                show_default=True,
                help="Smallest share of an image that a crop keeps.",
            ),
            click.option(
                "--lr",
                type=FiniteFloat(1e-12),
                default=lr,
                show_default=True,
                help="Learning rate.",
            ),
            click.option(
                "--batch",
                type=click.IntRange(1),
                default=batch,
                show_default=True,
                help="Images a step.",
            ),
            click.option(
                "--epochs",
                type=click.IntRange(1),
                default=epochs,
                show_default=True,
                help="Passes over the images.",
            ),
            click.option(
                "--out",
                type=FILE,
                callback=_safetensors,
                default=out,
                show_default=True,
                metavar="FILE",
                help="File to write.",
            ),
            click.option("--force", is_flag=True, help="Replace an existing --out."),
            click.option(
                "--data",
                type=FILE,
                required=True,
                metavar="DIR",
                help="Images as <DIR>/<class>/<image>.",
            ),
        ):
            function = option(function)
        return function

    return add


def check_out(out: Path, force: bool) -> None:
    """Refuse to replace a finished result unasked."""
    if out.exists() and not force:
        raise OutputError(f"--out {out} exists; add --force to replace it, or name another file.")


@contextmanager
def reporting(output: Output, title: str, recipe: Recipe, steps: int) -> Iterator[Report]:
    """A progress bar on a terminal; else one line for each hundredth of the run."""
    from rich.console import Console

    total = recipe.epochs * steps
    terminal = Console(stderr=True).is_terminal
    with output.progress(title, total) as advance:
        first = True

        def report(step: int, total: int, loss: float, lr: float) -> None:
            nonlocal first
            if first and step > 1:
                output.note(f"{title} continues after step {step - 1} of {total}")
            first = False
            advance(f"epoch {(step - 1) // steps + 1}/{recipe.epochs}, loss {loss:.4f}")
            if not terminal and step % max(1, total // 100) == 0:
                output.note(f"{title} step {step}/{total} loss {loss:.4f} lr {lr:.2e}")

        try:
            yield report
        except KeyboardInterrupt:
            output.note("Run the same command again to go on from the last saved state.")
            raise
