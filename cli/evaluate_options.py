"""The options of ``evaluate``, which of them go together, and those that ``verify`` has, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tocom_export.errors import InputError
from tocom_export.model.huggingface.folder import is_folder

from .model_options import weights_key_option
from .options import (
    DATA_HELP,
    DEGREES,
    FILE,
    METHOD,
    FiniteFloat,
    NamedSchedule,
    Names,
    add_options,
)
from .runtime_options import BACKENDS

_FOR_BUNDLES = {
    "check": "holds a bundle's engines against PyTorch",
    "record": "writes into a bundle's manifest",
    "variants": "chooses among those of a bundle",
    "backend": "chooses what runs a bundle",
}
_FOR_CHECKPOINTS = {
    "weights_key": "a bundle has its own weights",
    "bank": "a bundle has its own baked in",
    "method": "a bundle has its own baked in",
    "merge": "a bundle has its own baked in",
    "targets": "`variants` chooses among those of a bundle",
    "schedules": "`variants` chooses among those of a bundle",
}


class Scale(click.ParamType[float | str]):
    """A number, or ``auto``."""

    name = "S|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return value if value == "auto" else FiniteFloat().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a finite number nor 'auto'.", param, ctx)


def _require_text(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("a name is needed.", ctx, param)
    return value


BACKEND = click.Choice(BACKENDS)
place_options = add_options(
    click.option("--data-root", type=FILE, metavar="DIR", help="Where a timm data set lies."),
    click.option("--download", is_flag=True, help="Let timm download the data set."),
)
evaluate_options = add_options(
    click.option("--data", metavar="DATA", help=f"Test images with labels. {DATA_HELP}"),
    place_options,
    click.option(
        "--held-out", metavar="DATA", help="Images, not of the test split, for --scale auto."
    ),
    click.option(
        "--knn",
        metavar="DATA",
        help="Training images with labels: the embedding is measured, each test image taking the "
        "class that its nearest among them vote for. It needs no head.",
    ),
    click.option(
        "--neighbours", type=click.IntRange(1), help="How many vote in --knn; default: 20."
    ),
    click.option("--batch", type=click.IntRange(1), default=128, help="Images."),
    click.option("--workers", type=click.IntRange(0), default=0, help="Loading processes."),
    click.option(
        "--targets",
        type=DEGREES,
        help="Degrees to run checkpoints at; default: 0,4,8,12,16, or none with --schedule.",
    ),
    click.option(
        "--schedule",
        "schedules",
        type=NamedSchedule(),
        multiple=True,
        help="A variant of checkpoints with a degree for each layer, or NAME=every:K[:R] or "
        "NAME=keep:SHARE as in build; repeatable.",
    ),
    click.option("--variants", type=Names(), help="Variants of bundles to run; default: all."),
    click.option("--backend", type=BACKEND, help="What runs a bundle's engines; default: onnx."),
    weights_key_option,
    click.option(
        "--bank",
        metavar="FILE",
        help="ToCom bank; default for 'reference' models: the shipped one; 'none' measures "
        "token reduction alone.",
    ),
    click.option(
        "--method", type=METHOD, help="Merge or prune; default: the bank's, else the model's."
    ),
    click.option(
        "--merge",
        type=click.Choice(["block", "ffn"]),
        help="What merged tokens are spared (build --help); default: as of the method.",
    ),
    click.option(
        "--scale",
        type=Scale(),
        help="ToCom scale, default 0.1; 'auto' takes for each variant the paper's value that "
        "does best on --held-out. A bundle's is baked in.",
    ),
    click.option("--device", metavar="NAME", help="Of PyTorch; default: CUDA if any."),
    click.option("--check", is_flag=True, help="Judge a bundle's engines beside PyTorch (CPU)."),
    click.option(
        "--record",
        is_flag=True,
        help="Write the accuracy into a bundle's manifest, where steering and bench --plot "
        "find it.",
    ),
    click.option(
        "--name", callback=_require_text, help="What to call the data set; default: from --data."
    ),
    click.option(
        "--bank-name",
        callback=_require_text,
        default="tocom",
        help="What to call the bank in the rows.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, help="Of training, for the rows."),
    click.option(
        "--out",
        type=FILE,
        metavar="DIR",
        help="Add the rows to results.json in this folder, and write a table, a page and, with "
        "matplotlib, two plots of it; without a checkpoint or bundle only the latter.",
    ),
)


def check_usage(paths: Sequence[Path], options: Mapping[str, Any]) -> None:
    """Raise InputError where options don't go together, or not with what is evaluated."""
    if not paths:
        if not options["out"] or any(options[n] for n in ("data", "knn", "check", "record")):
            raise InputError(
                "name a checkpoint or a bundle, or `out` alone to show its results anew."
            )
        return
    if options["data"] is None:
        raise InputError("`data`: name the test images.")
    if (options["scale"] == "auto") != (options["held_out"] is not None):
        raise InputError("`scale` auto and `held_out` DATA need each other.")
    if options["neighbours"] and options["knn"] is None:
        raise InputError("`neighbours` is for `knn`: name the images that vote.")
    for name, what in _FOR_BUNDLES.items():
        if options[name] and not any(map(is_bundle, paths)):
            raise InputError(f"`{name}` {what}; name a bundle.")
    for name, what in _FOR_CHECKPOINTS.items():
        if options[name] and all(map(is_bundle, paths)):
            raise InputError(f"`{name}` is for checkpoints; {what}.")


def is_bundle(path: Path) -> bool:
    """Whether a path is taken for a bundle: a folder that transformers didn't save."""
    return path.is_dir() and not is_folder(path)
